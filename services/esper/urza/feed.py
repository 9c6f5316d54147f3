"""Waking those who wait: watchers of the library by changes, lessees by work. Nobody polls.

A commit signals topics (`Store.listen`). `Feed` then reads the new changes once, in order, and hands them to every
watcher; `Beacon` wakes the lessees of one kind of work.
"""

import asyncio
from collections.abc import AsyncGenerator

from esper.mesh.context import spawn
from esper.mesh.errors import EsperError, LimitExceeded, OutOfRange
from esper.mesh.logging import get_logger
from esper.mesh.streams import BoundedQueue, Overflow, sleep_or_drain
from esper.urza import log
from esper.urza.changes import Change
from esper.urza.store import Store

__all__ = ["Beacon", "Feed"]

_log = get_logger(__name__)
_PAGE = 500
_RETRY_S = 1.0


class Beacon:
    """Wakes everybody who waits for something that may have happened since they looked.

    ::

        seen = beacon.count           # before looking
        if not look():
            await beacon.changed(seen)
    """

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def flash(self) -> None:
        """Wake everybody."""
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def changed(self, seen: int) -> None:
        """Return once the beacon has flashed after it had been seen at this count."""
        while self.count == seen:
            await self._event.wait()


class Feed:
    """Reads each change once and hands it to all watchers.

    Args:
        store: the library's database.
        drain: ends the reader.
        queue_size: changes that a watcher may be behind before its stream ends.
    """

    def __init__(self, store: Store, *, drain: asyncio.Event, queue_size: int) -> None:
        self._store = store
        self._drain = drain
        self._queue_size = queue_size
        self._wake = asyncio.Event()
        self._watchers: set[BoundedQueue[Change]] = set()
        self._task: asyncio.Task[None] | None = None
        self.sequence = 0

    async def start(self) -> None:
        """Begin with the present."""
        self.sequence = await self._store.read(log.head)
        self._task = spawn(self._run(), name="urza-feed")

    async def close(self) -> None:
        """Stop reading; every watch ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for queue in self._watchers:
            queue.close()

    def wake(self) -> None:
        """There may be changes."""
        self._wake.set()

    async def watch(self, after: int | None) -> AsyncGenerator[int | Change, None]:
        """Changes after a number; without one, first the present number and then the changes that follow.

        Raises:
            OutOfRange: SEQUENCE_AHEAD, this library never got that far: it is another one than the watcher saw.
            LimitExceeded: WATCHER_TOO_SLOW, the watcher is further behind than its queue is long.
        """
        if after is None:
            # The reader may be a moment behind the database; the present is what was committed.
            last = max(await self._store.read(log.head), self.sequence)
        else:
            await self._check_position(after)
            last = after
        while last < self.sequence:
            for change in await self._page(last):
                yield change
                last = change.sequence
        # Nothing is awaited between the last look at `sequence` and this line: no change falls in between.
        queue: BoundedQueue[Change] = BoundedQueue(self._queue_size, Overflow.END_STREAM)
        self._watchers.add(queue)
        try:
            if after is None:
                yield last
            async for change in queue:
                if change.sequence > last:
                    last = change.sequence
                    yield change
        except LimitExceeded as error:
            raise LimitExceeded(
                f"the watcher is more than {self._queue_size} changes behind: watch again after {last}",
                reason="WATCHER_TOO_SLOW",
                metadata={"after_sequence": str(last)},
            ) from error
        finally:
            self._watchers.discard(queue)

    async def _check_position(self, after: int) -> None:
        if after > self.sequence:
            head = await self._store.read(log.head)
            if after > head:
                raise OutOfRange(
                    f"after_sequence: expected at most {head}, the present number of this library, found {after}",
                    reason="SEQUENCE_AHEAD",
                    metadata={"head": str(head)},
                )

    async def _page(self, after: int) -> list[Change]:
        return await self._store.read(lambda connection: log.changes_after(connection, after, limit=_PAGE))

    async def _run(self) -> None:
        while not self._drain.is_set():
            await self._wake.wait()
            self._wake.clear()
            try:
                while page := await self._page(self.sequence):
                    for change in page:
                        self._hand_out(change)
            except EsperError as error:
                _log.warning("change log cannot be read", reason=error.reason, error=error.private or error.public)
                await self._later()
            except Exception:  # noqa: BLE001  # logged with its traceback; watchers would wait for ever
                _log.exception("change log cannot be read")
                await self._later()

    async def _later(self) -> None:
        self._wake.set()
        await sleep_or_drain(_RETRY_S, self._drain)

    def _hand_out(self, change: Change) -> None:
        self.sequence = change.sequence
        for queue in self._watchers:
            queue.put(change)
