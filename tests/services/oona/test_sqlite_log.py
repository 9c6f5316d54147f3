"""The embedded log over real files."""

import asyncio
import itertools
import shutil
import sqlite3
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.mesh.errors import Corrupt, LimitExceeded, NotFound, Unavailable
from esper.oona.database import Database
from esper.oona.records import Durability, GroupPosition, NewEvent, TopicSpec
from esper.oona.sqlite_log import LogOptions, SqliteLog

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def topic(name="t", **values):
    """Settings of a topic."""
    return TopicSpec(**{"name": name, "partitions": 2, "create_time": NOW, **values})


def batch(*numbers, key="k", size=4, low=False):
    """Numbered events."""
    return [NewEvent(f"id-{n}", key, str(n).encode().ljust(size, b"."), low) for n in numbers]


@asynccontextmanager
async def opened(path, *, make=(), clock_us=None, **values):
    """An open log."""
    extra = {} if clock_us is None else {"clock_us": clock_us}
    log = SqliteLog(path, LogOptions(**{"cache_bytes": 1 << 16, **values}), **extra)
    await log.open()
    try:
        missing = [spec for spec in make if spec.name not in log.topics()]
        if missing:
            await log.create_topics(missing)
        yield log
    finally:
        await log.close()


async def everything(log, name="t", *, partition=0, begin=0):
    """All events of a partition, from the file."""
    found = []
    while events := await log.read(name, partition, begin):
        found.extend(events)
        begin = events[-1].offset + 1
    return found


async def test_events_come_back_after_reopening(tmp_path):
    """Ids, keys, data, offsets and order survive; so do topics with all their settings."""
    spec = topic(
        partitions=1, durability=Durability.INTERVAL, max_attempts=9, retention_s=99999999, retention_bytes=12345
    )
    async with opened(tmp_path / "log", make=[spec]) as log:
        appended = await log.append("t", [NewEvent("ä", "schlüssel", b"\0\xff"), NewEvent("b", "", b"")])
        assert ((0, 0), (0, 1)) == appended.positions
        await log.append("t", batch(1))
    async with opened(tmp_path / "log") as log:
        assert spec == log.topics()["t"]
        found = await everything(log)
        assert [("ä", "schlüssel", b"\0\xff"), ("b", "", b""), ("id-1", "k", b"1...")] == [e[2:5] for e in found]
        assert [0, 1, 2] == [e.offset for e in found]
        (extent,) = log.extents("t")
        assert (0, 3, 6) == (extent.first, extent.next, extent.size_bytes)


async def test_batches_are_stored_in_the_order_given(tmp_path):
    """Batches accepted without waiting for each other keep their order, whatever groups they fall into."""
    async with opened(tmp_path / "log", make=[topic()], group_events=7) as log:
        await asyncio.gather(*[log.append("t", batch(3 * n, 3 * n + 1, 3 * n + 2)) for n in range(50)])
        number = (await log.append("t", batch(0))).positions[0][0]
        found = await everything(log, partition=number)
        assert [f"id-{n}" for n in range(150)] == [e.id for e in found]


async def test_publishing_again_stores_once_also_after_reopening(tmp_path):
    """Ids inside the window are answered with their first position; the window is rebuilt from the file."""
    async with opened(tmp_path / "log", make=[topic()], window_ids=10) as log:
        first = await log.append("t", batch(1, 2))
        again = await log.append("t", batch(2, 1, 3))
        assert (2, first.positions[::-1]) == (again.duplicates, again.positions[:2])
    async with opened(tmp_path / "log", window_ids=10) as log:
        assert 3 == (await log.append("t", batch(1, 2, 3))).duplicates
        for n in range(10, 40):
            await log.append("t", batch(n))
        assert 0 == (await log.append("t", batch(1))).duplicates


