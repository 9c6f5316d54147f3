"""Whatever happens to a build harms that build only, and is told in its own words."""

import asyncio
import os
import signal
from dataclasses import replace

import psutil

from esper.kasmina.kernels import Tier, load_candidate
from esper.mesh.errors import Stale, Unavailable
from esper.tezzeret.orders import Order, Phase, Task
from esper.v1 import build_pb2
from tests.services.tezzeret.conftest import QUICK, VECTOR, sample, until, working


async def _busy(bench, limit_s=30.0):
    """The process id of a worker that has begun a job."""
    async with asyncio.timeout(limit_s):
        while True:
            for info in bench.forge.pool.workers():
                if info.state == "busy" and info.work_id.startswith("sha256:"):
                    return info.pid
            await asyncio.sleep(0.01)


async def test_a_killed_worker_costs_one_attempt(client, library):
    """SIGKILL in mid-build: the build is tried again, fails in the end with the signal's name, and others go on."""
    async with working(library) as bench:
        await client.submit(sample("hang_forever"))
        order = await client.order(sample("hang_forever"))
        for _ in range(2):
            os.kill(await _busy(bench), signal.SIGKILL)
            await asyncio.sleep(0.3)
        failed = await client.until(order.id)
        assert build_pb2.BUILD_STATE_FAILED == failed.state
        assert 2 == failed.attempts
        assert "was killed by SIGKILL" in failed.error
        healthy = await client.filled(sample())
        assert build_pb2.BUILD_STATE_SUCCEEDED == healthy.state


async def test_one_kill_is_survived(client, library):
    """A worker lost once is replaced, and the second attempt delivers."""
    async with working(library) as bench:
        await client.submit(sample("slow_one"))
        order = await client.order(sample("slow_one"))
        os.kill(await _busy(bench), signal.SIGKILL)
        built = await client.until(order.id)
        assert (build_pb2.BUILD_STATE_SUCCEEDED, 2) == (built.state, built.attempts)
        assert bench.forge.pool.workers()[0].starts == 2
        assert (1, 1) == (bench.board.succeeded, bench.board.failed)


async def test_a_hanging_build_is_cut_off(client, library):
    """After its wall time a build is killed with all that it started, and the next one is served."""
    async with working(library, wall_limit_s=4.0) as bench:
        await client.submit(sample("hang_forever"))
        order = await client.order(sample("hang_forever"))
        pid = await _busy(bench)
        failed = await client.until(order.id)
        assert build_pb2.BUILD_STATE_FAILED == failed.state
        assert "hang: the job did not end within 4 s" in failed.error
        assert not psutil.pid_exists(pid)
        assert build_pb2.BUILD_STATE_SUCCEEDED == (await client.filled(sample())).state


POISONS = {
    "crash_now": ("exited with status 3", 2),
    "segfault_now": ("was killed by SIGSEGV", 2),
    "raise_now": ("RuntimeError: a defect of the toolchain", 1),
    "refuse_it": ("collect2: error: ld returned 1 exit status", 1),
    "eat_all": ("memory", 2),
    "garbage_out": ("it is no kernel bundle", 2),
    "nothing_out": ("without a bundle", 2),
    "swap_it": ("vector:5->5:float32 portable, which was not ordered", 2),
}


async def test_poisoned_builds_fail_alone(client, library):
    """Crash, exception, hunger, garbage, a foreign kernel: each ends with its reason; only what may pass is retried."""
    async with working(library, memory=1 << 30):
        for name in (*POISONS, "healthy"):
            await client.submit(sample(name))
        orders = {name: await client.order(sample(name)) for name in (*POISONS, "healthy")}
        for name, (words, attempts) in POISONS.items():
            failed = await client.until(orders[name].id)
            assert build_pb2.BUILD_STATE_FAILED == failed.state
            assert words in failed.error, name
            assert attempts == failed.attempts, name
            assert len(failed.error.encode()) <= 8192
        assert build_pb2.BUILD_STATE_SUCCEEDED == (await client.until(orders["healthy"].id)).state


