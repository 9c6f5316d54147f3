"""One consumer group: its members, who reads which partition, what is under way, and what becomes of failures.

Partitions are shared out evenly and stickily: who has one keeps it unless fairness demands otherwise. A partition
changes hands only when nothing of it is in flight with its old owner, so that an event is with one member at a time and
a key's order survives the change.

A member that let the time for an answer pass is silent: it gets no partition until it speaks again, because one that
hangs would keep its partitions, and all that is in them, for ever. Where everybody is silent all are served as before.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import ceil, inf

from esper.oona.cursor import Cursor, Item
from esper.oona.records import StoredEvent

__all__ = ["Delivered", "Exhausted", "Group", "Member", "RetryPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and when a failed event is delivered again."""

    max_attempts: int | None
    """Deliveries before an event becomes a dead letter; None in dead-letter topics: without end."""

    backoff_s: float = 0.5
    """Seconds before the second delivery; doubles with each further one."""

    backoff_max_s: float = 30.0
    """Longest wait, in seconds."""

    def delay_s(self, attempts: int) -> float:
        """Seconds to wait after this many deliveries."""
        return float(min(self.backoff_max_s, self.backoff_s * 2.0 ** min(attempts - 1, 30)))


@dataclass(frozen=True, slots=True)
class Delivered:
    """One event handed to a member."""

    delivery_id: int
    event: StoredEvent
    attempt: int
    """From 1."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    """An event without an attempt left; `Group.buried` ends it once it is stored as a dead letter."""

    cursor: Cursor
    item: Item
    cause: str
    """Why the last attempt failed."""


@dataclass(slots=True, eq=False)
class Member:
    """One subscriber of a group.

    `credit` is what it may still be given; it shrinks by each delivery and grows only by the member's word.
    """

    name: str
    ack_timeout_s: float
    credit: int
    in_flight: dict[int, tuple[Cursor, Item]] = field(default_factory=dict)
    deadlines: deque[tuple[float, int]] = field(default_factory=deque)
    """(deadline, last delivery id of the batch), ascending in both."""
    next_id: int = 1
    turn: int = 0
    """Rotates the partition that is served first."""
    silent: bool = False
    """Whether it let the time for an answer pass and has not spoken since."""


class Group:
    """State of one consumer group on one topic. Times are seconds of one monotonic clock.

    Args:
        cursors: one per partition, in order.
        policy: attempts and backoff.
        max_in_flight: deliveries of one member that may await an answer, whatever its credit.
    """

    def __init__(self, cursors: Sequence[Cursor], policy: RetryPolicy, *, max_in_flight: int) -> None:
        self.cursors = tuple(cursors)
        self.members: list[Member] = []
        self.exhausted: list[Exhausted] = []
        """Events to bury; the broker takes them from here."""
        self.redelivered = 0
        """Deliveries beyond the first, so far."""
        self._policy = policy
        self._max_in_flight = max_in_flight
        self._owner: list[Member | None] = [None] * len(self.cursors)
        self._target: list[Member | None] = [None] * len(self.cursors)
        self._changed = False

    def join(self, member: Member) -> None:
        """Add a member and share the partitions out anew."""
        self.members.append(member)
        self._rebalance()

    def leave(self, member: Member, now: float) -> None:
        """Remove a member; what it did not answer is delivered again at once, the attempt counted."""
        self.members.remove(member)
        for cursor, item in member.in_flight.values():
            self._failed(cursor, item, now, f"member {member.name or 'without name'} left without an answer")
        member.in_flight.clear()
        self._rebalance()

    def partitions_of(self, member: Member) -> list[int]:
        """Partitions that the member reads, or will as soon as their old owner has answered for them."""
        return [p for p, target in enumerate(self._target) if target is member]

    def readable(self, member: Member) -> list[Cursor]:
        """Cursors that the member may be served from now, beginning with another one each time."""
        own = [c for c in self.cursors if self._owner[c.partition] is member and not self._moving(c)]
        if len(own) > 1:
            member.turn = (member.turn + 1) % len(own)
            return own[member.turn :] + own[: member.turn]
        return own

    def room(self, member: Member) -> int:
        """How many events the member may be given now."""
        return max(0, min(member.credit, self._max_in_flight - len(member.in_flight)))

    def poll(self, member: Member, now: float, most: int, most_bytes: int) -> list[Delivered]:
        """Deliver what the member may have: at most `most` events of `most_bytes`, or one that is larger than that."""
        deliveries: list[Delivered] = []
        room = min(most, self.room(member))
        size = 0
        for cursor in self.readable(member):
            items = cursor.take(
                now,
                room - len(deliveries),
                self._policy.max_attempts,
                most_bytes=most_bytes - size,
                first=not deliveries,
            )
            for item in items:
                size += item.size
                number = member.next_id
                member.next_id = number + 1
                member.in_flight[number] = (cursor, item)
                self.redelivered += item.attempts > 1
                deliveries.append(Delivered(number, item.event, item.attempts))
            for item in cursor.spent:
                self.exhausted.append(Exhausted(cursor, item, "no answer before the server restarted"))
            cursor.spent.clear()
        if deliveries:
            member.credit -= len(deliveries)
            self._due_by(member, now + member.ack_timeout_s, deliveries[-1].delivery_id)
        return deliveries

    def grant(self, member: Member, credit: int) -> None:
        """The member may be given this many more events."""
        member.credit += credit
        self._heard(member)

    def ack(self, member: Member, delivery_ids: Iterable[int]) -> int:
        """The member has handled these; return how many were still its own to answer."""
        self._heard(member)
        known = 0
        pop = member.in_flight.pop
        for number in delivery_ids:
            found = pop(number, None)
            if found is not None:
                found[0].done(found[1])
                known += 1
        return known

    def nack(
        self, member: Member, delivery_ids: Iterable[int], now: float, *, reason: str = "", delay_s: float | None = None
    ) -> int:
        """The member has not handled these; return how many were still its own to answer.

        Args:
            member: who answers.
            delivery_ids: names of the deliveries.
            now: the present.
            reason: why; kept with the dead letter.
            delay_s: wait before delivering again; None means the policy's backoff.
        """
        self._heard(member)
        known = 0
        for number in delivery_ids:
            found = member.in_flight.pop(number, None)
            if found is not None:
                cursor, item = found
                wait = self._policy.delay_s(item.attempts) if delay_s is None else delay_s
                self._failed(cursor, item, now + wait, reason or "refused by the member")
                known += 1
        return known

    def expire(self, now: float) -> int:
        """Take back what was not answered in time; return how many. Their members are silent from now on."""
        count = 0
        fallen = False
        for member in self.members:
            overdue = self._overdue(member, now)
            for number in overdue:
                cursor, item = member.in_flight.pop(number)
                wait = self._policy.delay_s(item.attempts)
                self._failed(cursor, item, now + wait, f"no answer within {member.ack_timeout_s:g} s")
            if overdue and not member.silent:
                member.silent = fallen = True
            count += len(overdue)
        if fallen:
            self._rebalance()
        return count

    @staticmethod
    def _overdue(member: Member, now: float) -> list[int]:
        last = 0
        while member.deadlines and member.deadlines[0][0] <= now:
            _, last = member.deadlines.popleft()
        # Ids ascend and dictionaries keep their order: the overdue ones come first.
        return list(takewhile(last.__ge__, member.in_flight))

    def settle(self) -> bool:
        """Hand over partitions whose old owner has answered for everything; whether any changed hands since the last
        time.
        """  # noqa: D205  # one sentence of two lines
        self._hand_over()
        changed, self._changed = self._changed, False
        return changed

    def next_due(self) -> float:
        """When the next waiting event of a partition that somebody reads may be delivered; infinite when none waits."""
        return min((c.next_due() for c in self.cursors), default=inf)

    def lag(self, ends: Sequence[int]) -> int:
        """Events not done, given the next offset of each partition."""
        return sum(cursor.lag(end) for cursor, end in zip(self.cursors, ends, strict=True))

    def in_flight(self) -> int:
        """Deliveries awaiting an answer."""
        return sum(len(member.in_flight) for member in self.members)

    @staticmethod
    def _due_by(member: Member, deadline: float, last: int) -> None:
        # Rounded up to tenths of a second, so that an hour's timeout keeps 36,000 entries at most, not one per batch.
        deadline = ceil(deadline * 10) / 10
        if member.deadlines and member.deadlines[-1][0] >= deadline:
            deadline, _ = member.deadlines.pop()
        member.deadlines.append((deadline, last))

    def _failed(self, cursor: Cursor, item: Item, due: float, cause: str) -> None:
        if self._policy.max_attempts is not None and item.attempts >= self._policy.max_attempts:
            cursor.hold(item)
            self.exhausted.append(Exhausted(cursor, item, cause))
        else:
            cursor.retry(item, due)

    def _moving(self, cursor: Cursor) -> bool:
        return self._owner[cursor.partition] is not self._target[cursor.partition]

    def _hand_over(self) -> None:
        for cursor in self.cursors:
            if self._moving(cursor) and cursor.in_flight == 0:
                self._owner[cursor.partition] = self._target[cursor.partition]
                self._changed = True

    def _heard(self, member: Member) -> None:
        if member.silent:
            member.silent = False
            self._rebalance()

    def _rebalance(self) -> None:
        """Share out: nobody has two partitions more than another, and as few as possible change hands."""
        # An owner who has gone answers for nothing any more.
        self._owner = [owner if owner in self.members else None for owner in self._owner]
        takers = [member for member in self.members if not member.silent] or self.members
        self._target = [owner if owner in takers else None for owner in self._target]
        if takers:
            self._share_out(takers)
        self._hand_over()

    def _share_out(self, takers: Sequence[Member]) -> None:
        low, extra = divmod(len(self.cursors), len(takers))
        load = {id(m): self._target.count(m) for m in takers}
        # The members with most keep the larger shares; ties go to those who came first.
        order = sorted(takers, key=lambda m: -load[id(m)])
        share = {id(m): low + (place < extra) for place, m in enumerate(order)}
        for partition in reversed(range(len(self._target))):
            target = self._target[partition]
            if target is not None and load[id(target)] > share[id(target)]:
                load[id(target)] -= 1
                self._target[partition] = None
        for partition, target in enumerate(self._target):
            if target is None:
                taker = next(m for m in order if load[id(m)] < share[id(m)])
                load[id(taker)] += 1
                self._target[partition] = taker
