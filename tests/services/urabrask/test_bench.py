"""The engine's loops against a library that is late, forgetful, slow or gone."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest

from esper.mesh.errors import Corrupt, InvalidInput, Stale, Unavailable
from esper.urabrask.bench import Bench, Pace
from esper.urabrask.board import Board
from esper.urabrask.engine import Candidate, NotJudged
from esper.urabrask.keys import KeyRing
from esper.urabrask.library import Task

KERNEL = "sha256:" + "0" * 64


class PoolOfOne:
    """As much of a pool as the bench looks at."""

    size = 1


@dataclass
class Examiner:
    """An engine whose judgement is decided by the test."""

    keys: KeyRing
    verdicts: list = field(default_factory=list)
    seen: list = field(default_factory=list)
    pool = PoolOfOne()

    async def find_target(self):
        return "cpu/x86_64/avx2/torch-2.13"

    async def judge(self, candidate, bundle):
        self.seen.append((candidate.id, bundle))
        verdict = self.verdicts.pop(0)
        return await verdict() if callable(verdict) else verdict


@dataclass
class Shelf:
    """A library in memory that fails as often as it is told to."""

    work: list = field(default_factory=list)
    failures: dict = field(default_factory=dict)
    registered: list = field(default_factory=list)
    revoked: set = field(default_factory=set)
    renewals: int = 0
    completed: list = field(default_factory=list)
    given_up: list = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def _fail(self, method):
        if queue := self.failures.get(method):
            error = queue.pop(0)
            if error is not None:
                raise error

    async def register_key(self, key, create_time):
        self._fail("register")
        self.registered.append(key.key_id)
        return key.key_id not in self.revoked

    async def lease(self, holder, target, *, wait_s, lease_s):
        self._fail("lease")
        while not self.work:
            self.wake.clear()
            await self.wake.wait()
        return self.work.pop(0)

    async def renew(self, lease_id, lease_s):
        self.renewals += 1
        self._fail("renew")

    async def download(self, candidate):
        self._fail("download")
        return b"bundle"

    async def complete(self, lease_id, judgement):
        self._fail("complete")
        self.completed.append((lease_id, judgement.statement.kernel_id))

    async def give_up(self, lease_id, error):
        self._fail("give_up")
        self.given_up.append((lease_id, error))

    def offer(self, name):
        self.work.append(Task(name, 1, Candidate(KERNEL, 6, {})))
        self.wake.set()


@contextlib.asynccontextmanager
async def working(tmp_path, clock, shelf, *verdicts, **pace):
    """A bench at work over a shelf."""
    examiner = Examiner(KeyRing.open(tmp_path, clock), list(verdicts))
    drain, board = asyncio.Event(), Board()
    pace = Pace(**{"retry_s": 0.01, "retry_max_s": 0.04, "lease_s": 0.09, "drain_s": 0.05} | pace)
    bench = Bench(examiner, shelf, board, name="test", directory=tmp_path, pace=pace, drain=drain, clock=clock)
    bench.start()
    try:
        yield examiner, board, bench
    finally:
        drain.set()
        await bench.stop()


async def until(condition, within_s=5.0):
    """Wait for a state of the test's own objects."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # plain objects offer no event
            await asyncio.sleep(0.005)


async def test_verdict_is_handed_in(tmp_path, clock, judgement):
    """A kernel is judged on the bytes downloaded, and its verdict handed in under its lease and posted."""
    shelf = Shelf()
    async with working(tmp_path, clock, shelf, judgement()) as (examiner, board, _):
        shelf.offer("lease-1")
        await until(lambda: board.validated)
    assert [(KERNEL, b"bundle")] == examiner.seen
    assert [("lease-1", KERNEL)] == shelf.completed
    assert 1 == len(shelf.registered)


async def test_library_that_is_away(tmp_path, clock, judgement):
    """Every call survives a library that is not there yet, and no kernel is lost by it."""
    gone = Unavailable("connection refused")
    shelf = Shelf(failures={"register": [gone, gone], "lease": [gone], "complete": [gone, gone, None]})
    async with working(tmp_path, clock, shelf, judgement()) as (_, board, _bench):
        shelf.offer("lease-1")
        await until(lambda: board.validated)
    assert [("lease-1", KERNEL)] == shelf.completed


async def test_library_that_stays_away(tmp_path, clock, judgement):
    """A verdict that cannot be handed in is given up with its lease; the loop goes on with the next kernel."""
    shelf = Shelf(failures={"complete": [Unavailable("connection refused")] * 5})
    async with working(tmp_path, clock, shelf, judgement(), judgement()) as (_, board, _bench):
        shelf.offer("lease-1")
        shelf.offer("lease-2")
        await until(lambda: board.validated)
    assert [("lease-2", KERNEL)] == shelf.completed


async def test_lease_is_kept_while_working(tmp_path, clock, judgement):
    """The lease is renewed while an evaluation runs, also past a renewal that failed."""
    shelf = Shelf(failures={"renew": [Unavailable("connection refused")]})

    async def slow():
        await until(lambda: shelf.renewals >= 3)
        return judgement()

    async with working(tmp_path, clock, shelf, slow) as (_, board, _bench):
        shelf.offer("lease-1")
        await until(lambda: board.validated)
    assert 3 <= shelf.renewals


