"""Clients of the message bus: publish without waiting, subscribe without losing.

A service or a trainer publishes::

    publisher = BusPublisher(channel)
    publisher.start()                                        # on the event loop that owns the channel
    publisher.offer("telemetry", new_event("esper.v1.HealthBatch", payload, key=run, priority=PRIORITY_LOW))
    where = await publisher.send("decisions", event)         # waits until it is durable
    await publisher.close()

`offer` may be called from any thread, the training thread above all: it never blocks and takes a few microseconds. A
process without an event loop uses `PublisherThread`, which brings its own.

A service subscribes::

    async with BusSubscriber(channel, "library-events", group="tamiyo") as subscriber:
        async for delivery in subscriber:
            ...
            delivery.ack()                                   # or delivery.nack("why")

Both reconnect by themselves. What was not acknowledged is sent, or delivered, again: handlers must bear repetition.
"""

from esper.mesh._bus_publish import BusPublisher
from esper.mesh._bus_subscribe import BusDelivery, BusSubscriber
from esper.mesh._bus_terms import PublisherOptions, PublisherStats, StoredAt, new_event
from esper.mesh._bus_thread import PublisherThread

__all__ = [
    "BusDelivery",
    "BusPublisher",
    "BusSubscriber",
    "PublisherOptions",
    "PublisherStats",
    "PublisherThread",
    "StoredAt",
    "new_event",
]
