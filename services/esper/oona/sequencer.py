"""Turns waiting batches into one group: finds duplicates, gives out offsets, gathers events by partition.

Nothing that is staged counts until `commit`: a group that could not be written is simply forgotten, and its offsets and
ids are as free as before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from esper.oona.partitioner import partition_of
from esper.oona.records import Appended, NewEvent, StoredEvent, TopicSpec
from esper.oona.window import IdWindow, from_place, to_place

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
    """Events of one partition that are stored together: consecutive offsets, one store time.

    Columns instead of one object per event: thousands of chunks stay in memory, and the garbage collector would walk
    through every object in them (measured: pauses of 100 to 300 ms), but never looks into strings.
    """

    topic: str
    partition: int
    base: int
    """Offset of the first event."""
    store_us: int
    ids: list[str]
    keys: list[str]
    data: list[bytes]

    @property
    def last(self) -> int:
        """Offset of the last event."""
        return self.base + len(self.ids) - 1

    @property
    def size(self) -> int:
        """Bytes of the events."""
        return sum(map(len, self.data))

    def events(self, begin: int, end: int) -> list[StoredEvent]:
        """The events from one place in the chunk up to another, which may lie beyond its end."""
        columns = zip(self.ids[begin:end], self.keys[begin:end], self.data[begin:end], strict=True)
        return [
            StoredEvent(self.partition, offset, name, key, data, self.store_us)
            for offset, (name, key, data) in enumerate(columns, self.base + begin)
        ]


@dataclass(slots=True)
class Staged:
    """One group, ready to be written."""

    chunks: list[Chunk] = field(default_factory=list)
    """In order of offset within each partition."""

    results: list[Appended] = field(default_factory=list)
    """One per batch, in order."""

    offsets: dict[str, list[int]] = field(default_factory=dict)
    """Topic -> next offset of each partition, once the group is stored."""

    ids: dict[str, dict[str, int]] = field(default_factory=dict)
    """Topic -> id -> place of what is new."""

    def commit(self, topics: dict[str, TopicState]) -> None:
        """Make the group count: it is stored."""
        for name, offsets in self.offsets.items():
            topics[name].next = offsets
            topics[name].window.update(self.ids[name])


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
    fresh: dict[tuple[str, int], list[NewEvent]] = {}
    for topic, events in batches:
        if topic not in staged.offsets:
            staged.offsets[topic] = list(topics[topic].next)
            staged.ids[topic] = {}
        staged.results.append(_place(topics[topic], events, staged.offsets[topic], staged.ids[topic], fresh))
    for (topic, partition), stored in fresh.items():
        base = topics[topic].next[partition]
        for part in _cut(stored, chunk_events, chunk_bytes):
            ids, keys, data = [e.id for e in part], [e.key for e in part], [e.data for e in part]
            staged.chunks.append(Chunk(topic, partition, base, store_us, ids, keys, data))
            base += len(part)
    return staged


def _place(
    state: TopicState,
    events: Sequence[NewEvent],
    offsets: list[int],
    ids: dict[str, int],
    fresh: dict[tuple[str, int], list[NewEvent]],
) -> Appended:
    known = len(ids)
    # The hottest loop of the bus, once per event: look-ups are bound outside of it, and a key is hashed once per batch.
    name, partitions = state.spec.name, state.spec.partitions
    young, old = state.window.generations()
    by_key: dict[str, int] = {}
    positions: list[tuple[int, int]] = []
    for event in events:
        event_id, key = event.id, event.key
        place = ids.get(event_id)
        if place is None:
            place = young.get(event_id)
            if place is None:
                place = old.get(event_id)
        if place is not None:
            positions.append(from_place(place))
            continue
        partition = by_key.get(key) if key else None
        if partition is None:
            partition = by_key[key] = partition_of(key, event_id, partitions)
        offset = offsets[partition]
        offsets[partition] = offset + 1
        ids[event_id] = to_place(partition, offset)
        positions.append((partition, offset))
        waiting = fresh.get((name, partition))
        if waiting is None:
            waiting = fresh[name, partition] = []
        waiting.append(event)
    return Appended(tuple(positions), len(events) - (len(ids) - known))


def _cut(events: list[NewEvent], most: int, most_bytes: int) -> Iterable[list[NewEvent]]:
    if len(events) <= most and sum(len(event.data) for event in events) <= most_bytes:
        yield events
        return
    begin, size = 0, 0
    for index, event in enumerate(events):
        if index > begin and (index - begin >= most or size + len(event.data) > most_bytes):
            yield events[begin:index]
            begin, size = index, 0
        size += len(event.data)
    yield events[begin:]
