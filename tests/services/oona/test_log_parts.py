"""The small parts of the log: partitioner, codec, window of ids, tail cache, sequencer, names."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.mesh.errors import Corrupt, InvalidInput
from esper.oona.codec import pack, pack_pairs, unpack, unpack_pairs
from esper.oona.partitioner import partition_of
from esper.oona.records import GroupPosition, NewEvent, StoredEvent, TopicSpec, check_topic_name
from esper.oona.sequencer import Chunk, TopicState, stage
from esper.oona.tail import TailCache
from esper.oona.window import IdWindow, from_place, to_place


def test_partitions_of_known_keys_never_change():
    """The hash is part of the format: these partitions hold for ever, in every process."""
    assert [3, 9, 14, 0] == [partition_of(key, "id", 16) for key in ("run-1", "run-2", "é", "")]


@given(st.text(max_size=20), st.text(min_size=1, max_size=20), st.integers(1, 256))
def test_partition_is_in_range_and_follows_the_key(key, event_id, partitions):
    """A key decides alone; without one the id does."""
    partition = partition_of(key, event_id, partitions)
    assert 0 <= partition < partitions
    assert partition == partition_of(key, event_id if not key else "other", partitions)


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_packing_round_trips(parts):
    """What is packed comes back."""
    assert parts == unpack(pack(parts))


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=20), st.data())
def test_torn_packing_is_refused(parts, data):
    """Any prefix of a packed list is found out."""
    packed = pack(parts)
    with pytest.raises(Corrupt, match="packed list"):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))] if any(parts) else packed + b"x")


@given(st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 1000)), max_size=20))
def test_pairs_round_trip(pairs):
    """Pairs of numbers come back."""
    assert tuple(pairs) == unpack_pairs(pack_pairs(pairs))


def test_window_remembers_at_least_its_size_and_at_most_twice():
    """The newest ids are always known, and memory is bounded."""
    window = IdWindow(10)
    for number in range(95):
        window.update({f"id-{number}": to_place(255, number)})
        assert all(from_place(window.get(f"id-{n}")) == (255, n) for n in range(max(0, number - 9), number + 1))
        assert len(window) <= 20
    assert window.get("id-0") is None


def test_window_of_size_zero_remembers_nothing():
    """The window can be switched off."""
    window = IdWindow(0)
    window.update({"a": 0})
    assert window.get("a") is None


def chunk(partition, base, count, *, size=100, topic="t"):
    """A chunk of consecutive events."""
    return Chunk(topic, partition, base, 5, [str(base + n) for n in range(count)], [""] * count, [bytes(size)] * count)


def test_tail_gives_events_of_one_chunk():
    """A reader gets what follows its offset, chunk by chunk; None for what has left or is not there yet."""
    cache = TailCache(1 << 20)
    assert cache.get("t", 0, 0, 9) is None
    for base in (10, 13, 20):
        cache.add(chunk(0, base, {10: 3, 13: 7, 20: 2}[base]))
    assert cache.get("t", 0, 9, 9) is None
    assert [11, 12] == [e.offset for e in cache.get("t", 0, 11, 9)]
    assert [13, 14] == [e.offset for e in cache.get("t", 0, 13, 2)]
    assert [StoredEvent(0, 21, "21", "", bytes(100), 5)] == cache.get("t", 0, 21, 2)
    assert cache.get("t", 0, 22, 2) is None
    assert cache.get("t", 1, 10, 2) is None


def test_tail_is_bounded():
    """The oldest chunk leaves first, whoever it belongs to; the newest stays even when it is too large."""
    cache = TailCache(3000)
    cache.add(chunk(0, 0, 4))
    cache.add(chunk(1, 0, 4))
    assert cache.get("t", 0, 0, 1) is not None
    cache.add(chunk(1, 4, 4))
    assert cache.get("t", 0, 0, 1) is None
    assert cache.get("t", 1, 0, 1) is not None
    cache.add(chunk(1, 8, 100))
    assert cache.get("t", 1, 4, 1) is None
    assert cache.get("t", 1, 8, 1) is not None


def states(*, partitions=2, window=100):
    """State of an empty log."""
    spec = TopicSpec(name="t", partitions=partitions, create_time=datetime.now(UTC))
    return {"t": TopicState(spec, [0] * partitions, IdWindow(window))}


def new(identity, key="k", data=b"data"):
    """An event to store."""
    return NewEvent(identity, key, data)


def staged(topics, *batches, chunk_events=100, chunk_bytes=1 << 20):
    """Batches, staged."""
    return stage(topics, [("t", b) for b in batches], store_us=5, chunk_events=chunk_events, chunk_bytes=chunk_bytes)


def test_staging_counts_only_when_committed():
    """A group that could not be written leaves offsets and ids free."""
    topics = states(partitions=1)
    staged(topics, [new("a"), new("b")])
    group = staged(topics, [new("b")])
    assert ((0, 0),) == group.results[0].positions
    group.commit(topics)
    assert [1] == topics["t"].next
    assert 1 == staged(topics, [new("b")]).results[0].duplicates


def test_duplicates_within_a_group_are_stored_once():
    """The same id in one batch, or in two batches of a group, is one event with one position."""
    group = staged(states(partitions=1), [new("a"), new("a")], [new("b"), new("a")])
    assert [(((0, 0), (0, 0)), 1), (((0, 1), (0, 0)), 1)] == [(r.positions, r.duplicates) for r in group.results]
    assert [0, 1] == [e.offset for c in group.chunks for e in c.events(0, 99)]


def test_chunks_are_bounded():
    """Chunks end at their number of events and at their bytes; an event larger than that has one to itself."""
    events = [new(str(n), data=bytes(10)) for n in range(5)]
    group = staged(states(partitions=1), events, chunk_events=2)
    assert [(0, 1), (2, 3), (4, 4)] == [(c.base, c.last) for c in group.chunks]
    group = staged(states(partitions=1), events, chunk_bytes=25)
    assert [2, 2, 1] == [len(c.ids) for c in group.chunks]
    group = staged(states(partitions=1), events, chunk_bytes=1)
    assert [10] * 5 == [c.size for c in group.chunks]


@pytest.mark.parametrize("name", ["", "Upper", "-a", ".a", "a_b", "a b", "x" * 101, "é"])
def test_unlawful_names(name):
    """Names outside the contract are refused with the rule in the text."""
    with pytest.raises(InvalidInput, match="1 to 100 lower case letters") as caught:
        check_topic_name(name)
    assert "TOPIC_NAME_INVALID" == caught.value.reason


def test_lawful_and_reserved_names():
    """Names of dead-letter topics belong to the server."""
    check_topic_name("run-events.v2")
    with pytest.raises(InvalidInput, match="dead-letter topic") as caught:
        check_topic_name("run-events.dead")
    assert "TOPIC_RESERVED" == caught.value.reason


def test_watermark():
    """The watermark is the first offset that is not done."""
    assert 4 == GroupPosition(9, ((4, 1), (7, 2))).watermark
    assert 9 == GroupPosition(9).watermark
