"""The seam between the bus and whatever keeps its events: the embedded edition is `sqlite_log.SqliteLog`.

Every edition promises: a batch is stored whole or not at all; an event that `tail` or `read` gives is as durable as its
topic promises; offsets of a partition are consecutive from 0; ids are remembered for a window that the edition states;
positions never run ahead of the events that they speak of.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from esper.oona.records import Appended, Extent, GroupPosition, NewEvent, StoredEvent, TopicSpec

__all__ = ["LogStore"]


class LogStore(Protocol):
    """A durable log of topics, and the positions of their groups. Used from one event loop, which it never blocks."""

    on_append: Callable[[str], None]
    """Called with the topic's name whenever events of it became readable; set by the broker before `open`."""

    async def open(self) -> None:
        """Open or create the log.

        Raises:
            Corrupt: the files are not a log of this edition.
        """

    async def close(self) -> None:
        """Finish what was accepted, make everything durable, let go. May follow a failed `open`."""

    def topics(self) -> Mapping[str, TopicSpec]:
        """Every topic by name."""

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Store new topics, all or none; the names must be free."""

    def append(self, topic: str, events: Sequence[NewEvent]) -> asyncio.Future[Appended]:
        """Accept a batch at once; the future ends when it is as durable as its topic promises.

        Batches are stored in the order in which they are given. A batch of `low` events only is shed while much is
        waiting; others are always accepted, so whoever appends awaits `room` before taking on more.

        The future raises:
            LimitExceeded: LOG_FULL with a time to wait; SHED for a batch of low events that found no room.
            NotFound: TOPIC_NOT_FOUND.
            Unavailable: the log is closing or cannot be written.
        """

    async def room(self) -> None:
        """Return when little enough is waiting to take on another batch."""

    def extents(self, topic: str) -> Sequence[Extent]:
        """Extent of each partition."""

    def end(self, topic: str, partition: int) -> int:
        """Next offset of a partition."""

    def tail(self, topic: str, partition: int, offset: int, most: int) -> Sequence[StoredEvent] | None:
        """Events from an offset on, if they are in memory; empty at the end of the log; None to ask `read` instead."""

    async def read(self, topic: str, partition: int, offset: int) -> Sequence[StoredEvent]:
        """Some events from an offset on (more if retention removed that one), a bounded number; empty at the end.

        Raises:
            Corrupt: stored bytes are not those that were written.
        """

    async def offset_at(self, topic: str, partition: int, moment: datetime) -> int:
        """Offset of the first event stored at or after a moment; the next offset when there is none."""

    def groups(self) -> Mapping[tuple[str, str], Sequence[GroupPosition]]:
        """(topic, group) -> position in each partition, as persisted when the log was opened."""

    async def save_positions(self, positions: Mapping[tuple[str, str], Mapping[int, GroupPosition]]) -> None:
        """Persist positions: (topic, group) -> partition -> position. Creates groups that are new.

        Raises:
            LimitExceeded: no room; nothing changed.
        """
