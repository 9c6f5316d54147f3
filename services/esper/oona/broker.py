"""The bus itself: topics, consumer groups and readers over a log. One event loop; neither gRPC nor protobuf.

Lives through `start` and `close`. Publishers call `append` (and await `room` before taking on more); subscribers get a
`GroupSubscription` or a `Reader` from `subscribe` and loop over `next_batch`.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from esper.mesh.errors import AlreadyExists, Corrupt, EsperError, InvalidInput, LimitExceeded
from esper.mesh.logging import get_logger
from esper.oona.cursor import Cursor
from esper.oona.group import Exhausted, Group, Member, RetryPolicy
from esper.oona.metrics import BusCounters, GroupReading
from esper.oona.records import (
    DEAD_SUFFIX,
    Appended,
    Durability,
    Extent,
    GroupPosition,
    NewEvent,
    Start,
    TopicSpec,
    check_topic_name,
    topic_missing,
)
from esper.oona.store import LogStore
from esper.oona.subscriptions import GroupState, GroupSubscription, Reader, StartAt, Subscription

__all__ = ["Broker", "BrokerOptions", "DeadLetter"]

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerOptions:
    """Sizes and times of delivery."""

    tick_s: float = 0.05
    """Seconds between looks at timeouts and waiting redeliveries: how late these may be."""

    position_interval_s: float = 0.2
    """Seconds between saves of positions: what is acknowledged within them may be delivered again after a crash."""

    backoff_s: float = 0.5
    """Seconds before the second delivery; doubles with each further one."""

    backoff_max_s: float = 30.0
    """Longest such wait, in seconds."""

    max_in_flight: int = 10_000
    """Deliveries of one member that may await an answer."""

    window: int = 10_000
    """Events of one partition that a group may have read and not done."""

    window_bytes: int = 32 << 20
    """Their bytes beyond which no further event is read."""

    read_ahead: int = 2_000
    """Events of one partition that wait in memory for a member's credit."""

    read_ahead_bytes: int = 4 << 20
    """Their bytes beyond which no further event is read."""

    bury_events: int = 256
    """Most dead letters that are stored at once."""

    bury_bytes: int = 1 << 20
    """Bytes of events beyond which such a batch takes no further one."""

    delivery_events: int = 1024
    """Most events of one message to a subscriber."""

    delivery_bytes: int = 1 << 20
    """Most bytes of events in one message to a subscriber; a larger event comes alone. Well below what a client takes
    (4 MiB): a message that it cannot take, it could never acknowledge."""

    max_groups: int = 1024
    """Consumer groups of one topic."""

    max_topics: int = 1000
    """Topics, dead-letter topics not counted."""


class DeadLetter(Protocol):
    """Makes the event that is stored in the dead-letter topic."""

    def __call__(self, topic: str, group: str, exhausted: Exhausted) -> NewEvent:
        """The dead letter; its id follows from topic, position and group: storing it twice stores it once."""


