"""One consumer group in one partition: what is waiting, what is out, what blocks what.

An event goes: fed (read from the log) -> taken (delivered) -> done, or -> retry (waits for its time) -> taken -> ...
Order per key is kept by lanes: as long as an event of a key waits for redelivery or for its burial as a dead letter,
later events of that key queue up behind it. Events without a key block nobody.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf

from esper.oona.records import GroupPosition, StoredEvent

__all__ = ["Cursor", "Item"]


class Item:
    """One event on its way through a group."""

    __slots__ = ("attempts", "due", "event", "size")

    def __init__(self, event: StoredEvent, attempts: int = 0) -> None:
        self.event = event
        self.size = len(event.data)
        """Bytes of the event."""
        self.attempts = attempts
        """Deliveries made so far."""
        self.due = 0.0
        """When it may be delivered; infinite while it waits for its burial."""

    @property
    def offset(self) -> int:
        """Offset of the event."""
        return self.event.offset


class Cursor:
    """Progress of a group through one partition.

    Args:
        partition: number of the partition.
        position: where the group goes on.
        limit: events that may be read and not done; bounds memory, and how far a blocked key lets others run ahead.
        limit_bytes: their bytes beyond which no further event is read.
    """

    def __init__(self, partition: int, position: GroupPosition, *, limit: int, limit_bytes: float = inf) -> None:
        self.partition = partition
        self.in_flight = 0
        """Events delivered and awaiting an answer."""
        self.dirty = False
        """Whether the position has changed since `clean`."""
        self.fetch = position.watermark
        """Offset of the next event to read."""
        self.spent: list[Item] = []
        """Events held because the server went down during their last attempt; the group takes them from here."""
        self.buffered_bytes = 0
        """Bytes of the events read and never delivered."""
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._resume = dict(position.pending)
        self._resume_end = position.next
        self._outstanding: dict[int, Item] = {}
        self._buffer: deque[Item] = deque()
        self._lanes: dict[str | int, list[Item]] = {}
        self._timers: list[tuple[float, int, str | int]] = []

    def room(self) -> int:
        """How many more events may be fed."""
        return max(0, self._limit - len(self._outstanding)) if self._bytes < self._limit_bytes else 0

    def buffered(self) -> int:
        """Events read and never delivered."""
        return len(self._buffer)

    def feed(self, events: Iterable[StoredEvent]) -> None:
        """Take events read from the log, ascending from `fetch` or later; what lies between is gone by retention."""
        for event in events:
            offset = event.offset
            if offset < self.fetch:
                continue
            self.fetch = offset + 1
            attempts = 0
            if offset < self._resume_end:
                known = self._resume.pop(offset, None)
                if known is None:
                    continue  # done before the restart
                attempts = known
            item = Item(event, attempts)
            self._outstanding[offset] = item
            self._bytes += item.size
            self._buffer.append(item)
            self.buffered_bytes += item.size

    def skip_to(self, offset: int) -> int:
        """Give up unread events below an offset (retention removed them); return how many were never done."""
        if offset <= self.fetch:
            return 0
        lost = [o for o in self._resume if o < offset]
        for gone in lost:
            del self._resume[gone]
        unread = max(0, offset - max(self.fetch, self._resume_end))
        self.fetch = offset
        self.dirty = True
        return unread + len(lost)

    def take(
        self, now: float, most: int, max_attempts: int | None = None, *, most_bytes: float = inf, first: bool = True
    ) -> list[Item]:
        """Deliver what may be delivered now: events due again first, then fresh ones, until one has no room.

        An event that had its last attempt before the server went down is not delivered: it is held, before a later
        event of its key can be taken, and added to `spent`.

        Args:
            now: the present.
            most: events at most.
            max_attempts: deliveries that an event may have; None is any number.
            most_bytes: their bytes at most.
            first: an event larger than `most_bytes` may be taken if it is the only one: nothing else would ever be
                delivered behind it.
        """
        taken: list[Item] = []
        size = 0

        def fits(item: Item) -> bool:
            return size + item.size <= most_bytes or (first and not taken)

        while self._timers and len(taken) < most and self._timers[0][0] <= now:
            _, _, lane = self._timers[0]
            queue = self._lanes.get(lane)
            if queue and queue[0].due <= now:
                if not fits(queue[0]):
                    return taken
                heappop(self._timers)
                size += queue[0].size
                taken.append(self._deliver(queue.pop(0)))
                self._next_of(lane, queue)
            else:
                heappop(self._timers)
                if queue:
                    self._arm(lane, queue[0])
        lanes, buffer = self._lanes, self._buffer
        while buffer and len(taken) < most:
            item = buffer[0]
            if max_attempts is not None and item.attempts >= max_attempts:
                self._wait(self._next_fresh(), inf)
                self.spent.append(item)
                continue
            queue = lanes.get(item.event.key) if lanes and item.event.key else None
            if queue is not None:
                queue.append(self._next_fresh())
            elif fits(item):
                size += item.size
                taken.append(self._deliver(self._next_fresh()))
            else:
                break
        return taken

    def done(self, item: Item) -> None:
        """The event was handled."""
        self.in_flight -= 1
        self._finish(item)

    def retry(self, item: Item, due: float) -> None:
        """The event was not handled: deliver it again from `due` on; until then nothing of its key is delivered."""
        self.in_flight -= 1
        self._wait(item, due)

    def hold(self, item: Item) -> None:
        """The event has no attempt left: it blocks its key until `buried`."""
        self.retry(item, inf)

    def buried(self, item: Item) -> None:
        """The event, held before, is stored as a dead letter."""
        lane = item.event.key or item.offset
        queue = self._lanes[lane]
        queue.remove(item)
        self._next_of(lane, queue)
        self._finish(item)

    def next_due(self) -> float:
        """When the next waiting event may be delivered; infinite when none waits."""
        return self._timers[0][0] if self._timers else inf

    def lag(self, end: int) -> int:
        """Events below `end` (the partition's next offset) that are not done."""
        return max(0, end - max(self.fetch, self._resume_end)) + len(self._outstanding) + len(self._resume)

    def position(self) -> GroupPosition:
        """The position to persist."""
        begin = self._buffer[0].offset if self._buffer else self.fetch
        if begin >= self._resume_end:
            # The buffer is the contiguous tail of what was read: leaving it out keeps positions small.
            pending = ((o, i.attempts) for o, i in self._outstanding.items() if o < begin)
            return GroupPosition(begin, tuple(sorted(pending)))
        everything = {o: i.attempts for o, i in self._outstanding.items()} | self._resume
        return GroupPosition(max(self.fetch, self._resume_end), tuple(sorted(everything.items())))

    def _next_fresh(self) -> Item:
        item = self._buffer.popleft()
        self.buffered_bytes -= item.size
        return item

    def _deliver(self, item: Item) -> Item:
        item.attempts += 1
        item.due = 0.0
        self.in_flight += 1
        self.dirty = True
        return item

    def _wait(self, item: Item, due: float) -> None:
        item.due = due
        self.dirty = True
        lane = item.event.key or item.offset
        queue = self._lanes.setdefault(lane, [])
        insort(queue, item, key=_offset)
        if queue[0] is item and due < inf:
            self._arm(lane, item)

    def _finish(self, item: Item) -> None:
        del self._outstanding[item.event.offset]
        self._bytes -= item.size
        self.dirty = True

    def _next_of(self, lane: str | int, queue: list[Item]) -> None:
        if not queue:
            del self._lanes[lane]
        elif queue[0].due < inf:
            self._arm(lane, queue[0])

    def _arm(self, lane: str | int, head: Item) -> None:
        heappush(self._timers, (head.due, head.offset, lane))


def _offset(item: Item) -> int:
    return item.event.offset
