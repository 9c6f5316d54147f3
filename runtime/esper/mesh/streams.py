"""Long streams that end by themselves, and bounded queues that say what they do when they are full.

A long stream in a servicer::

    async for item in race_drain(queue, self.context.drain):
        yield item_to_proto(item)

A background loop::

    while not await sleep_or_drain(5.0, drain):
        await sweep()
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Hashable
from enum import StrEnum
from typing import Any, Generic, TypeVar

from esper.mesh.errors import LimitExceeded

__all__ = ["BoundedQueue", "Overflow", "race_drain", "sleep_or_drain", "until_drain"]

_T = TypeVar("_T")
_D = TypeVar("_D")


async def race_drain(source: AsyncIterable[_T], drain: asyncio.Event) -> AsyncGenerator[_T, None]:
    """Yield what `source` yields until it ends or `drain` is set, whichever comes first; then close the source.

    The wait for the next item is cancelled at the drain, so an item that arrives in that very moment may stay unread.
    Costs one task per stream, not one per item.
    """
    current: asyncio.Timeout | None = None

    async def watch() -> None:
        await drain.wait()
        if current is not None:
            current.reschedule(0)

    iterator = aiter(source)
    watcher = asyncio.create_task(watch())
    try:
        while not drain.is_set():
            # A timeout without a deadline is asyncio's own tool for "cancel just this await"; the watcher sets it off.
            current = asyncio.timeout(None)
            try:
                async with current:
                    item = await anext(iterator)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if current.expired():
                    return
                raise  # the source's own
            finally:
                current = None
            yield item
    finally:
        watcher.cancel()
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()


async def until_drain(work: Awaitable[_T], drain: asyncio.Event, default: _D = None) -> _T | _D:  # type: ignore[assignment]  # None is the default's default
    """Await `work`, but give `default` (and cancel the work) as soon as `drain` is set."""
    task = asyncio.ensure_future(work)
    stop = asyncio.create_task(drain.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return default
    finally:
        stop.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def sleep_or_drain(seconds: float, drain: asyncio.Event) -> bool:
    """Sleep, but not beyond the drain. True when draining: the caller's loop ends."""
    try:
        async with asyncio.timeout(seconds):
            await drain.wait()
    except TimeoutError:
        return drain.is_set()
    return True


class Overflow(StrEnum):
    """What a full queue does with one item more. There is no fourth policy, and none that waits."""

    COALESCE = "coalesce"
    """A new item replaces the waiting one of the same key, keeping its place; with more keys than room the oldest
    waiting item is dropped and counted. For state, of which only the latest counts."""

    DROP_OLDEST = "drop_oldest"
    """The oldest waiting item is dropped and counted. For telemetry."""

    END_STREAM = "end_stream"
    """Nothing is dropped in silence: what waits is still delivered, then the consumer gets LimitExceeded
    (reason SUBSCRIBER_TOO_SLOW) and must subscribe anew. For commands and reports."""


class BoundedQueue(Generic[_T]):
    """A queue between one event loop's producers and one consumer, with a bound and a written overflow policy.

    `put` never waits. The consumer iterates: `async for item in queue`. Not thread-safe: other threads go through
    `loop.call_soon_threadsafe(queue.put, item)`.

    Args:
        maxsize: most items that wait.
        overflow: what happens to one more.
        key: item -> key for `COALESCE`; required there, refused elsewhere.

    Raises:
        ValueError: `maxsize` below 1, or a key that does not go with the policy.
    """

    def __init__(self, maxsize: int, overflow: Overflow, *, key: Callable[[_T], Hashable] | None = None) -> None:
        if maxsize < 1:
            raise ValueError(f"a bounded queue needs room for at least 1 item, found maxsize={maxsize}")
        if (key is None) == (overflow is Overflow.COALESCE):
            raise ValueError(f"policy {overflow} and key={key!r}: a key goes with coalesce and with nothing else")
        self._maxsize = maxsize
        self._overflow = overflow
        self._key = key
        self._keyed: OrderedDict[Hashable, _T] = OrderedDict()
        self._plain: deque[_T] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._overrun = False
        self._dropped = 0
        self._coalesced = 0

    def __len__(self) -> int:
        return len(self._keyed) + len(self._plain)

    @property
    def dropped(self) -> int:
        """Items lost to the bound so far."""
        return self._dropped

    @property
    def coalesced(self) -> int:
        """Items replaced by a newer one of their key so far."""
        return self._coalesced

    @property
    def closed(self) -> bool:
        """Whether the queue takes nothing more: closed, or overrun under `END_STREAM`."""
        return self._closed

    def put(self, item: _T) -> bool:
        """Add an item at once. False when the queue is closed and the item was not taken."""
        if self._closed:
            return False
        if self._key is not None:
            name = self._key(item)
            if name in self._keyed:
                self._coalesced += 1
            elif len(self._keyed) >= self._maxsize:
                self._keyed.popitem(last=False)
                self._dropped += 1
            self._keyed[name] = item
        else:
            if len(self._plain) >= self._maxsize:
                if self._overflow is Overflow.END_STREAM:
                    self._overrun = True
                    self._dropped += 1
                    self.close()
                    return False
                self._plain.popleft()
                self._dropped += 1
            self._plain.append(item)
        self._wake.set()
        return True

    def close(self) -> None:
        """Take nothing more; the consumer still gets what waits, then its iteration ends."""
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> AsyncIterator[_T]:
        return self

    async def __anext__(self) -> _T:
        while True:
            if self._plain:
                return self._plain.popleft()
            if self._keyed:
                return self._keyed.popitem(last=False)[1]
            if self._overrun:
                raise LimitExceeded(
                    f"subscriber too slow: more than {self._maxsize} items were waiting; subscribe again",
                    reason="SUBSCRIBER_TOO_SLOW",
                    metadata={"queue_size": str(self._maxsize)},
                )
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    def drain_now(self) -> list[_T]:
        """Take everything that waits, at once and in order (for batches)."""
        items: list[Any] = [*self._plain, *self._keyed.values()]
        self._plain.clear()
        self._keyed.clear()
        return items
