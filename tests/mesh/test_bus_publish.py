"""Publishing clients against a real bus, with the bus going away in the middle."""

import asyncio
import statistics
import threading
import time
from contextlib import asynccontextmanager

import pytest

from esper.mesh import _bus_publish
from esper.mesh._bus_lanes import Batch, Entry, Lane, size_of
from esper.mesh.bus import BusPublisher, PublisherOptions, PublisherThread, StoredAt, new_event
from esper.mesh.channel import open_channel
from esper.mesh.errors import InvalidInput, LimitExceeded, NotFound, Unavailable, from_rpc_error
from esper.mesh.settings import ChannelOptions
from esper.mesh.testing import serve, service_context, settings_with
from esper.oona.service import Config, build
from esper.v1 import event_pb2, oona_service_pb2
from esper.v1.oona_service_pb2_grpc import OonaServiceStub

LOW = event_pb2.PRIORITY_LOW
QUICK = PublisherOptions(linger_s=0.001, backoff_s=0.01, backoff_max_s=0.05)
NOWHERE = "127.0.0.1:1"


@asynccontextmanager
async def a_bus(path, *, port=0, max_message_bytes=4 << 20, **config):
    """A bus, on a port that a later one can take again."""
    context = service_context("oona", path)
    service = await build(Config(**config), context)
    settings = settings_with(port=port, drain_grace_s=0.2, options={"max_message_bytes": max_message_bytes})
    async with serve(service, settings=settings, drain=context.drain) as (server, channel):
        server.service = service
        yield server, channel


async def stored_in(channel, topic):
    """All events of a topic, partition by partition."""
    stub = OonaServiceStub(channel)
    shown = (await stub.GetTopic(oona_service_pb2.GetTopicRequest(name=topic))).topic
    count = sum(s.next_offset - s.first_offset for s in shown.partition_statuses)
    call = stub.Subscribe()
    opening = oona_service_pb2.SubscribeOpen(topic=topic, credit=10_000)
    await call.write(oona_service_pb2.SubscribeRequest(open=opening))
    found = []
    while len(found) < count:
        deliveries = (await call.read()).deliveries.deliveries
        found += deliveries
        if deliveries:
            credit = oona_service_pb2.SubscribeCredit(credit=len(deliveries))
            await call.write(oona_service_pb2.SubscribeRequest(credit=credit))
    call.cancel()
    return [d.event for d in sorted(found, key=lambda d: (d.position.partition, d.position.offset))]


def numbered(number, *, keys=5, **values):
    """An event that says its number and belongs to one of a few keys."""
    return new_event("application/x-number", b"%d" % number, key=f"k{number % keys}", **values)


def assert_in_order(events, count, *, keys=5):
    """Each number once, each key ascending."""
    numbers = [int(e.payload) for e in events]
    assert list(range(count)) == sorted(numbers)
    for key in range(keys):
        own = [n for n in numbers if n % keys == key]
        assert sorted(own) == own


async def test_events_arrive_in_order(tmp_path):
    """What is offered is stored, once, in the order of its key, over several topics."""
    async with a_bus(tmp_path) as (_, channel), BusPublisher(channel, QUICK) as publisher:
        for number in range(5000):
            assert publisher.offer("decisions", numbered(number))
            assert publisher.offer("telemetry", numbered(number, priority=LOW))
        assert await publisher.flush(20)
        assert 10_000 == publisher.stats.stored == publisher.stats.offered
        for topic in ("decisions", "telemetry"):
            assert_in_order(await stored_in(channel, topic), 5000)


async def test_offering_from_another_thread_is_quick(tmp_path):
    """The training thread pays microseconds for a hand-off while the loop is busy sending."""
    async with a_bus(tmp_path) as (_, channel), BusPublisher(channel) as publisher:
        costs = []

        def train():
            events = [numbered(n, priority=LOW) for n in range(3000)]
            for event in events:
                begin = time.perf_counter()
                publisher.offer("telemetry", event)
                costs.append(time.perf_counter() - begin)

        await asyncio.to_thread(train)
        assert await publisher.flush(10)
        # The target is 20 us (docs/oona.md has the figure); a shared machine under test gets ten times that.
        assert statistics.median(costs) < 200e-6