async def test_lost_lease_stops_the_work(tmp_path, clock, judgement):
    """Work whose lease is lost is stopped at once; nothing is handed in, and the next kernel gets its turn."""
    shelf = Shelf(failures={"renew": [Stale("not held", reason="LEASE_LOST")]})
    stopped = asyncio.Event()

    async def endless():
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with working(tmp_path, clock, shelf, endless, judgement()) as (_, board, _bench):
        shelf.offer("lease-1")
        await asyncio.wait_for(stopped.wait(), 5)
        shelf.offer("lease-2")
        await until(lambda: board.validated)
    assert [("lease-2", KERNEL)] == shelf.completed
    assert [] == shelf.given_up


async def test_late_verdict_is_dropped(tmp_path, clock, judgement):
    """A verdict whose lease ran out in the last moment is not posted as given."""
    shelf = Shelf(failures={"complete": [Stale("not held", reason="LEASE_LOST")]})
    async with working(tmp_path, clock, shelf, judgement(), judgement()) as (_, board, _bench):
        shelf.offer("lease-1")
        shelf.offer("lease-2")
        await until(lambda: board.validated)
    assert [("lease-2", KERNEL)] == shelf.completed
    assert 1 == board.validated


async def test_no_judgement_is_told_as_such(tmp_path, clock):
    """Without a judgement the lease ends with the reason, for somebody else to try."""

    async def not_judged():
        raise NotJudged("the kernel is compiled for the moon", reason="TARGET_NOT_HERE")

    shelf = Shelf()
    async with working(tmp_path, clock, shelf, not_judged):
        shelf.offer("lease-1")
        await until(lambda: shelf.given_up)
    assert [("lease-1", "TARGET_NOT_HERE: the kernel is compiled for the moon")] == shelf.given_up
    assert [] == shelf.completed


async def test_corrupt_download_condemns_nobody(tmp_path, clock):
    """Bytes that are not the kernel's say nothing about the kernel: no verdict, another attempt."""
    shelf = Shelf(failures={"download": [Corrupt("blob has digest sha256:1, promised was sha256:0")]})
    async with working(tmp_path, clock, shelf) as (examiner, _, _bench):
        shelf.offer("lease-1")
        await until(lambda: shelf.given_up)
    assert "DOWNLOAD_CORRUPT: the download is not the kernel: blob has digest" in shelf.given_up[0][1]
    assert [] == examiner.seen


async def test_revoked_key_is_replaced(tmp_path, clock, judgement):
    """An engine whose key was revoked makes another, introduces it, and signs with nothing else."""
    first = KeyRing.open(tmp_path, clock).current.public.key_id
    shelf = Shelf(revoked={first})
    async with working(tmp_path, clock, shelf, judgement()) as (examiner, board, _bench):
        shelf.offer("lease-1")
        await until(lambda: board.validated)
        second = examiner.keys.current.public.key_id
    assert [first, second] == shelf.registered
    assert first != second
    assert (second,) == (KeyRing.open(tmp_path, clock).current.public.key_id,)


async def test_refused_verdict_leads_to_another_introduction(tmp_path, clock, judgement):
    """After VERDICT_INVALID the engine registers its key before it takes more work."""
    shelf = Shelf(failures={"complete": [InvalidInput("unknown key", reason="VERDICT_INVALID")]})
    async with working(tmp_path, clock, shelf, judgement(), judgement()) as (_, board, _bench):
        shelf.offer("lease-1")
        shelf.offer("lease-2")
        await until(lambda: board.validated)
    assert 2 == len(shelf.registered)
    assert [("lease-2", KERNEL)] == shelf.completed


@pytest.mark.parametrize("where", ["judge", "complete"])
async def test_defect_does_not_end_the_loop(tmp_path, clock, judgement, where):
    """An exception that nobody foresaw hands the kernel back at once, and does not end the engine."""

    async def defect():
        raise ZeroDivisionError

    shelf = Shelf(failures={"complete": [ZeroDivisionError("of ours")]} if where == "complete" else {})
    first = judgement() if where == "complete" else defect
    async with working(tmp_path, clock, shelf, first, judgement()) as (_, board, _bench):
        shelf.offer("lease-1")
        shelf.offer("lease-2")
        await until(lambda: board.validated)
    assert [("lease-2", KERNEL)] == shelf.completed
    assert [("lease-1", "ENGINE_DEFECT: the engine has a defect: ZeroDivisionError")] == shelf.given_up


async def test_drain_hands_back(tmp_path, clock):
    """A kernel that is still being judged when the time of the drain is up goes back to the library."""

    async def endless():
        await asyncio.Event().wait()

    shelf = Shelf()
    async with working(tmp_path, clock, shelf, endless, lease_s=30.0) as (examiner, _, _bench):
        shelf.offer("lease-1")
        await until(lambda: examiner.seen)
    assert [("lease-1", "the engine shuts down")] == shelf.given_up


async def test_drain_lets_the_last_kernel_end(tmp_path, clock, judgement):
    """A kernel that is almost judged at the drain is handed in, and no other is taken."""
    shelf = Shelf()
    release = asyncio.Event()

    async def almost():
        await release.wait()
        return judgement()

    async with working(tmp_path, clock, shelf, almost, drain_s=5.0) as (examiner, board, bench):
        shelf.offer("lease-1")
        await until(lambda: examiner.seen)
        bench._drain.set()
        shelf.offer("lease-2")
        release.set()
        await bench.stop()
    assert 1 == board.validated
    assert [("lease-1", KERNEL)] == shelf.completed


@pytest.mark.parametrize("failing", ["complete", "give_up"])
async def test_stop_without_start(tmp_path, clock, failing):
    """A bench that never began stops without a word."""
    shelf = Shelf(failures={failing: [Unavailable("gone")]})
    async with working(tmp_path, clock, shelf) as (_, _board, bench):
        await bench.stop()
        await bench.stop()
