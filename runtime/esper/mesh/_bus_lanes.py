"""What a publisher has under way: lanes of events, and the batches that leave them."""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esper.v1 import event_pb2, oona_service_pb2

if TYPE_CHECKING:
    import asyncio

    from esper.mesh._bus_terms import StoredAt

__all__ = ["Batch", "Entry", "Lane", "size_of"]

_OVERHEAD = 256
"""Bytes that an event costs beside its own, roughly: more in memory than on the wire."""


def size_of(event: event_pb2.Event) -> int:
    """Bytes that an event counts for; more than it takes in a request, whatever its topic."""
    return event.ByteSize() + _OVERHEAD


@dataclass(slots=True, eq=False)
class Entry:
    """One event, and who waits for it."""

    event: event_pb2.Event
    size: int
    future: "asyncio.Future[StoredAt] | None" = None


@dataclass(slots=True, eq=False)
class Batch:
    """Events that travel together."""

    number: int
    entries: list[Entry]
    written: bool = False


@dataclass(slots=True, eq=False)
class Lane:
    """Events of one topic and one class, in order.

    One batch is under way at a time: with two, an answer that asks to send the first again would come too late to keep
    the order. While one is under way the next one fills up.
    """

    topic: str
    low: bool
    waiting: deque[Entry] = field(default_factory=deque)
    size: int = 0
    batch: Batch | None = None
    not_before: float = 0.0

    def fill(self, most_events: int, most_bytes: int) -> list[Entry]:
        """Take the oldest events that wait: as many as the bounds allow, or one that is larger than them."""
        entries: list[Entry] = []
        size = 0
        while self.waiting and len(entries) < most_events:
            if entries and size + self.waiting[0].size > most_bytes:
                break
            entry = self.waiting.popleft()
            size += entry.size
            entries.append(entry)
        self.size -= size
        return entries

    def split(self, batch: Batch, most_bytes: int) -> None:
        """Put at least half of a batch, and what is beyond the bound, back in front of what waits."""
        keep = len(batch.entries) // 2
        while keep > 1 and sum(entry.size for entry in batch.entries[:keep]) > most_bytes:
            keep //= 2
        batch.entries, rest = batch.entries[:keep], batch.entries[keep:]
        self.waiting.extendleft(reversed(rest))
        self.size += sum(entry.size for entry in rest)

    def request(self, batch: Batch) -> oona_service_pb2.PublishRequest:
        """The batch as a message."""
        request = oona_service_pb2.PublishRequest(topic=self.topic, batch=batch.number)
        request.events.extend(entry.event for entry in batch.entries)
        return request