async def test_no_bus_no_wait():
    """Without a bus LOW events push out their oldest, others are refused when the buffer is full; nobody waits."""
    channel = open_channel(NOWHERE)
    options = PublisherOptions(max_events=10, max_low_events=10, backoff_s=0.01)
    async with BusPublisher(channel, options) as publisher:
        begin = time.perf_counter()
        assert all(publisher.offer("telemetry", numbered(n, priority=LOW)) for n in range(100))
        assert [True] * 10 + [False] * 5 == [publisher.offer("decisions", numbered(n)) for n in range(15)]
        assert time.perf_counter() - begin < 1
        with pytest.raises(LimitExceeded, match=r"buffer \(10 events") as caught:
            publisher.publish("decisions", numbered(1))
        assert "BUS_BUFFER_FULL" == caught.value.reason
        assert not await publisher.flush(0.1)
        stats = publisher.stats
        assert (116, 6, 90, 0) == (stats.offered, stats.refused, stats.shed, stats.stored)
        assert 20 == (await publisher.close(0.05)).lost
    await channel.close()


async def test_low_events_are_bounded_by_bytes_too():
    """Large telemetry is shed by its size."""
    channel = open_channel(NOWHERE)
    publisher = BusPublisher(channel, PublisherOptions(max_low_bytes=100_000, max_bytes=100_000))
    for number in range(10):
        assert publisher.offer("telemetry", new_event("t", bytes(30_000), priority=LOW))
        assert (number < 3) == publisher.offer("decisions", new_event("t", bytes(30_000)))
    assert (7, 7) == (publisher.stats.shed, publisher.stats.refused)
    await publisher.close()
    await channel.close()


async def test_payload_too_large():
    """A payload beyond the contract is refused at once, by name of its topic."""
    channel = open_channel(NOWHERE)
    publisher = BusPublisher(channel)
    big = new_event("t", bytes((1 << 20) + 1))
    assert not publisher.offer("decisions", big)
    with pytest.raises(InvalidInput, match="decisions: expected a payload of at most 1048576 bytes, found 1048577"):
        publisher.publish("decisions", big)
    await publisher.close()
    with pytest.raises(Unavailable, match="closed"):
        publisher.publish("decisions", new_event("t", b""))
    await channel.close()


async def test_missing_ids_are_given():
    """An event without an id gets one before it is sent the first time."""
    channel = open_channel(NOWHERE)
    publisher = BusPublisher(channel)
    events = [event_pb2.Event(payload=b"x") for _ in range(2)]
    for event in events:
        publisher.publish("decisions", event)
    assert 2 == len({e.id for e in events} - {""})
    await publisher.close()
    await channel.close()


async def test_bus_restarts_in_the_middle(tmp_path):
    """The bus stops and starts four times while a thread publishes: nothing lost, nothing twice, every key in order."""
    count = 20_000
    async with a_bus(tmp_path) as (server, _):
        port = server.port
    channel = open_channel(f"127.0.0.1:{port}", options=ChannelOptions(reconnect_max_s=0.1))
    done = threading.Event()
    async with BusPublisher(channel, QUICK) as publisher:

        def train():
            for number in range(count):
                while not publisher.offer("decisions", numbered(number)):
                    time.sleep(0.001)
                if number % 100 == 0:
                    time.sleep(0.005)
            done.set()

        training = asyncio.create_task(asyncio.to_thread(train))
        for _ in range(4):
            async with a_bus(tmp_path, port=port):
                await asyncio.sleep(0.2)
            await asyncio.sleep(0.05)
        async with a_bus(tmp_path, port=port) as (_, other):
            await training
            assert await publisher.flush(20)
            assert publisher.stats.resent > 0
            assert count == publisher.stats.stored
            assert_in_order(await stored_in(other, "decisions"), count)
    await channel.close()


async def test_full_log_is_waited_for(tmp_path):
    """LOG_FULL is answered by sending the same batch again after the time asked for; telemetry is shed meanwhile."""
    async with (
        a_bus(tmp_path, max_log_bytes=1 << 20, full_retry_s=0.05) as (server, channel),
        BusPublisher(channel, QUICK) as publisher,
    ):
        for number in range(200):
            assert publisher.offer("decisions", numbered(number, keys=1, source="x" * 100))
            publisher.offer("run-events", new_event("t", bytes(20_000)))
        assert not await publisher.flush(1.0)
        assert publisher.stats.resent > 0
        with pytest.raises(LimitExceeded) as caught:
            await publisher.send("telemetry", new_event("t", bytes(1_000_000), priority=LOW))
        assert "SHED" == caught.value.reason
        log = server.service.broker.log
        await log._on(log._writing, log._writing.db.execute, "PRAGMA max_page_count=100000")
        assert await publisher.flush(10)
        assert_in_order(await stored_in(channel, "decisions"), 200, keys=1)
        assert (400, 1, 0) == (publisher.stats.stored, publisher.stats.shed, publisher.stats.rejected)


