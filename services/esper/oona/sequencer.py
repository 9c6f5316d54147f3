"""Turns waiting batches into one group: finds duplicates, gives out offsets, gathers events by partition.

Nothing that is staged counts until `commit`: a group that could not be written is simply forgotten, and its offsets and
ids are as free as before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from esper.oona.partitioner import partition_of
from esper.oona.records import Appended, NewEvent, StoredEvent, TopicSpec
from esper.oona.window import IdWindow

__all__ = ["Chunk", "Staged", "TopicState", "stage"]


@dataclass(slots=True)
class TopicState:
    """What the log knows about a topic while it is open."""

    spec: TopicSpec
    next: list[int]
    """Next offset of each partition."""

    window: IdWindow
    """Ids remembered."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Events of one partition that are stored together: consecutive offsets, one store time."""

    topic: str
    partition: int
    events: Sequence[StoredEvent]

    @property
    def base(self) -> int:
        """Offset of the first event."""
        return self.events[0].offset

    @property
    def last(self) -> int:
        """Offset of the last event."""
        return self.events[-1].offset

    @property
    def size(self) -> int:
        """Bytes of the events."""
        return sum(len(e.data) for e in self.events)


@dataclass(slots=True)
class Staged:
    """One group, ready to be written."""

    chunks: list[Chunk] = field(default_factory=list)
    """In order of offset within each partition."""

    results: list[Appended] = field(default_factory=list)
    """One per batch, in order."""

    _next: dict[str, list[int]] = field(default_factory=dict)
    _ids: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def commit(self, topics: dict[str, TopicState]) -> None:
        """Make the group count: it is stored."""
        for name, offsets in self._next.items():
            topics[name].next = offsets
            topics[name].window.update(self._ids[name])


def stage(
    topics: dict[str, TopicState],
    batches: Iterable[tuple[str, Sequence[NewEvent]]],
    *,
    store_us: int,
    chunk_events: int,
    chunk_bytes: int,
) -> Staged:
    """Stage batches of (topic, events), in order.

    Args:
        topics: state of every topic named.
        batches: what to store.
        store_us: store time of the group.
        chunk_events: most events of one chunk.
        chunk_bytes: bytes beyond which a chunk is not continued.
    """
    staged = Staged()
    fresh: dict[tuple[str, int], list[StoredEvent]] = {}
    for topic, events in batches:
        state = topics[topic]
        if topic not in staged._next:  # noqa: SLF001  # our own value, being built
            staged._next[topic] = list(state.next)  # noqa: SLF001
            staged._ids[topic] = {}  # noqa: SLF001
        staged.results.append(
            _place(state, events, staged._next[topic], staged._ids[topic], fresh, store_us)  # noqa: SLF001
        )
    for (topic, partition), stored in fresh.items():
        staged.chunks.extend(Chunk(topic, partition, part) for part in _cut(stored, chunk_events, chunk_bytes))
    return staged


def _place(
    state: TopicState,
    events: Sequence[NewEvent],
    offsets: list[int],
    ids: dict[str, tuple[int, int]],
    fresh: dict[tuple[str, int], list[StoredEvent]],
    store_us: int,
) -> Appended:
    name, partitions, known = state.spec.name, state.spec.partitions, state.window.get
    positions: list[tuple[int, int]] = []
    duplicates = 0
    for event in events:
        place = known(event.id) or ids.get(event.id)
        if place is None:
            partition = partition_of(event.key, event.id, partitions)
            offset = offsets[partition]
            offsets[partition] = offset + 1
            place = ids[event.id] = (partition, offset)
            stored = StoredEvent(partition, offset, event.id, event.key, event.data, store_us)
            fresh.setdefault((name, partition), []).append(stored)
        else:
            duplicates += 1
        positions.append(place)
    return Appended(tuple(positions), duplicates)


def _cut(events: list[StoredEvent], most: int, most_bytes: int) -> Iterable[list[StoredEvent]]:
    begin, size = 0, 0
    for index, event in enumerate(events):
        if index > begin and (index - begin >= most or size + len(event.data) > most_bytes):
            yield events[begin:index]
            begin, size = index, 0
        size += len(event.data)
    yield events[begin:]