async def test_window_after_reopening_holds_the_newest_ids(tmp_path):
    """Of a long log at least the newest ids, over all partitions, are known again."""
    async with opened(tmp_path / "log", make=[topic(partitions=3)]) as log:
        for n in range(60):
            await log.append("t", batch(n, key=f"k{n % 7}"))
    async with opened(tmp_path / "log", window_ids=20) as log:
        for n in range(40, 60):
            assert 1 == (await log.append("t", batch(n, key=f"k{n % 7}"))).duplicates


@settings(max_examples=25, deadline=None)
@given(
    rounds=st.lists(
        st.lists(
            st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["", "a", "b", "c"])), min_size=1, max_size=6),
            max_size=6,
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_log_against_a_model(tmp_path_factory, rounds, data):
    """Any batches, repeated ids, any reopenings: each id stored once, positions truthful, order kept per key."""
    path = tmp_path_factory.mktemp("log") / "log"
    group_events = data.draw(st.sampled_from([1, 5, 8192]))
    keys = {}

    async def run():
        stored = {}
        order = []
        for batches in rounds:
            async with opened(path, make=[topic(partitions=3)], group_events=group_events) as log:
                events = [[NewEvent(f"{n}", keys.setdefault(n, key), b"%d" % n) for n, key in b] for b in batches]
                for accepted, given_events in zip(
                    await asyncio.gather(*[log.append("t", b) for b in events]), events, strict=True
                ):
                    fresh = 0
                    for event, place in zip(given_events, accepted.positions, strict=True):
                        if event.id not in stored:
                            order.append(event)
                            fresh += 1
                        assert stored.setdefault(event.id, place) == place
                    assert len(given_events) - fresh == accepted.duplicates
                found = [e for p in range(3) for e in await everything(log, partition=p)]
                assert stored == {e.id: (e.partition, e.offset) for e in found}
                for partition in range(3):
                    offsets = [e.offset for e in found if e.partition == partition]
                    assert list(range(len(offsets))) == offsets
                for key in "abc":
                    assert [e.id for e in order if e.key == key] == [e.id for e in found if e.key == key]

    asyncio.run(run())
    shutil.rmtree(path.parent)


async def test_unknown_topic(tmp_path):
    """A topic that nobody made is named in the error."""
    async with opened(tmp_path / "log") as log:
        with pytest.raises(NotFound, match="no topic nowhere") as caught:
            await log.append("nowhere", batch(1))
        assert "TOPIC_NOT_FOUND" == caught.value.reason


async def test_closing_stores_what_was_accepted(tmp_path):
    """A batch that was taken before the end is stored; one after it is refused."""
    log = SqliteLog(tmp_path / "log", LogOptions())
    await log.open()
    await log.create_topics([topic(partitions=1)])
    futures = [log.append("t", batch(n)) for n in range(20)]
    await log.close()
    assert [((0, n),) for n in range(20)] == [f.result().positions for f in futures]
    with pytest.raises(Unavailable, match="closing"):
        await log.append("t", batch(99))


async def test_closing_without_opening(tmp_path):
    """A log that never opened closes without complaint."""
    await SqliteLog(tmp_path / "log", LogOptions()).close()


async def test_a_publisher_that_went_away_harms_nobody(tmp_path):
    """A cancelled batch is stored all the same, and its neighbours are answered."""
    async with opened(tmp_path / "log", make=[topic(partitions=1)]) as log:
        gone, here = log.append("t", batch(1)), log.append("t", batch(2))
        gone.cancel()
        assert ((0, 1),) == (await here).positions


async def test_low_events_are_shed_while_much_is_waiting(tmp_path):
    """Beyond half of the bound telemetry is SHED without a time to wait; reports are taken, and hold back."""
    async with opened(tmp_path / "log", make=[topic()], pending_events=10) as log:
        taken = [log.append("t", batch(*range(6)))]
        with pytest.raises(LimitExceeded, match="low priority") as caught:
            await log.append("t", batch(100, low=True))
        assert ("SHED", None) == (caught.value.reason, caught.value.retry_after_s)
        mixed = [*batch(200, low=True), *batch(201)]
        taken.append(log.append("t", mixed))
        taken.append(log.append("t", batch(*range(10, 16))))
        room = asyncio.ensure_future(log.room())
        await asyncio.sleep(0)
        assert not room.done()
        await asyncio.gather(*taken)
        await asyncio.wait_for(room, 5)
        await log.append("t", batch(101, low=True))


