from math import inf

from esper.oona.cursor import Cursor
from esper.oona.records import GroupPosition, StoredEvent


def stored(offset, key="", data=b"x"):
    """An event as the log gives it."""
    return StoredEvent(0, offset, f"id-{offset}", key, data, 0)


def fed(*keys, limit=100):
    """A cursor that has read one event per key."""
    cursor = Cursor(0, GroupPosition(0), limit=limit)
    cursor.feed(stored(offset, key) for offset, key in enumerate(keys))
    return cursor


def offsets(items):
    """Their offsets."""
    return [item.offset for item in items]


def test_takes_in_order():
    """Fresh events come in order of offset, no more than asked for."""
    cursor = fed("a", "b", "a")
    assert [0, 1] == offsets(cursor.take(0.0, 2))
    assert [2] == offsets(cursor.take(0.0, 9))
    assert [] == cursor.take(0.0, 9)
    assert 3 == cursor.in_flight


def test_takes_no_more_bytes_than_asked_for():
    """What does not fit is the first of the next batch, whether it is fresh or due again; a large event comes alone."""
    cursor = Cursor(0, GroupPosition(0), limit=100)
    cursor.feed(stored(offset, data=bytes(size)) for offset, size in enumerate((4, 5, 3, 20, 1)))
    first = cursor.take(0.0, 9, most_bytes=10)
    assert [0, 1] == offsets(first)
    for item in first:
        cursor.retry(item, 1.0)
    assert [] == cursor.take(1.0, 9, most_bytes=3, first=False)
    assert 1.0 == cursor.next_due()
    assert [0] == offsets(cursor.take(1.0, 9, most_bytes=8))
    assert [1, 2] == offsets(cursor.take(1.0, 9, most_bytes=8))
    assert [] == cursor.take(1.0, 9, most_bytes=19, first=False)
    assert [3] == offsets(cursor.take(1.0, 9, most_bytes=19))
    assert [4] == offsets(cursor.take(1.0, 9, most_bytes=19))


def test_waiting_event_blocks_its_key_only():
    """While an event waits for redelivery later ones of its key wait too, those of other keys and of none do not."""
    cursor = fed("a", "a", "b", "", "a")
    first = cursor.take(0.0, 1)[0]
    cursor.retry(first, 5.0)
    assert [2, 3] == offsets(cursor.take(0.0, 9))
    assert 5.0 == cursor.next_due()
    assert [] == cursor.take(4.9, 9)
    again = cursor.take(5.0, 9)
    assert [0, 1, 4] == offsets(again)
    assert [2, 1, 1] == [item.attempts for item in again]


def test_events_returned_out_of_order_come_in_order():
    """Several failed events of one key are delivered again by offset, whatever order they failed in."""
    cursor = fed("a", "a", "a")
    one, two, three = cursor.take(0.0, 3)
    cursor.retry(three, 1.0)
    cursor.retry(one, 2.0)
    cursor.retry(two, 0.5)
    assert [] == cursor.take(1.5, 9)
    assert [0, 1, 2] == offsets(cursor.take(2.0, 9))


def test_events_without_key_do_not_block_each_other():
    """A failed event without a key waits alone."""
    cursor = fed("", "")
    one, two = cursor.take(0.0, 2)
    cursor.retry(one, 9.0)
    cursor.retry(two, 1.0)
    assert [1] == offsets(cursor.take(1.0, 9))


def test_held_event_blocks_until_buried():
    """An event without an attempt left holds its key back until its dead letter is stored."""
    cursor = fed("a", "a")
    first = cursor.take(0.0, 1)[0]
    cursor.hold(first)
    assert [] == cursor.take(1e9, 9)
    assert inf == cursor.next_due()
    assert 2 == cursor.lag(2)
    cursor.buried(first)
    assert [1] == offsets(cursor.take(0.0, 9))
    assert 1 == cursor.lag(2)


def test_buried_event_behind_another():
    """A dead event that is not the oldest of its key leaves without disturbing the queue."""
    cursor = fed("a", "a", "a")
    one, two = cursor.take(0.0, 2)
    cursor.retry(one, 1.0)
    cursor.hold(two)
    cursor.buried(two)
    assert [0, 2] == offsets(cursor.take(1.0, 9))


def test_room_is_bounded():
    """What is read and not done counts against the limit."""
    cursor = fed("a", "b", "c", limit=4)
    assert 1 == cursor.room()
    cursor.done(cursor.take(0.0, 1)[0])
    assert 2 == cursor.room()
    assert 2 == cursor.buffered()


def test_room_is_bounded_in_bytes_too():
    """Bytes read and not done count until the event is done or buried, whatever became of it meanwhile."""
    cursor = Cursor(0, GroupPosition(0), limit=100, limit_bytes=10)
    cursor.feed(stored(offset, data=bytes(5)) for offset in range(2))
    assert (0, 10) == (cursor.room(), cursor.buffered_bytes)
    one, two = cursor.take(0.0, 9)
    assert (0, 0) == (cursor.room(), cursor.buffered_bytes)
    cursor.retry(one, 5.0)
    assert 0 == cursor.room()
    cursor.done(two)
    assert 99 == cursor.room()
    cursor.feed([stored(2, data=bytes(5))])
    assert 0 == cursor.room()
    (one,) = cursor.take(5.0, 1)
    cursor.hold(one)
    assert 0 == cursor.room()
    cursor.buried(one)
    assert 99 == cursor.room()


def test_position_survives_a_restart():
    """A restored cursor delivers exactly what was not done, with attempts counted on."""
    cursor = fed("a", "b", "c", "d", "e")
    items = cursor.take(0.0, 4)
    cursor.done(items[0])
    cursor.done(items[2])
    cursor.retry(items[3], 1.0)
    position = cursor.position()
    assert GroupPosition(4, ((1, 1), (3, 1))) == position
    assert 1 == position.watermark

    again = Cursor(0, position, limit=100)
    assert 1 == again.fetch
    assert 3 + 2 == again.lag(7)
    again.feed(stored(offset, "k") for offset in range(1, 7))
    assert 5 == again.lag(7)
    taken = again.take(0.0, 9)
    assert [1, 3, 4, 5, 6] == offsets(taken)
    assert [2, 2, 1, 1, 1] == [item.attempts for item in taken]


def test_position_in_the_middle_of_a_restart():
    """A position taken before everything pending was read again still names all of it."""
    cursor = Cursor(0, GroupPosition(9, ((2, 1), (5, 3), (7, 1))), limit=100)
    cursor.feed([stored(2), stored(3), stored(5)])
    assert GroupPosition(9, ((2, 1), (5, 3), (7, 1))) == cursor.position()
    cursor.done(cursor.take(0.0, 1)[0])
    assert GroupPosition(9, ((5, 3), (7, 1))) == cursor.position()


def test_skipping_what_retention_removed():
    """Unread events that are gone count as lost once, done ones do not, and reading goes on behind them."""
    cursor = Cursor(0, GroupPosition(6, ((2, 1), (4, 1))), limit=100)
    assert 2 + 2 == cursor.skip_to(8)
    assert 0 == cursor.skip_to(3)
    assert 8 == cursor.fetch
    assert 2 == cursor.lag(10)
    cursor.feed([stored(7), stored(8)])
    assert [8] == offsets(cursor.take(0.0, 9))


def test_dirty_follows_changes():
    """A cursor says when its position has changed."""
    cursor = fed("a")
    assert not cursor.dirty
    item = cursor.take(0.0, 1)[0]
    assert cursor.dirty
    cursor.dirty = False
    cursor.done(item)
    assert cursor.dirty
