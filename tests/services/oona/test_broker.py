"""The broker when its log fails it: nothing lost, nothing stuck, everything tried again."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from esper.mesh.errors import Corrupt, LimitExceeded, NotFound
from esper.oona.broker import Broker, BrokerOptions
from esper.oona.convert import dead_letter
from esper.oona.records import NewEvent, TopicSpec
from esper.oona.sqlite_log import LogOptions, SqliteLog
from esper.oona.subscriptions import StartAt
from tests.services.oona.conftest import make_event

QUICK = BrokerOptions(tick_s=0.01, position_interval_s=0.02, backoff_s=0.01)


class FailingLog(SqliteLog):
    """The embedded log, with calls that fail as often as a test says."""

    def __init__(self, path):
        super().__init__(path, LogOptions(cache_bytes=1 << 16, read_bytes=1 << 16))
        self.failures = {}
        self.batches = []

    def fail(self, name, error, times=1):
        self.failures[name] = [error] * times

    def _maybe(self, name):
        if self.failures.get(name):
            raise self.failures[name].pop()

    async def save_positions(self, positions):
        self._maybe("save_positions")
        await super().save_positions(positions)

    async def read(self, topic, partition, offset):
        self._maybe("read")
        return await super().read(topic, partition, offset)

    def append(self, topic, events):
        try:
            self._maybe(f"append {topic}")
        except LimitExceeded as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return future
        self.batches.append((topic, len(events)))
        return super().append(topic, events)


def full():
    """What a log without room says."""
    return LimitExceeded("no room", reason="LOG_FULL", retry_after_s=0.05)


@asynccontextmanager
async def broker_over(path, *, max_attempts=1, defaults=True, options=QUICK):
    """A broker over a log that can be made to fail."""
    log = FailingLog(path / "log")
    spec = TopicSpec(name="t", partitions=1, max_attempts=max_attempts, create_time=datetime.now(UTC))
    broker = Broker(log, options, dead_letter=dead_letter, defaults=[spec] if defaults else [])
    await broker.start()
    try:
        yield broker, log
    finally:
        await broker.close()


def new(number, size=1):
    """A numbered event of one key."""
    event = make_event(number, key="k", payload=bytes(size))
    return NewEvent(event.id, event.key, event.SerializeToString())


async def join(broker, topic="t", group="g", credit=100):
    """A member of a group."""
    return await broker.subscribe(topic, group, member="", start=StartAt(), credit=credit, ack_timeout_s=30.0)


async def until(condition):
    """Wait for a condition."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # the broker's own clock drives it
            await asyncio.sleep(0.005)


async def next_batch(subscription):
    """The next deliveries."""
    return await asyncio.wait_for(subscription.next_batch(), 10)


async def test_dead_letters_wait_for_room(tmp_path):
    """While dead letters cannot be stored their key stays blocked; they are tried again and then free it."""
    async with broker_over(tmp_path) as (broker, log):
        log.fail("append t.dead", full(), times=2)
        member = await join(broker, credit=1)
        await broker.append("t", [new(0), new(1)])
        (first,) = await next_batch(member)
        member.credit(5)
        member.nack([first.delivery_id], reason="no", delay_s=None)
        assert ["event-1"] == [d.event.id for d in await next_batch(member)]
        assert [] == log.failures["append t.dead"]
        assert 1 == broker.log.end("t.dead", 0) == broker.counters.dead["t", "g"]
        assert 2 == broker.counters.refused["t.dead", "LOG_FULL"]


async def test_dead_letters_are_stored_in_parts(tmp_path):
    """Many dead events become several batches, bounded in events and bytes; each waits until the log has room."""
    options = replace(QUICK, bury_events=4, bury_bytes=2000)
    async with broker_over(tmp_path, options=options) as (broker, log):
        member = await join(broker)
        await broker.append("t", [new(n, size=900 if n < 5 else 1) for n in range(15)])
        found = await next_batch(member)
        log._room.clear()
        member.nack([d.delivery_id for d in found], reason="no", delay_s=None)
        await asyncio.sleep(0)
        assert ("t.dead", 3) not in log.batches
        log._room.set()
        await until(lambda: 15 == broker.counters.dead["t", "g"])
        assert [3, 4, 4, 4] == [count for topic, count in log.batches if topic == "t.dead"]
        assert 15 == broker.log.end("t.dead", 0)