async def test_reading_from_memory_and_from_the_file(tmp_path):
    """The newest events are in memory, older ones come from the file, both the same."""
    async with opened(tmp_path / "log", make=[topic(partitions=1)], read_bytes=30_000) as log:
        for n in range(20):
            await log.append("t", batch(*range(n * 5, n * 5 + 5), size=2000))
        assert log.tail("t", 0, 0, 10) is None
        assert ["id-95", "id-96"] == [e.id for e in log.tail("t", 0, 95, 2)]
        assert () == log.tail("t", 0, 100, 2)
        part = await log.read("t", 0, 3)
        assert 3 == part[0].offset
        assert 12 == len(part)
        assert list(log.tail("t", 0, 95, 5)) == list(await log.read("t", 0, 95))
        assert [] == await log.read("t", 0, 100)


async def test_search_by_time(tmp_path):
    """The first event stored at or after a moment is found, also where the clock was set back."""
    clock = iter([1_000_000, 2_000_000, 1_500_000, 4_000_000])
    async with opened(tmp_path / "log", make=[topic(partitions=1)], clock_us=lambda: next(clock, 5_000_000)) as log:
        for n in range(4):
            await log.append("t", batch(n))

        async def at(seconds):
            return await log.offset_at("t", 0, datetime.fromtimestamp(seconds, UTC))

        assert [0, 0, 1, 1, 3, 4] == [await at(s) for s in (0, 1, 1.1, 2, 2.1, 9)]


async def test_retention_by_age(tmp_path):
    """Events older than the topic allows are removed, whole chunks at a time; offsets go on, also after reopening."""
    now = 1_000_000_000
    async with opened(tmp_path / "log", make=[topic(partitions=1, retention_s=60)], clock_us=lambda: now) as log:
        await log.append("t", batch(1, 2))
        now += 50_000_000
        await log.append("t", batch(3))
        assert 0 == await log.sweep()
        now += 20_000_000
        assert 1 == await log.sweep()
        (extent,) = log.extents("t")
        assert (2, 3, 4) == (extent.first, extent.next, extent.size_bytes)
        assert ["id-3"] == [e.id for e in await log.read("t", 0, 0)]
        now += 100_000_000
        assert 1 == await log.sweep()
    async with opened(tmp_path / "log") as log:
        (extent,) = log.extents("t")
        assert (3, 3, 0) == (extent.first, extent.next, extent.size_bytes)
        assert ((0, 3),) == (await log.append("t", batch(4))).positions


async def test_retention_by_size(tmp_path):
    """The oldest events go until the partition is small enough, however many chunks that takes."""
    async with opened(tmp_path / "log", make=[topic(partitions=1, retention_bytes=250)]) as log:
        for n in range(300):
            await log.append("t", batch(n, size=100))
        assert 298 == await log.sweep()
        (extent,) = log.extents("t")
        assert (298, 300, 200) == (extent.first, extent.next, extent.size_bytes)


async def test_topics_without_retention_keep_everything(tmp_path):
    """A sweep leaves other topics alone."""
    async with opened(tmp_path / "log", make=[topic(partitions=1)], clock_us=lambda: 0) as log:
        await log.append("t", batch(1))
        assert 0 == await log.sweep()
        assert 1 == len(await everything(log))


async def test_positions_survive(tmp_path):
    """Positions of several groups come back; partitions that were never saved begin at their oldest event."""
    async with opened(tmp_path / "log", make=[topic()]) as log:
        await log.append("t", batch(1))
        position = GroupPosition(7, ((3, 1), (5, 2)))
        await log.save_positions({("t", "g"): {1: position}, ("t", "h"): {0: GroupPosition(1)}})
        await log.save_positions({("t", "h"): {0: GroupPosition(2)}})
    async with opened(tmp_path / "log") as log:
        assert [GroupPosition(0), position] == log.groups()["t", "g"]
        assert [GroupPosition(2), GroupPosition(0)] == log.groups()["t", "h"]


