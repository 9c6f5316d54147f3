"""Those who read: a member of a consumer group, or a reader without one. The broker makes and feeds them."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from esper.oona.group import Delivered, Exhausted, Group, Member
from esper.oona.records import Start

if TYPE_CHECKING:
    from esper.oona.broker import Broker

__all__ = ["GroupState", "GroupSubscription", "Reader", "StartAt", "Subscription"]


@dataclass(frozen=True, slots=True)
class StartAt:
    """Where a new group or a reader begins."""

    kind: Start = Start.EARLIEST
    moment: datetime | None = None
    """For TIME."""
    last: int = 0
    """For LAST."""


class Subscription(Protocol):
    """What the servicer sees of a subscriber, with or without a group."""

    @property
    def partitions(self) -> Sequence[int]:
        """Partitions that it reads."""

    async def next_batch(self) -> Sequence[Delivered]:
        """Wait for events and the credit for them; empty only after `end`."""

    def end(self) -> None:
        """Have `next_batch` give nothing any more; from any task of the loop."""

    def credit(self, more: int) -> None:
        """Allow further deliveries."""

    def ack(self, delivery_ids: Iterable[int]) -> None:
        """These were handled."""

    def nack(self, delivery_ids: Iterable[int], *, reason: str, delay_s: float | None) -> None:
        """These were not."""

    def close(self) -> None:
        """Leave."""


class GroupState:
    """A group, and what the broker keeps beside it."""

    def __init__(self, topic: str, name: str, group: Group) -> None:
        self.topic = topic
        self.name = name
        self.group = group
        self.subscriptions: list[GroupSubscription] = []
        self.loading: set[int] = set()
        """Partitions that are being read from the file."""
        self.burials: list[Exhausted] = []
        """Events whose dead letter could not be stored yet; tried again from `bury_at` on."""
        self.bury_at = 0.0

    def wake(self) -> None:
        """Have every member look again."""
        for subscription in self.subscriptions:
            subscription.wake.set()


class GroupSubscription:
    """One member's view of its group."""

    def __init__(self, broker: "Broker", state: GroupState, member: Member) -> None:
        self.wake = asyncio.Event()
        self._ended = False
        self._broker = broker
        self._state = state
        self._member = member
        self._key = (state.topic, state.name)
        state.subscriptions.append(self)
        state.group.join(member)
        state.wake()

    @property
    def partitions(self) -> Sequence[int]:
        """Partitions that the member reads now."""
        return self._state.group.partitions_of(self._member)

    async def next_batch(self) -> Sequence[Delivered]:
        """Wait for events that the member may have, and for its credit."""
        group, member, broker = self._state.group, self._member, self._broker
        options = broker.options
        while not self._ended:
            self.wake.clear()
            if group.room(member):
                broker.feed(self._state, group.readable(member))
                before = group.redelivered
                batch = group.poll(member, broker.now(), options.delivery_events, options.delivery_bytes)
                if group.exhausted:
                    broker.settle(self._state)
                if batch:
                    broker.counters.delivered[self._key] += len(batch)
                    if again := group.redelivered - before:
                        broker.counters.redelivered[self._key] += again
                    return batch
            await self.wake.wait()
        return ()

    def end(self) -> None:
        """Have `next_batch` give nothing any more."""
        self._ended = True
        self.wake.set()

    def credit(self, more: int) -> None:
        """Allow further deliveries."""
        self._state.group.grant(self._member, more)
        self._after_answer()

    def ack(self, delivery_ids: Iterable[int]) -> None:
        """Count deliveries as handled; ids that are not this member's to answer (any more) are passed over."""
        self._state.group.ack(self._member, delivery_ids)
        self._after_answer()

    def nack(self, delivery_ids: Iterable[int], *, reason: str, delay_s: float | None) -> None:
        """Have deliveries repeated; ids that are not this member's to answer (any more) are passed over."""
        self._state.group.nack(self._member, delivery_ids, self._broker.now(), reason=reason, delay_s=delay_s)
        self._after_answer()

    def close(self) -> None:
        """Leave the group; what is unanswered goes to the others."""
        self._state.subscriptions.remove(self)
        self._state.group.leave(self._member, self._broker.now())
        self._broker.settle(self._state)
        self._state.wake()

    def _after_answer(self) -> None:
        self._broker.settle(self._state)
        self.wake.set()


class Reader:
    """A reader without a group: sees every event, acknowledges none."""

    def __init__(self, broker: "Broker", topic: str, positions: Sequence[int], credit: int) -> None:
        self.wake = asyncio.Event()
        self._ended = False
        self._broker = broker
        self._topic = topic
        self._next = list(positions)
        self._credit = credit
        self._count = 0
        self._turn = 0

    @property
    def partitions(self) -> Sequence[int]:
        """All of them."""
        return range(len(self._next))

    async def next_batch(self) -> Sequence[Delivered]:
        """Wait for events, and for credit."""
        while not self._ended:
            self.wake.clear()
            if self._credit:
                batch = await self._some()
                if batch:
                    self._credit -= len(batch)
                    self._broker.counters.delivered[self._topic, ""] += len(batch)
                    return batch
            await self.wake.wait()
        return ()

    def end(self) -> None:
        """Have `next_batch` give nothing any more."""
        self._ended = True
        self.wake.set()

    async def _some(self) -> list[Delivered]:
        """Events of the first partition that has some, beginning with another one each time."""
        log, count = self._broker.log, len(self._next)
        self._turn = (self._turn + 1) % count
        for partition in (*range(self._turn, count), *range(self._turn)):
            offset = self._next[partition]
            most = min(self._credit, self._broker.options.delivery_events)
            events = log.tail(self._topic, partition, offset, most)
            if events is None:
                events = await log.read(self._topic, partition, offset)
            batch: list[Delivered] = []
            size = 0
            for event in events[:most]:
                size += len(event.data)
                if batch and size > self._broker.options.delivery_bytes:
                    break
                self._count += 1
                batch.append(Delivered(self._count, event, 0))
            if batch:
                self._next[partition] = batch[-1].event.offset + 1
                return batch
        return []

    def credit(self, more: int) -> None:
        """Allow further deliveries."""
        self._credit += more
        self.wake.set()

    def ack(self, delivery_ids: Iterable[int]) -> None:
        """Nothing: readers without a group acknowledge none."""

    def nack(self, delivery_ids: Iterable[int], *, reason: str, delay_s: float | None) -> None:
        """Nothing: readers without a group acknowledge none."""

    def close(self) -> None:
        """Stop reading."""
        self._broker.forget_reader(self._topic, self)