async def test_a_group_reads_ahead_by_bytes(tmp_path):
    """Of large events a group holds no more in memory than its bounds, delivered or not; all of them arrive."""
    options = replace(QUICK, read_ahead_bytes=50_000, window_bytes=100_000, delivery_bytes=30_000)
    async with broker_over(tmp_path, options=options) as (broker, _):
        for n in range(60):
            await broker.append("t", [new(n, size=10_000)])
        member = await join(broker)
        cursor = broker._groups["t"]["g"].group.cursors[0]
        found = []
        while len(found) < 10:
            found += await next_batch(member)
            # One read from the file may come on top of the bounds.
            assert cursor.buffered_bytes < 50_000 + 80_000
        assert 0 == cursor.room()
        assert cursor.fetch < 10 + 8
        while len(found) < 60:
            member.ack([d.delivery_id for d in found])
            found += await next_batch(member)
        assert list(range(60)) == [d.event.offset for d in found]


async def test_positions_are_saved_once_there_is_room(tmp_path):
    """A failed save of positions is repeated, and an unexpected failure does not stop the clock either."""
    async with broker_over(tmp_path) as (broker, log):
        member = await join(broker)
        await broker.append("t", [new(0)])
        log.failures["save_positions"] = [full(), RuntimeError("unexpected"), full()]
        (first,) = await next_batch(member)
        member.ack([first.delivery_id])
        cursor = broker._groups["t"]["g"].group.cursors[0]
        await until(lambda: not log.failures["save_positions"] and not cursor.dirty)
    async with broker_over(tmp_path) as (broker, log):
        assert [("t", "g", 0, 0, 0)] == broker.group_readings()
        log.fail("save_positions", full(), times=1000)
        member = await join(broker)
        await broker.append("t", [new(1)])
        await next_batch(member)


async def test_unreadable_events_are_tried_again(tmp_path):
    """A group whose events cannot be read waits, says so in the log, and goes on when they can."""
    async with broker_over(tmp_path) as (broker, log):
        for number in range(10):
            await broker.append("t", [new(number, size=20_000)])
        log.fail("read", Corrupt("damaged"))
        member = await join(broker)
        found = []
        while len(found) < 10:
            found += await next_batch(member)
        assert list(range(10)) == [d.event.offset for d in found]
        assert [] == log.failures["read"]


async def test_a_group_that_cannot_be_stored_does_not_exist(tmp_path):
    """A new group without room for its position is refused, and made at the next attempt."""
    async with broker_over(tmp_path) as (broker, log):
        log.fail("save_positions", full())
        with pytest.raises(LimitExceeded):
            await join(broker)
        assert [] == broker.group_readings("t")
        await join(broker)
        assert ["g"] == [reading[1] for reading in broker.group_readings("t")]


async def test_two_members_who_open_a_group_at_once(tmp_path):
    """They join one group, not two."""
    async with broker_over(tmp_path) as (broker, _):
        await asyncio.gather(join(broker), join(broker))
        assert [("t", "g", 0, 0, 2)] == broker.group_readings()


async def test_unknown_topics(tmp_path):
    """Topics are named where they are missing; defaults are made once only."""
    async with broker_over(tmp_path) as (broker, _):
        with pytest.raises(NotFound, match="no topic x"):
            await join(broker, topic="x")
        made = broker.topic("t")
    async with broker_over(tmp_path) as (broker, _):
        assert made == broker.topic("t")


async def test_closing_in_the_middle_of_a_burial(tmp_path):
    """Events whose dead letter was not stored at the end are buried after the restart, not lost and not tried again."""
    async with broker_over(tmp_path) as (broker, log):
        log.fail("append t.dead", full(), times=1000)
        member = await join(broker)
        await broker.append("t", [new(0)])
        (first,) = await next_batch(member)
        member.nack([first.delivery_id], reason="no", delay_s=None)
        await until(lambda: len(log.failures["append t.dead"]) < 1000)
    async with broker_over(tmp_path) as (broker, _):
        member = await join(broker)
        waiting = asyncio.create_task(member.next_batch())
        await until(lambda: broker.counters.dead["t", "g"] == 1)
        assert not waiting.done()
        member.end()
        assert () == await waiting
        assert 1 == broker.log.end("t.dead", 0)
        assert [("t", "g", 0, 0, 1)] == broker.group_readings("t")