async def test_send_waits_for_the_disk(tmp_path):
    """`send` gives the place of the event, or the error that the bus has for it."""
    async with a_bus(tmp_path, partitions=1) as (_, channel), BusPublisher(channel, QUICK) as publisher:
        places = await asyncio.gather(*[publisher.send("decisions", numbered(n, keys=1)) for n in range(20)])
        assert [StoredAt(0, n) for n in range(20)] == places
        with pytest.raises(NotFound, match="no topic nope") as caught:
            await publisher.send("nope", numbered(1))
        assert "TOPIC_NOT_FOUND" == caught.value.reason
        assert 1 == publisher.stats.rejected


async def test_an_event_that_breaks_the_contract_goes_alone(tmp_path):
    """Of a batch with one unlawful event that one is given up, the others are stored; other topics are unharmed."""
    async with a_bus(tmp_path) as (_, channel), BusPublisher(channel) as publisher:
        bad = numbered(0, source="x" * 200)
        sends = [publisher.send("decisions", e) for e in (numbered(0), bad, numbered(1))]
        for number in range(10):
            publisher.publish("run-events", numbered(number))
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert [StoredAt, InvalidInput, StoredAt] == [type(r) for r in results]
        assert await publisher.flush(10)
        assert (12, 1) == (publisher.stats.stored, publisher.stats.rejected)
        assert_in_order(await stored_in(channel, "run-events"), 10)


async def test_an_unlawful_topic_goes_alone(tmp_path):
    """A name beyond the contract's bound is given up; it does not hold the other topics back."""
    async with a_bus(tmp_path) as (_, channel), BusPublisher(channel, QUICK) as publisher:
        publisher.publish("decisions", numbered(0))
        with pytest.raises(InvalidInput):
            await publisher.send("x" * 200, numbered(1))
        publisher.publish("decisions", numbered(1))
        assert await publisher.flush(10)
        assert (2, 1) == (publisher.stats.stored, publisher.stats.rejected)


async def test_a_bus_that_takes_less_at_a_time(tmp_path):
    """Batches shrink until the server takes them, in order; only an event that is too large by itself is given up."""
    async with (
        a_bus(tmp_path, max_message_bytes=50_000, partitions=1) as (_, channel),
        BusPublisher(channel, QUICK) as publisher,
    ):
        for number in range(100):
            publisher.publish("decisions", numbered(number, attributes={"filler": "x" * 256}, source="s" * 100))
            publisher.publish("run-events", new_event("t", bytes(10_000)))
        with pytest.raises(LimitExceeded) as caught:
            await publisher.send("field-reports", new_event("t", bytes(60_000)))
        assert "MESSAGE_TOO_LARGE" == caught.value.reason
        assert await publisher.flush(10)
        assert (200, 1) == (publisher.stats.stored, publisher.stats.rejected)
        assert_in_order(await stored_in(channel, "decisions"), 100)


@pytest.mark.parametrize("known", [True, False])
async def test_an_innocent_event_survives_the_size_of_another(tmp_path, monkeypatch, known):
    """Of events of several topics only the one too large is given up, whether the server says its bound or not."""

    def understood(failure):
        error = from_rpc_error(failure)
        return error if known else type(error)(error.public, reason=error.reason)

    monkeypatch.setattr(_bus_publish, "from_rpc_error", understood)
    async with a_bus(tmp_path, max_message_bytes=50_000) as (_, channel):
        publisher = BusPublisher(channel, QUICK)
        events = [numbered(0), new_event("t", bytes(60_000)), numbered(1)]
        topics = ["decisions", "field-reports", "run-events"]
        sends = [asyncio.ensure_future(publisher.send(*pair)) for pair in zip(topics, events, strict=True)]
        await asyncio.sleep(0)  # all three are queued before the first is sent
        publisher.start()
        results = await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 30)
        assert [StoredAt, LimitExceeded, StoredAt] == [type(result) for result in results]
        assert (2, 1) == (publisher.stats.stored, publisher.stats.rejected)
        assert (50_000 if known else QUICK.batch_bytes) == publisher._most_bytes()
        publisher._limit_until = 0.0  # a bound is not believed for ever
        assert QUICK.batch_bytes == publisher._most_bytes()
        await publisher.close()