async def test_upkeep_flushes_sweeps_and_checkpoints(tmp_path, monkeypatch):
    """Left alone, the log applies retention, moves its write-ahead log into the file and cuts that off."""
    modes = set()
    checkpoint = Database.checkpoint
    monkeypatch.setattr(Database, "checkpoint", lambda self, mode: (modes.add(mode), checkpoint(self, mode))[1])
    spec = topic(partitions=1, retention_bytes=1000, durability=Durability.INTERVAL)
    values = {"flush_interval_s": 0.02, "retention_interval_s": 0.02, "checkpoint_bytes": 10_000, "wal_bytes": 1}
    async with opened(tmp_path / "log", make=[spec], **values) as log:
        for n in range(50):
            await log.append("t", batch(n, size=1000))
        async with asyncio.timeout(20):
            while log.extents("t")[0].first < 49 or "TRUNCATE" not in modes:  # noqa: ASYNC110  # the log's own clock
                await asyncio.sleep(0.01)
        assert {"PASSIVE", "TRUNCATE"} == modes
        assert 50 == log.end("t", 0)
        assert (tmp_path / "log").stat().st_size > 20_000


@pytest.mark.parametrize("what", ["tiny events", "positions"])
async def test_the_write_ahead_log_is_bounded_whatever_fills_it(tmp_path, what):
    """Neither events of a few bytes nor positions alone let it grow: it is moved, begun anew and cut down."""
    wal, bound = tmp_path / "log-wal", 100_000
    values = {"flush_interval_s": 0.01, "checkpoint_bytes": bound}
    async with opened(tmp_path / "log", make=[topic(partitions=1)], **values) as log:
        beyond = False
        async with asyncio.timeout(60):
            for n in itertools.count():
                if what == "positions":
                    await log.save_positions({("t", "g"): {0: GroupPosition(n)}})
                else:
                    await log.append("t", batch(n, size=1))
                size = wal.stat().st_size
                if beyond and size <= bound:
                    break
                beyond = beyond or size > bound
        assert wal.stat().st_size <= bound


async def test_what_a_crash_left_is_moved_at_the_start(tmp_path):
    """A large write-ahead log that was left behind is moved before the first event is taken."""
    source = tmp_path / "source"
    source.mkdir()
    async with opened(source / "log", make=[topic(partitions=1)], flush_interval_s=3600) as log:
        await log.append("t", batch(*range(100), size=1000))
        shutil.copytree(source, tmp_path / "copy")
    path = tmp_path / "copy" / "log"
    before = path.stat().st_size
    assert path.with_name("log-wal").stat().st_size > 100_000
    async with opened(path, checkpoint_bytes=1000, flush_interval_s=3600) as log:
        assert path.stat().st_size > before + 100_000
        assert 100 == len(await everything(log))


async def test_a_damaged_chunk_is_found(tmp_path):
    """A flipped byte in the file is DATA_LOSS with the place of it, never a wrong event."""
    path = tmp_path / "log"
    async with opened(path, make=[topic(partitions=1)]) as log:
        await log.append("t", batch(1))
    with sqlite3.connect(path) as db:
        (data,) = db.execute("SELECT data FROM chunk").fetchone()
        db.execute("UPDATE chunk SET data = ?", (data[:-1] + b"!",))
    db.close()
    async with opened(path) as log:
        with pytest.raises(Corrupt, match="partition 0: the events from offset 0 on") as caught:
            await log.read("t", 0, 0)
        assert "LOG_CORRUPT" == caught.value.reason


async def test_a_file_that_is_no_log(tmp_path):
    """A foreign file is refused as it is, and left so."""
    path = tmp_path / "log"
    path.write_bytes(b"something else entirely" * 100)
    log = SqliteLog(path, LogOptions())
    with pytest.raises(Corrupt, match="damaged"):
        await log.open()
    await log.close()
    assert path.read_bytes().startswith(b"something else")