async def test_output_of_a_build_does_not_disturb_the_wire(client, library):
    """A tool that prints garbage on standard output still delivers its kernel."""
    async with working(library):
        assert build_pb2.BUILD_STATE_SUCCEEDED == (await client.filled(sample("chatter_on"))).state


async def test_a_long_build_keeps_its_lease(client, library):
    """A build that takes longer than its lease is done once, because the lease is renewed."""
    async with working(library, pace=replace(QUICK, lease_s=1.0)):
        built = await client.filled(sample("slow_one"))
        assert (build_pb2.BUILD_STATE_SUCCEEDED, 1) == (built.state, built.attempts)


async def test_a_drain_hands_the_build_back(client, library):
    """At a drain a running build goes back to the queue at once, and another forge fills it."""
    async with working(library) as bench:
        await client.submit(sample("slow_one"))
        order = await client.order(sample("slow_one"))
        await _busy(bench)
        bench.drain.set()
        await bench.stop()
        assert build_pb2.BUILD_STATE_QUEUED == (await client.build(order.id)).state
    async with working(library):
        assert build_pb2.BUILD_STATE_SUCCEEDED == (await client.until(order.id)).state


class Shelf:
    """A library in memory, which can be away, lose leases or refuse: what a real one does only on bad days."""

    def __init__(self, *orders):
        self.orders = list(orders)
        self.errors = {}
        self.done = []
        self.offered = []
        self.ended = asyncio.Event()

    def _raise(self, what):
        if self.errors.get(what):
            raise self.errors[what].pop(0)

    async def offer(self, blueprint):
        """Store a blueprint."""
        self._raise("offer")
        self.offered.append(blueprint.name)
        return True

    async def lease(self, holder, target, *, tiers, wait_s, lease_s):
        """The next order."""
        self._raise("lease")
        if not self.orders:
            await asyncio.sleep(wait_s)
            return None
        return self.orders.pop(0)

    async def renew(self, lease_id, lease_s):
        """Keep a lease."""
        self._raise("renew")

    async def upload(self, order, built):
        """Take a kernel."""
        self._raise("upload")

    async def succeed(self, lease_id, kernel_id):
        """End a lease."""
        self._end("succeed", lease_id, kernel_id)

    async def fail(self, lease_id, failure):
        """End a lease."""
        self._end("fail", lease_id, failure)

    def _end(self, what, lease_id, result):
        self._raise(what)
        self.done.append((what, lease_id, result))
        self.ended.set()


def leased(name, lease_id="a"):
    """An order under a lease."""
    blueprint = sample(name)
    order = Order(
        build_id="sha256:" + lease_id * 64,
        blueprint_id=blueprint.id,
        ir=blueprint.canonical_json().encode(),
        signature=VECTOR,
        target="",
        tier=Tier.PORTABLE,
    )
    return Task(lease_id, 1, order)


async def test_a_lost_lease_stops_the_build():
    """When the library has given the order to somebody else the worker is stopped, and the next order taken."""
    shelf = Shelf(leased("hang_forever", "a"), leased("sample", "b"))
    shelf.errors["renew"] = [Unavailable("for a moment"), Stale("lost", reason="LEASE_LOST")]
    async with working(shelf, pace=replace(QUICK, lease_s=0.3)) as bench, asyncio.timeout(30):
        await shelf.ended.wait()
        assert [("succeed", "b")] == [entry[:2] for entry in shelf.done]
        await asyncio.sleep(0.05)
        with bench.board.watch() as queue:
            assert 0 == len(queue)


