"""The vocabulary of the bus: events, topics, positions, and what a log answers."""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from esper.mesh.errors import InvalidInput, NotFound

__all__ = [
    "DEAD_SUFFIX",
    "MAX_NAME_BYTES",
    "Appended",
    "Durability",
    "Extent",
    "GroupPosition",
    "NewEvent",
    "Start",
    "StoredEvent",
    "TopicSpec",
    "check_topic_name",
    "topic_missing",
]

DEAD_SUFFIX = ".dead"
"""Ends the name of every dead-letter topic."""

MAX_NAME_BYTES = 100
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


class Durability(StrEnum):
    """When an event counts as stored."""

    SYNC = "sync"
    """After the fsync of its group."""

    INTERVAL = "interval"
    """Once committed to the operating system; on the disk within the flush interval."""


class Start(StrEnum):
    """Where a new group, or a reader without a group, begins."""

    EARLIEST = "earliest"
    LATEST = "latest"
    TIME = "time"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """Name and settings of a topic."""

    name: str
    """As `check_topic_name` demands."""

    partitions: int
    """1 to 256, fixed for life."""

    durability: Durability = Durability.SYNC
    """When its events count as stored."""

    max_attempts: int = 5
    """Deliveries of one event to a group before it becomes a dead letter; 1 to 1,000."""

    retention_s: int = 0
    """Seconds after which events may be removed; 0 keeps them for ever."""

    retention_bytes: int = 0
    """Payload bytes of one partition beyond which its oldest events may be removed; 0 is unlimited."""

    create_time: datetime
    """Aware UTC; no part of the settings that two specs are compared by."""

    @property
    def is_dead(self) -> bool:
        """Whether this is a dead-letter topic."""
        return self.name.endswith(DEAD_SUFFIX)

    def settings(self) -> tuple[object, ...]:
        """What must agree when a topic is made a second time."""
        return (self.partitions, self.durability, self.max_attempts, self.retention_s, self.retention_bytes)


# Events are named tuples, not frozen dataclasses: these two are made once per event on the hot path, and building a
# frozen dataclass costs four times as much.
class NewEvent(NamedTuple):
    """An event to store. The bus reads nothing of it but these fields."""

    id: str
    """Unique for ever; storing it twice within the topic's window stores it once."""

    key: str
    """Events of one key keep their order; empty for none."""

    data: bytes
    """The whole event as it will be delivered."""

    low: bool = False
    """May be shed when room is short."""


class StoredEvent(NamedTuple):
    """An event in the log."""

    partition: int
    offset: int
    id: str
    key: str
    data: bytes
    store_us: int
    """When it was stored: microseconds since the epoch; never decreases within a partition."""


@dataclass(frozen=True, slots=True)
class Appended:
    """Where the events of one batch are."""

    positions: tuple[tuple[int, int], ...]
    """(partition, offset) of each event, in the order of the batch."""

    duplicates: int
    """How many of them were stored before and not again."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Extent of one partition."""

    partition: int
    first: int
    """Offset of the oldest event kept; equals `next` when the partition is empty."""

    next: int
    """Offset that the next event will get."""

    size_bytes: int
    """Bytes of the events kept."""


@dataclass(frozen=True, slots=True)
class GroupPosition:
    """How far a group has come in one partition, in the form that survives a restart.

    Everything below `next` is done, except `pending`: the offsets that were delivered and not acknowledged.
    """

    next: int
    """First offset that was not delivered yet."""

    pending: tuple[tuple[int, int], ...] = ()
    """(offset, deliveries made so far), ascending by offset, each offset below `next`."""

    @property
    def watermark(self) -> int:
        """First offset that is not done."""
        return self.pending[0][0] if self.pending else self.next


def check_topic_name(name: str) -> None:
    """Refuse a name that clients may not give to a topic.

    Raises:
        InvalidInput: TOPIC_NAME_INVALID, or TOPIC_RESERVED for the name of a dead-letter topic.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES:
        raise InvalidInput(
            f"topic name {name[:120]!r}: expected 1 to {MAX_NAME_BYTES} lower case letters, digits, dots and hyphens, "
            "beginning with a letter or digit",
            reason="TOPIC_NAME_INVALID",
        )
    if name.endswith(DEAD_SUFFIX):
        raise InvalidInput(
            f"topic {name} is a dead-letter topic: expected a name that does not end in {DEAD_SUFFIX}; "
            "the server makes and fills these by itself",
            reason="TOPIC_RESERVED",
            metadata={"topic": name},
        )


def topic_missing(topic: str) -> NotFound:
    """The error for a topic that nobody made."""
    return NotFound(
        f"no topic {topic}: expected one that ListTopics shows, or CreateTopic first",
        reason="TOPIC_NOT_FOUND",
        metadata={"topic": topic},
    )