async def test_a_log_of_a_newer_build(tmp_path):
    """A schema from the future is refused by number."""
    path = tmp_path / "log"
    async with opened(path):
        pass
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    log = SqliteLog(path, LogOptions())
    with pytest.raises(Corrupt, match="schema 99"):
        await log.open()
    await log.close()


async def test_store_times_never_decrease(tmp_path):
    """A clock that is set back, also over a restart, does not put events before older ones."""
    async with opened(tmp_path / "log", make=[topic(partitions=1)], clock_us=lambda: 9_000) as log:
        await log.append("t", batch(1))
    async with opened(tmp_path / "log", clock_us=lambda: 5_000) as log:
        await log.append("t", batch(2))
        assert [9_000, 9_000] == [e.store_us for e in await everything(log)]


async def test_creating_a_taken_name_changes_nothing(tmp_path):
    """Topics are made all or none."""
    async with opened(tmp_path / "log", make=[topic()]) as log:
        with pytest.raises(Unavailable):
            await log.create_topics([topic("fresh"), topic("t")])
        assert {"t"} == set(log.topics())
        await log.create_topics([topic("fresh")])
        await log.append("fresh", batch(1))


async def test_an_unexpected_failure_is_told_and_forgotten(tmp_path):
    """Whatever goes wrong in a group, its publishers hear of it, and the next group is stored."""
    failures = [ZeroDivisionError("unexpected")]

    def clock():
        if failures:
            raise failures.pop()
        return 1

    async with opened(tmp_path / "log", make=[topic(partitions=1)], clock_us=clock) as log:
        with pytest.raises(Unavailable, match="could not be written") as caught:
            await log.append("t", batch(1))
        assert "ZeroDivisionError: unexpected" == caught.value.private
        assert ((0, 0),) == (await log.append("t", batch(1))).positions


async def test_upkeep_survives_failures(tmp_path, monkeypatch):
    """A flush that fails is tried again, while the log is open and at its end."""
    failures = [sqlite3.OperationalError("busy"), ZeroDivisionError("unexpected"), sqlite3.OperationalError("busy")]
    flush = Database.flush

    def failing(self):
        if failures:
            raise failures.pop()
        flush(self)

    monkeypatch.setattr(Database, "flush", failing)
    async with opened(tmp_path / "log", make=[topic(partitions=1)], flush_interval_s=0.01) as log:
        await log.append("t", batch(1))
        async with asyncio.timeout(10):
            while failures:  # noqa: ASYNC110  # the log's own clock drives it
                await asyncio.sleep(0.01)
        failures.append(sqlite3.OperationalError("busy"))
        log._tasks[1].cancel()
    assert [] == failures


async def test_interval_topics_do_not_wait_for_the_disk_but_reach_it(tmp_path, monkeypatch):
    """Groups of INTERVAL topics alone commit without a sync; those with a SYNC topic and every flush sync."""
    synced = []
    set_sync = Database._set_sync
    monkeypatch.setattr(Database, "_set_sync", lambda self, *, sync: (synced.append(sync), set_sync(self, sync=sync)))
    specs = [topic("slow", partitions=1), topic("quick", partitions=1, durability=Durability.INTERVAL)]
    async with opened(tmp_path / "log", make=specs, flush_interval_s=3600) as log:
        for name, sync in (("quick", False), ("slow", True)):
            synced.clear()
            await log.append(name, batch(1))
            assert [sync] == synced
        await log.append("quick", batch(77))
        synced.clear()
        together = [log.append("quick", batch(78)), log.append("slow", batch(79))]
        await asyncio.gather(*together)
        assert True in synced
        await log.append("quick", batch(80))
        synced.clear()
        await log._on(log._writing, log._writing.flush)
        await log._on(log._writing, log._writing.flush)
        assert [True] == synced