class Broker:
    """Topics, groups and readers over a log.

    Args:
        log: where events are kept; opened and closed by the broker.
        options: sizes and times.
        dead_letter: makes dead letters.
        defaults: topics made at the start when they are missing.
        now: seconds of a monotonic clock.
    """

    def __init__(
        self,
        log: LogStore,
        options: BrokerOptions,
        *,
        dead_letter: DeadLetter,
        defaults: Sequence[TopicSpec] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log = log
        self.options = options
        self.counters = BusCounters()
        self.now = now
        self._dead_letter = dead_letter
        self._defaults = tuple(defaults)
        self._groups: dict[str, dict[str, GroupState]] = {}
        self._readers: dict[str, set[Reader]] = {}
        self._creating = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the log, make missing default topics, take up the groups where they were."""
        self.log.on_append = self._appended
        await self.log.open()
        for spec in self._defaults:
            if spec.name not in self.log.topics():
                await self.create_topic(spec)
        for (topic, name), positions in self.log.groups().items():
            self._add_group(topic, name, positions)
        self._ticker = asyncio.create_task(self._tick_loop())

    async def close(self) -> None:
        """Save positions, close the log."""
        tasks = [*self._tasks, *([self._ticker] if self._ticker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self.save_positions()
        except EsperError as error:
            _log.warning("last positions not saved", reason=error.reason, private=error.private)
        await self.log.close()

    # --- topics ---

    async def create_topic(self, spec: TopicSpec) -> TopicSpec:
        """Make a topic and its dead-letter topic, or return the one that exists with the same settings.

        Raises:
            AlreadyExists: TOPIC_DIFFERS.
            InvalidInput: TOPIC_NAME_INVALID, TOPIC_RESERVED.
            LimitExceeded: TOO_MANY_TOPICS, LOG_FULL.
        """
        check_topic_name(spec.name)
        async with self._creating:
            known = self.log.topics()
            if (existing := known.get(spec.name)) is not None:
                if existing.settings() != spec.settings():
                    raise AlreadyExists(
                        f"topic {spec.name} exists with other settings: expected the same ones or another name",
                        reason="TOPIC_DIFFERS",
                        metadata={"topic": spec.name},
                    )
                return existing
            if len(known) >= 2 * self.options.max_topics:
                raise LimitExceeded(
                    f"the bus has {self.options.max_topics} topics, as many as it takes", reason="TOO_MANY_TOPICS"
                )
            # Dead letters must never be lost to a crash, and are kept for people: no size limit, no age of their own.
            dead = replace(
                spec, name=spec.name + DEAD_SUFFIX, durability=Durability.SYNC, retention_s=0, retention_bytes=0
            )
            await self.log.create_topics([spec, dead])
            return spec

    def topic(self, name: str) -> TopicSpec:
        """A topic by name.

        Raises:
            NotFound: TOPIC_NOT_FOUND.
        """
        spec = self.log.topics().get(name)
        if spec is None:
            raise topic_missing(name)
        return spec

    def topics(self) -> Mapping[str, TopicSpec]:
        """Every topic by name."""
        return self.log.topics()

    def extents(self, topic: str) -> Sequence[Extent]:
        """Extent of each partition of a topic."""
        return self.log.extents(topic)

    def group_readings(self, topic: str | None = None) -> list[GroupReading]:
        """State of the groups of one topic, or of all."""
        names = list(self._groups) if topic is None else [topic]
        return [
            (name, state.name, state.group.lag(self._ends(name)), state.group.in_flight(), len(state.group.members))
            for name in names
            for state in list(self._groups.get(name, {}).values())
        ]

    # --- publishing ---

    async def room(self) -> None:
        """Return when the log can take on another batch."""
        await self.log.room()

    def append(self, topic: str, events: Sequence[NewEvent]) -> "asyncio.Future[Appended]":
        """Accept a batch at once; see `LogStore.append` for what its future gives and raises."""
        future = self.log.append(topic, events)
        future.add_done_callback(lambda done: self._count(topic, len(events), done))
        return future

    def _count(self, topic: str, events: int, done: "asyncio.Future[Appended]") -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            appended = done.result()
            self.counters.published[topic] += events - appended.duplicates
            self.counters.duplicates[topic] += appended.duplicates
        elif isinstance(error, EsperError) and error.reason == "SHED":
            self.counters.shed[topic] += events
        elif isinstance(error, EsperError) and error.reason != "TOPIC_NOT_FOUND":
            # Names that do not exist are not counted: a stranger could fill the memory with them.
            self.counters.refused[topic, error.reason] += events

    def _appended(self, topic: str) -> None:
        for state in self._groups.get(topic, {}).values():
            state.wake()
        for reader in self._readers.get(topic, ()):
            reader.wake.set()

    # --- subscribing ---

    async def subscribe(
        self, topic: str, group: str, *, member: str, start: StartAt, credit: int, ack_timeout_s: float
    ) -> Subscription:
        """Join a group, or read without one when `group` is empty.

        Raises:
            NotFound: TOPIC_NOT_FOUND.
            InvalidInput: START_TIME_MISSING.
            LimitExceeded: TOO_MANY_GROUPS, LOG_FULL.
        """
        self.topic(topic)
        if not group:
            positions = await self._resolve(topic, start)
            reader = Reader(self, topic, positions, credit)
            self._readers.setdefault(topic, set()).add(reader)
            return reader
        state = self._groups.get(topic, {}).get(group)
        if state is None:
            state = await self._new_group(topic, group, start)
        return GroupSubscription(self, state, Member(member, ack_timeout_s, credit))

    async def _new_group(self, topic: str, name: str, start: StartAt) -> GroupState:
        async with self._creating:
            known = self._groups.get(topic, {})
            if name in known:
                return known[name]
            if len(known) >= self.options.max_groups:
                raise LimitExceeded(
                    f"topic {topic} has {len(known)} groups, as many as it takes", reason="TOO_MANY_GROUPS"
                )
            positions = [GroupPosition(offset) for offset in await self._resolve(topic, start)]
            # Persisted before the first delivery: a group that began at LATEST must not begin again after a crash.
            await self.log.save_positions({(topic, name): dict(enumerate(positions))})
            return self._add_group(topic, name, positions)

    def _add_group(self, topic: str, name: str, positions: Sequence[GroupPosition]) -> GroupState:
        spec = self.topic(topic)
        policy = RetryPolicy(
            max_attempts=None if spec.is_dead else spec.max_attempts,
            backoff_s=self.options.backoff_s,
            backoff_max_s=self.options.backoff_max_s,
        )
        cursors = [
            Cursor(number, position, limit=self.options.window, limit_bytes=self.options.window_bytes)
            for number, position in enumerate(positions)
        ]
        state = GroupState(topic, name, Group(cursors, policy, max_in_flight=self.options.max_in_flight))
        self._groups.setdefault(topic, {})[name] = state
        return state

    async def _resolve(self, topic: str, start: StartAt) -> list[int]:
        extents = self.log.extents(topic)
        if start.kind is Start.LATEST:
            return [e.next for e in extents]
        if start.kind is Start.LAST:
            return [max(e.first, e.next - start.last) for e in extents]
        if start.kind is Start.TIME:
            if start.moment is None:
                raise InvalidInput("to start at a time, expected start_time, found none", reason="START_TIME_MISSING")
            return [await self.log.offset_at(topic, e.partition, start.moment) for e in extents]
        return [e.first for e in extents]

    # --- feeding ---

    def feed(self, state: GroupState, cursors: Iterable[Cursor]) -> None:
        """Give cursors what they lack, from memory at once or from the file soon."""
        for cursor in cursors:
            number = cursor.partition
            end = self.log.end(state.topic, number)
            while cursor.fetch < end and number not in state.loading and (want := self._wanted(cursor)) > 0:
                events = self.log.tail(state.topic, number, cursor.fetch, want)
                if events is None:
                    state.loading.add(number)
                    self._spawn(self._load(state, cursor))
                    break
                cursor.feed(events)

    def _wanted(self, cursor: Cursor) -> int:
        if cursor.buffered_bytes >= self.options.read_ahead_bytes:
            return 0
        return min(self.options.read_ahead - cursor.buffered(), cursor.room())

    async def _load(self, state: GroupState, cursor: Cursor) -> None:
        try:
            offset = cursor.fetch
            events = await self.log.read(state.topic, cursor.partition, offset)
            first = events[0].offset if events else self.log.extents(state.topic)[cursor.partition].first
            if first <= offset and not events:
                raise Corrupt(f"topic {state.topic}, partition {cursor.partition}: nothing at offset {offset}")
            if first > offset:
                self.counters.expired_unread[state.topic, state.name] += cursor.skip_to(first)
            cursor.feed(events)
        except EsperError as error:
            # Tried again at the next poll; the members see an idle partition, the operator sees this.
            _log.error("events not readable", topic=state.topic, group=state.name, partition=cursor.partition,
                       reason=error.reason, public=error.public, private=error.private)  # fmt: skip
            await asyncio.sleep(1.0)
        finally:
            state.loading.discard(cursor.partition)
            state.wake()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- time ---

    async def _tick_loop(self) -> None:
        saved = self.now()
        while True:
            await asyncio.sleep(self.options.tick_s)
            try:
                self.tick()
                if self.now() - saved >= self.options.position_interval_s:
                    saved = self.now()
                    await self.save_positions()
            except EsperError as error:
                _log.warning("positions not saved", reason=error.reason, private=error.private)
            except Exception:  # noqa: BLE001  # logged with its traceback; see below
                # The clock of the whole bus must not stop; the next tick sees the same state again.
                _log.exception("tick failed")

    def tick(self) -> None:
        """Take back what was not answered in time, wake whom a waiting event concerns, bury the dead."""
        now = self.now()
        for states in self._groups.values():
            for state in states.values():
                expired = state.group.expire(now)
                if expired or state.group.next_due() <= now:
                    self.settle(state)
                    state.wake()
                if state.group.exhausted or (state.burials and now >= state.bury_at):
                    self._bury_soon(state)

    def settle(self, state: GroupState) -> None:
        """Hand partitions over where the old owner has answered; bury what has no attempt left."""
        if state.group.settle():
            state.wake()
        if state.group.exhausted:
            self._bury_soon(state)

    def _bury_soon(self, state: GroupState) -> None:
        batch, state.group.exhausted = state.burials + state.group.exhausted, []
        state.burials = []
        self._spawn(self._bury(state, batch))

    async def _bury(self, state: GroupState, batch: Sequence[Exhausted]) -> None:
        while batch:
            # In parts, each when the log has room: a dead letter is a copy of its event.
            await self.log.room()
            count = self._bury_at_once(batch)
            part, batch = batch[:count], batch[count:]
            letters = [self._dead_letter(state.topic, state.name, exhausted) for exhausted in part]
            try:
                await self.append(state.topic + DEAD_SUFFIX, letters)
            except EsperError as error:
                # The events keep blocking their keys: better late than lost.
                left = [*part, *batch]
                _log.error("dead letters not stored", topic=state.topic, group=state.name, count=len(left),
                           reason=error.reason, private=error.private)  # fmt: skip
                state.burials += left
                state.bury_at = self.now() + (error.retry_after_s or 1.0)
                return
            for exhausted in part:
                exhausted.cursor.buried(exhausted.item)
            self.counters.dead[state.topic, state.name] += count
            state.wake()

    def _bury_at_once(self, batch: Sequence[Exhausted]) -> int:
        size = 0
        for count, exhausted in enumerate(batch[: self.options.bury_events], start=1):
            size += exhausted.item.size
            if size >= self.options.bury_bytes:
                return count
        return min(len(batch), self.options.bury_events)

    async def save_positions(self) -> None:
        """Persist what changed since the last time."""
        changed: dict[tuple[str, str], dict[int, GroupPosition]] = {}
        cursors: list[Cursor] = []
        for topic, states in self._groups.items():
            for name, state in states.items():
                for cursor in state.group.cursors:
                    if cursor.dirty:
                        cursor.dirty = False
                        cursors.append(cursor)
                        changed.setdefault((topic, name), {})[cursor.partition] = cursor.position()
        if not changed:
            return
        try:
            await self.log.save_positions(changed)
        except BaseException:
            for cursor in cursors:
                cursor.dirty = True
            raise

    def _ends(self, topic: str) -> list[int]:
        return [self.log.end(topic, number) for number in range(self.topic(topic).partitions)]

    def forget_reader(self, topic: str, reader: "Reader") -> None:
        """The reader has gone."""
        self._readers.get(topic, set()).discard(reader)
