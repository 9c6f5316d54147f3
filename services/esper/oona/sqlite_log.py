"""The embedded log: group commit over one SQLite file.

While one group of batches is on its way to the disk, the next one gathers; so a busy log commits large groups and an
idle one commits at once. One thread owns the writing connection, a second one reads, a third one moves the write-ahead
log into the file, off the commit path. The event loop stages groups (memory only) and never waits for SQLite.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from sqlite3 import Error as SqliteError
from typing import TypeVar

from esper.mesh.errors import EsperError, LimitExceeded, Unavailable
from esper.mesh.logging import get_logger
from esper.oona.database import Database
from esper.oona.records import (
    Appended,
    Durability,
    Extent,
    GroupPosition,
    NewEvent,
    StoredEvent,
    TopicSpec,
    topic_missing,
)
from esper.oona.rows import PartitionRow, chunk_row, log_error, position_row
from esper.oona.sequencer import Staged, TopicState, stage
from esper.oona.tail import TailCache
from esper.oona.window import IdWindow

__all__ = ["LogOptions", "SqliteLog"]

_log = get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """Sizes and times of the embedded log."""

    flush_interval_s: float = 0.5
    """Seconds within which events of INTERVAL topics are on the disk."""

    retention_interval_s: float = 10.0
    """Seconds between sweeps of retention."""

    window_ids: int = 50_000
    """Newest ids that a topic remembers for certain; at most twice as many are kept."""

    group_events: int = 8192
    """Events beyond which a group takes on no further batch."""

    group_bytes: int = 8 << 20
    """Bytes beyond which a group takes on no further batch."""

    pending_bytes: int = 32 << 20
    """Bytes waiting for the writer beyond which publishers are held back; low events are shed at half of it."""

    pending_events: int = 65_536
    """Events waiting for the writer beyond which publishers are held back; low events are shed at half of it."""

    cache_bytes: int = 64 << 20
    """Newest events kept in memory for those who read along."""

    read_bytes: int = 1 << 20
    """Bytes beyond which one read takes no further chunk."""

    checkpoint_bytes: int = 16 << 20
    """Size of the write-ahead log beyond which it is moved into the file."""

    wal_bytes: int = 256 << 20
    """Size of the write-ahead log beyond which writing pauses until it is moved."""

    max_log_bytes: int = 0
    """Largest size of the file; 0 is unlimited."""

    min_free_bytes: int = 0
    """Free disk space that appends leave alone, so that retention and positions still find room."""

    full_retry_s: float = 5.0
    """Seconds that a publisher is asked to wait when the log is full."""


@dataclass(slots=True)
class _Batch:
    topic: str
    events: Sequence[NewEvent]
    size: int
    low: bool
    future: "asyncio.Future[Appended]"


class SqliteLog:
    """`store.LogStore` over one SQLite file.

    Args:
        path: the file; its directory exists.
        options: sizes and times.
        clock_us: microseconds since the epoch.
    """

    def __init__(
        self, path: Path, options: LogOptions, *, clock_us: Callable[[], int] = lambda: time.time_ns() // 1000
    ) -> None:
        self.on_append: Callable[[str], None] = lambda _topic: None
        self._path = path
        self._options = options
        self._clock_us = clock_us
        self._last_us = 0
        limits = {
            "max_bytes": options.max_log_bytes,
            "min_free_bytes": options.min_free_bytes,
            "wal_bytes": options.checkpoint_bytes,
        }
        self._writing, self._reading, self._moving = Database(path, **limits), Database(path), Database(path)
        self._threads = {
            id(db): ThreadPoolExecutor(1, thread_name_prefix=f"oona-{name}")
            for db, name in ((self._writing, "writer"), (self._reading, "reader"), (self._moving, "checkpoint"))
        }
        self._specs: dict[str, TopicSpec] = {}
        self._states: dict[str, TopicState] = {}
        self._rows: dict[str, list[PartitionRow]] = {}
        self._groups: dict[tuple[str, str], Sequence[GroupPosition]] = {}
        self._cache = TailCache(options.cache_bytes)
        self._pending: deque[_Batch] = deque()
        self._pending_bytes = 0
        self._pending_events = 0
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Open or create the file, remember the newest ids, start the writer."""
        await self._on(self._writing, self._writing.open)
        await self._on(self._reading, partial(self._reading.open, readonly=True))
        await self._on(self._moving, self._moving.open)
        for spec, rows in await self._on(self._writing, self._writing.load_topics):
            ids = await self._on(self._writing, self._writing.newest_ids, rows, self._options.window_ids)
            self._know(spec, rows, dict(ids))
        for (topic, group), found in (await self._on(self._writing, self._writing.load_positions)).items():
            firsts = [row.first for row in self._rows[topic]]
            self._groups[topic, group] = [found.get(n, GroupPosition(first)) for n, first in enumerate(firsts)]
        await self._tried(self._checkpoint)  # of what a crash left behind
        self._tasks = [asyncio.create_task(self._commit_loop()), asyncio.create_task(self._upkeep_loop())]

    async def close(self) -> None:
        """Store what was accepted, flush, close the file."""
        self._closing = True
        self._work.set()
        if self._tasks:
            committing, upkeep = self._tasks
            await committing
            upkeep.cancel()
            await asyncio.gather(upkeep, return_exceptions=True)
            try:
                await self._on(self._writing, self._writing.flush)
            except EsperError as error:
                _log.warning("log closed without a last flush", reason=error.reason, private=error.private)
        self._room.set()
        for db in (self._moving, self._reading, self._writing):
            await self._on(db, db.close)
            self._threads[id(db)].shutdown()

    def topics(self) -> Mapping[str, TopicSpec]:
        """Every topic by name."""
        return self._specs

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Store new topics, all or none."""
        made = await self._on(self._writing, self._writing.create_topics, specs)
        for spec, rows in zip(specs, made, strict=True):
            self._know(spec, rows, {})

    def append(self, topic: str, events: Sequence[NewEvent]) -> "asyncio.Future[Appended]":
        """Accept a batch for the next group."""
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        low = all(event.low for event in events)
        if topic not in self._specs:
            future.set_exception(topic_missing(topic))
        elif self._closing:
            future.set_exception(Unavailable("the log is closing", reason="LOG_CLOSED"))
        elif low and self._busy(0.5):
            future.set_exception(_shed("much is waiting to be stored"))
        else:
            batch = _Batch(topic, events, sum(len(e.data) for e in events), low, future)
            self._pending.append(batch)
            self._pending_bytes += batch.size
            self._pending_events += len(events)
            if self._busy(1.0):
                self._room.clear()
            self._work.set()
        return future

    async def room(self) -> None:
        """Return when little enough is waiting."""
        await self._room.wait()

    def extents(self, topic: str) -> Sequence[Extent]:
        """Extent of each partition."""
        following = self._states[topic].next
        return [Extent(row.number, row.first, following[row.number], row.size) for row in self._rows[topic]]

    def end(self, topic: str, partition: int) -> int:
        """Next offset of a partition."""
        return self._states[topic].next[partition]

    def tail(self, topic: str, partition: int, offset: int, most: int) -> Sequence[StoredEvent] | None:
        """Events from memory."""
        if offset >= self._states[topic].next[partition]:
            return ()
        return self._cache.get(topic, partition, offset, most)

    async def read(self, topic: str, partition: int, offset: int) -> Sequence[StoredEvent]:
        """Events from the file."""
        row = self._rows[topic][partition].row
        most = self._options.read_bytes
        return await self._on(self._reading, partial(self._reading.read, row, offset, max_bytes=most))

    async def offset_at(self, topic: str, partition: int, moment: datetime) -> int:
        """First offset stored at or after a moment."""
        row = self._rows[topic][partition].row
        end = self.end(topic, partition)
        found = await self._on(self._reading, self._reading.offset_at, row, int(moment.timestamp() * 1e6))
        return end if found is None else found

    def groups(self) -> Mapping[tuple[str, str], Sequence[GroupPosition]]:
        """Positions found when the log was opened."""
        return self._groups

    async def save_positions(self, positions: Mapping[tuple[str, str], Mapping[int, GroupPosition]]) -> None:
        """Persist positions, between two groups."""
        rows = [
            position_row(topic, group, number, position)
            for (topic, group), found in positions.items()
            for number, position in found.items()
        ]
        await self._on(self._writing, self._writing.save_positions, rows)

    # --- groups of batches ---

    async def _commit_loop(self) -> None:
        while not (self._closing and not self._pending):
            if not self._pending:
                self._work.clear()
                await self._work.wait()
                continue
            group = self._next_group()
            try:
                await self._commit(group)
            except EsperError as error:
                _fail(group, error)
            except Exception as error:  # noqa: BLE001  # logged, and told to those concerned
                # Whatever went wrong, the publishers of this group must hear of it and the next group gets its chance.
                _log.exception("group not stored")
                _fail(group, log_error(error, retry_after_s=self._options.full_retry_s))
            self._pending_bytes -= sum(batch.size for batch in group)
            self._pending_events -= sum(len(batch.events) for batch in group)
            if not self._busy(0.75):
                self._room.set()

    def _next_group(self) -> list[_Batch]:
        group = [self._pending.popleft()]
        size, count = group[0].size, len(group[0].events)
        while self._pending and size < self._options.group_bytes and count < self._options.group_events:
            batch = self._pending.popleft()
            group.append(batch)
            size += batch.size
            count += len(batch.events)
        return group

    async def _commit(self, group: list[_Batch]) -> None:
        staged = self._stage(group)
        if staged.chunks:
            rows = [chunk_row(self._rows[c.topic][c.partition].row, c) for c in staged.chunks]
            sync = any(self._specs[batch.topic].durability is Durability.SYNC for batch in group)
            await self._on(self._writing, partial(self._writing.write, rows, sync=sync))
            staged.commit(self._states)
            self._keep(staged)
        for batch, appended in zip(group, staged.results, strict=True):
            if not batch.future.done():  # its publisher may have gone
                batch.future.set_result(appended)
        for topic in {chunk.topic for chunk in staged.chunks}:
            self.on_append(topic)

    def _stage(self, group: list[_Batch]) -> Staged:
        # Time may be set back; store times may not go back, or a search by time would lie.
        self._last_us = max(self._last_us, self._clock_us())
        return stage(
            self._states,
            [(batch.topic, batch.events) for batch in group],
            store_us=self._last_us,
            chunk_events=2048,
            chunk_bytes=1 << 20,
        )

    def _keep(self, staged: Staged) -> None:
        for chunk in staged.chunks:
            self._cache.add(chunk)
            self._rows[chunk.topic][chunk.partition].size += chunk.size

    def _busy(self, share: float) -> bool:
        return (
            self._pending_bytes > self._options.pending_bytes * share
            or self._pending_events > self._options.pending_events * share
        )

    # --- upkeep ---

    async def _upkeep_loop(self) -> None:
        swept = time.monotonic()
        while True:
            await asyncio.sleep(self._options.flush_interval_s)
            await self._tried(partial(self._on, self._writing, self._writing.flush))
            if time.monotonic() - swept >= self._options.retention_interval_s and await self._tried(self.sweep):
                swept = time.monotonic()
            await self._tried(self._checkpoint)

    async def _tried(self, work: Callable[[], Awaitable[object]]) -> bool:
        """Do a piece of upkeep; False when it failed, and has to be tried again in the next round."""
        try:
            await work()
        except EsperError as error:
            # A full disk, most likely: publishers are told so.
            _log.warning("upkeep of the log failed", reason=error.reason, private=error.private)
        except Exception:  # noqa: BLE001  # logged with its traceback; without upkeep the log would grow for ever
            _log.exception("upkeep of the log failed")
        else:
            return True
        return False

    async def sweep(self) -> int:
        """Apply retention to every partition; return how many chunks were removed."""
        removed = 0
        now_us = self._clock_us()
        for name, spec in list(self._specs.items()):
            if not (spec.retention_s or spec.retention_bytes):
                continue
            before = now_us - spec.retention_s * 1_000_000 if spec.retention_s else 0
            for row in self._rows[name]:
                removed += await self._retain(name, spec, row, before)
        return removed

    async def _retain(self, name: str, spec: TopicSpec, row: PartitionRow, before_us: int) -> int:
        removed = 0
        while True:
            size, following = row.size, self.end(name, row.number)
            limits = {"before_us": before_us, "max_bytes": spec.retention_bytes, "size": size, "following": following}
            kept = await self._on(self._writing, partial(self._writing.retain, row.row, **limits))
            if kept is None:
                return removed
            first, left, count = kept
            row.first = first
            row.size += left - size  # what was appended meanwhile stays counted
            removed += count

    async def _checkpoint(self) -> None:
        """Move the write-ahead log into the file once it is larger than it should be, whatever made it so.

        A log that was moved is begun anew by the next write, which cuts the file down to `checkpoint_bytes` again.
        """
        if self._wal_size() <= self._options.checkpoint_bytes:
            return
        await self._on(self._moving, self._moving.checkpoint, "PASSIVE")
        if self._wal_size() > self._options.wal_bytes:
            # Constant writing never lets a passive checkpoint reach the end; little is left to move by now.
            await self._on(self._writing, self._writing.checkpoint, "TRUNCATE")

    def _wal_size(self) -> int:
        try:
            return self._path.with_name(self._path.name + "-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def _know(self, spec: TopicSpec, rows: list[PartitionRow], ids: dict[str, int]) -> None:
        window = IdWindow(self._options.window_ids)
        window.update(ids)
        self._specs[spec.name] = spec
        self._rows[spec.name] = rows
        self._states[spec.name] = TopicState(spec, [row.next for row in rows], window)
        self._last_us = max(self._last_us, *(row.store_us for row in rows))

    async def _on(self, db: Database, work: Callable[..., _T], *arguments: object) -> _T:
        """Run on the thread that owns a connection; SQLite's errors become ours."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads[id(db)], work, *arguments)
        except SqliteError as error:
            raise log_error(error, retry_after_s=self._options.full_retry_s) from error


def _shed(finding: str) -> LimitExceeded:
    return LimitExceeded(f"events of low priority were shed: {finding}", reason="SHED")


def _fail(group: Sequence[_Batch], error: EsperError) -> None:
    for batch in group:
        if not batch.future.done():
            # No retry for what may be shed: by the time there is room again, newer telemetry has come.
            batch.future.set_exception(
                _shed("the log has no room") if batch.low and error.reason == "LOG_FULL" else error
            )