def test_a_batch_never_takes_more_bytes_than_its_bound():
    """All of an event counts, not its payload alone; what is larger than the bound goes alone."""
    lane = Lane("decisions", low=False)
    attributes = {f"{n:064}": "x" * 256 for n in range(16)}
    for size in (10, 10, 20_000, 10, 10, 10):
        event = new_event("t", bytes(size), key="k" * 128, source="s" * 128, attributes=attributes)
        lane.waiting.append(Entry(event, size_of(event)))
    lane.size = sum(entry.size for entry in lane.waiting)
    counts = []
    while entries := lane.fill(100, 12_500):
        counts.append(len(entries))
        assert len(entries) == 1 or lane.request(Batch(1 << 60, entries)).ByteSize() <= 12_500
    assert [2, 1, 2, 1] == counts
    assert 0 == lane.size


async def test_a_publisher_outlives_any_failure(tmp_path):
    """An error that is no answer of the server, like a token that cannot be read, is as good as a broken stream."""

    class Failing:
        failures = 3

        def __init__(self, stub):
            self._stub = stub

        def Publish(self):  # noqa: N802  # the contract's name
            if self.failures:
                self.failures -= 1
                raise OSError("no token")
            return self._stub.Publish()

    async with a_bus(tmp_path) as (_, channel):
        publisher = BusPublisher(channel, QUICK)
        publisher._stub = Failing(publisher._stub)
        publisher.start()
        await asyncio.wait_for(publisher.send("decisions", numbered(1)), 30)
        assert 1 == len(await stored_in(channel, "decisions"))
        await publisher.close()


async def test_closing_refuses_what_follows_and_fails_what_waits():
    """A closed publisher says so to whoever still waits for an event."""
    channel = open_channel(NOWHERE)
    publisher = BusPublisher(channel)
    publisher.start()
    waiting = asyncio.create_task(publisher.send("decisions", numbered(1)))
    low = asyncio.create_task(publisher.send("telemetry", numbered(1, priority=LOW)))
    await asyncio.sleep(0.05)
    assert 2 == (await publisher.close(0.05)).lost
    for task in (waiting, low):
        with pytest.raises(Unavailable) as caught:
            await task
        assert "BUS_CLOSED" == caught.value.reason
    assert not publisher.offer("decisions", numbered(2))
    with pytest.raises(Unavailable):
        await publisher.send("decisions", numbered(2))
    await channel.close()


async def test_a_shed_event_tells_its_sender():
    """Whoever waits for a LOW event that is pushed out hears of it."""
    channel = open_channel(NOWHERE)
    async with BusPublisher(channel, PublisherOptions(max_low_events=1, linger_s=5.0)) as publisher:
        first = asyncio.create_task(publisher.send("telemetry", numbered(1, priority=LOW)))
        await asyncio.sleep(0)
        publisher.offer("telemetry", numbered(2, priority=LOW))
        with pytest.raises(LimitExceeded, match="shed") as caught:
            await asyncio.wait_for(first, 5)
        assert "SHED" == caught.value.reason
        await publisher.close(0.01)
    await channel.close()


async def test_thread_of_its_own(tmp_path):
    """A process without an event loop publishes through a thread, which ends with its publisher."""
    async with a_bus(tmp_path) as (server, channel):

        def train():
            publisher = PublisherThread(lambda: open_channel(server.target), QUICK)
            for number in range(100):
                assert publisher.offer("decisions", numbered(number))
            assert publisher.flush(10)
            stats = publisher.close()
            assert stats == publisher.close()
            assert not publisher.offer("decisions", numbered(1))
            return stats

        stats = await asyncio.to_thread(train)
        assert (100, 0) == (stats.stored, stats.lost)
        assert_in_order(await stored_in(channel, "decisions"), 100)
        assert not [t for t in threading.enumerate() if t.name == "bus-publisher"]