async def test_a_library_that_is_away_is_waited_for():
    """Neither catalogue nor order nor kernel is lost while the library is away for a moment."""
    shelf = Shelf(leased("sample"))
    for what in ("offer", "lease", "upload", "succeed"):
        shelf.errors[what] = [Unavailable("away"), Unavailable("away")]
    async with working(shelf, offers=(sample("first"), sample("second"))), asyncio.timeout(30):
        await shelf.ended.wait()
        assert "succeed" == shelf.done[0][0]
        await until(lambda: len(shelf.offered) == 2)
    assert ["first", "second"] == shelf.offered


async def test_an_upload_that_is_refused_fails_the_attempt():
    """A library that does not take the kernel hears so, instead of waiting for the lease to run out."""
    shelf = Shelf(leased("sample"))
    shelf.errors["upload"] = [Unavailable("the disk is full")] * 9
    async with working(shelf), asyncio.timeout(30):
        await shelf.ended.wait()
    what, _, failure = shelf.done[0]
    assert ("fail", True) == (what, failure.retryable)
    assert "the disk is full" in failure.public


async def test_answers_that_come_too_late_end_nothing():
    """A lease lost at the very end costs the result and nothing else."""
    shelf = Shelf(leased("sample", "a"), leased("raise_now", "b"), leased("sample", "c"))
    shelf.errors["succeed"] = [Stale("lost", reason="LEASE_LOST")]
    shelf.errors["fail"] = [Stale("lost", reason="LEASE_LOST")]
    async with working(shelf) as bench, asyncio.timeout(30):
        await shelf.ended.wait()
        assert [("succeed", "c")] == [entry[:2] for entry in shelf.done]
        await until(lambda: bench.board.succeeded)
        assert (1, 1) == (bench.board.succeeded, bench.board.failed)


async def test_a_defect_of_the_forge_does_not_end_its_day(capfd):
    """An unforeseen exception is logged with its traceback, its order ends as failed, and the next one is filled."""
    shelf = Shelf(leased("sample", "a"), leased("sample", "b"))
    shelf.errors["upload"] = [ZeroDivisionError("a defect")]
    async with working(shelf) as bench:
        await until(lambda: len(shelf.done) == 2)
        (what, lease, failure), succeeded = shelf.done
        assert ("fail", "a", True, "FORGE_DEFECT") == (what, lease, failure.retryable, failure.reason)
        assert ("succeed", "b") == succeeded[:2]
        await until(lambda: bench.board.succeeded)
        assert 1 == bench.board.failed
        with bench.board.watch() as queue:
            assert 0 == len(queue)
    assert "a defect" in capfd.readouterr().err


async def test_workers_that_cannot_start_are_told(capfd):
    """A forge whose workers do not start takes no orders and says why, again and again."""
    shelf = Shelf(leased("sample"))
    async with working(shelf, entry="no_such_module:job"), asyncio.timeout(30):
        await until(lambda: "WORKERS_BROKEN" in capfd.readouterr().err)
    assert 1 == len(shelf.orders)


async def test_steps_are_told_in_order(client, library):
    """A watcher sees a build from its lease to its kernel, and one who comes in the middle sees where it stands."""
    async with working(library) as bench:
        with bench.board.watch() as queue:
            await client.submit(sample("slow_one"))
            order = await client.order(sample("slow_one"))
            await _busy(bench)
            async with asyncio.timeout(30):
                while True:
                    with bench.board.watch() as late:
                        if [Phase.COMPILING] == [step.phase for step in late.drain_now()]:
                            break
                    await asyncio.sleep(0.01)
            built = await client.until(order.id)
            async with asyncio.timeout(10):
                steps = [await anext(queue)]
                while not steps[-1].phase.final:
                    steps.append(await anext(queue))
        assert ["leased", "compiling", "exporting", "uploading", "succeeded"] == [step.phase for step in steps]
        assert steps[-1].kernel_id == built.kernel_id
        assert sorted(step.elapsed_s for step in steps) == [step.elapsed_s for step in steps]
        assert (
            load_candidate((await client.download(built.kernel_id))[1], built.kernel_id).manifest.blueprint_id
            == sample("slow_one").id
        )
