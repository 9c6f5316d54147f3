"""A publisher with an event loop of its own, for processes that have none."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc.aio

from esper.mesh._bus_publish import BusPublisher
from esper.mesh._bus_terms import PublisherOptions, PublisherStats
from esper.v1 import event_pb2

__all__ = ["PublisherThread"]

_T = TypeVar("_T")


class PublisherThread:
    """A `BusPublisher` on a thread and event loop of its own, for processes that have none.

    Args:
        open_channel: opens the channel, on the thread's loop.
        options: bounds and times.
    """

    def __init__(self, open_channel: Callable[[], grpc.aio.Channel], options: PublisherOptions | None = None) -> None:
        self._open_channel = open_channel
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bus-publisher", daemon=True)
        self._channel: grpc.aio.Channel | None = None
        self._thread.start()
        self.publisher = self._call(self._start())

    def offer(self, topic: str, event: event_pb2.Event) -> bool:
        """As `BusPublisher.offer`."""
        return self.publisher.offer(topic, event)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits; False when that took longer. Not for the training thread."""
        return self._call(self.publisher.flush(timeout_s))

    def close(self, timeout_s: float = 5.0) -> PublisherStats:
        """Send what waits for at most `timeout_s`, stop, end the thread; return the final counts."""
        if self._loop.is_closed():
            return self.publisher.stats
        stats = self._call(self._stop(timeout_s))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return stats

    async def _start(self) -> BusPublisher:
        self._channel = self._open_channel()
        publisher = BusPublisher(self._channel, self._options)
        publisher.start()
        return publisher

    async def _stop(self, timeout_s: float) -> PublisherStats:
        stats = await self.publisher.close(timeout_s)
        if self._channel is not None:
            await self._channel.close()
        return stats

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
