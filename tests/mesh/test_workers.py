"""The pool of worker processes, with real processes."""
# ruff: noqa: ASYNC240  # small files of a test may block its loop

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from esper.mesh.errors import Unavailable
from esper.mesh.workers import (
    WorkerCrashed,
    WorkerError,
    WorkerMemory,
    WorkerPool,
    WorkerState,
    WorkerTimeout,
)

HERE = Path(__file__).parent
MIB = 1 << 20


@contextlib.asynccontextmanager
async def pool_of(size=1, **options):
    """A started pool over `worker_jobs`, closed at the end."""
    options = {
        "entry": "worker_jobs:do",
        "wall_limit_s": 20.0,
        "memory_limit_bytes": 256 * MIB,
        "python_path": (HERE,),
        "start_limit_s": 60.0,
        **options,
    }
    pool = WorkerPool(size=size, **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def gone(pid, within_s=5.0):
    """Whether a process ends (or is a zombie that somebody else has to bury) within some seconds."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


class TestJobs:
    async def test_result_carries_values_and_bytes(self):
        """A job's values arrive as they were, bytes included, in a warmed process that is not this one."""
        async with pool_of(warm="worker_jobs:warm") as pool:
            blob = os.urandom(3 * MIB)
            result = await pool.run({"do": "echo", "blob": blob, "empty": b"", "list": [1, 2.5, None, "ä"]})
        assert blob == result["blob"]
        assert b"" == result["empty"]
        assert [1, 2.5, None, "ä"] == result["list"]
        assert result["warm"]
        assert os.getpid() != result["pid"]

    async def test_worker_persists(self):
        """Jobs of one worker run in one process, until `recycle_after` of them have."""
        async with pool_of(recycle_after=2) as pool:
            pids = [(await pool.run({"do": "echo"}))["pid"] for _ in range(3)]
        assert pids[0] == pids[1] != pids[2]

    async def test_jobs_wait_for_a_free_worker(self):
        """More jobs than workers all get done, by no more processes than there are workers."""
        async with pool_of(size=2) as pool:
            results = await asyncio.gather(*(pool.run({"do": "echo", "n": n}) for n in range(7)))
        assert list(range(7)) == [result["n"] for result in results]
        assert len({result["pid"] for result in results}) <= 2

    async def test_progress(self):
        """What a job reports arrives in order, before its result."""
        seen = []
        async with pool_of() as pool:
            await pool.run({"do": "progress"}, on_progress=seen.append)
            await pool.run({"do": "progress"})
        assert [{"step": 0}, {"step": 1}, {"step": 2}] == seen

    async def test_output_of_a_job_disturbs_nothing(self):
        """What a job prints goes to standard error, not between the messages."""
        async with pool_of() as pool:
            assert (await pool.run({"do": "babble"})) == {"told": True}


class TestFailures:
    async def test_exception_is_told(self):
        """An exception arrives with its class and text, and the process lives on."""
        async with pool_of() as pool:
            with pytest.raises(WorkerError, match="LookupError: no kernel in there") as caught:
                await pool.run({"do": "fail"})
            assert (await pool.run({"do": "echo"}))["pid"]
            assert pool.workers()[0].starts == 1
        assert caught.value.kind == "LookupError"
        assert "worker_jobs.py" in caught.value.private

    @pytest.mark.parametrize(
        ("job", "words"),
        [
            ("die", "killed by SIGSEGV.*about to fall"),
            ("leave", "exited with status 7"),
            ("crash_in_native_code", "killed by SIGSEGV"),
            ("lie", "expected at most"),
        ],
    )
    async def test_crash_is_told_and_harms_only_its_job(self, job, words):
        """A job that takes its process down says how it ended; the worker is replaced."""
        async with pool_of() as pool:
            first = (await pool.run({"do": "echo"}))["pid"]
            with pytest.raises(WorkerCrashed, match=f"(?s){words}"):
                await pool.run({"do": job})
            assert first != (await pool.run({"do": "echo"}))["pid"]
            assert pool.workers()[0].starts == 2

    async def test_hang_is_killed(self):
        """A job that does not end is killed after its wall time, and the worker replaced."""
        async with pool_of() as pool:
            await pool.ready()
            began = time.monotonic()
            with pytest.raises(WorkerTimeout, match=r"did not end within 0\.3 s"):
                await pool.run({"do": "hang"}, wall_limit_s=0.3)
            assert time.monotonic() - began < 5
            assert (await pool.run({"do": "echo"}))["pid"]

    async def test_children_die_with_a_killed_job(self):
        """A compiler that a hanging job started does not outlive it."""
        seen = []
        async with pool_of() as pool:
            with pytest.raises(WorkerTimeout):
                await pool.run({"do": "hang_with_child"}, on_progress=seen.append, wall_limit_s=2.0)
        assert gone(seen[0]["child"])

    async def test_large_allocation_fails_alone(self):
        """One allocation beyond the limit fails in the job, whose worker lives on."""
        async with pool_of() as pool:
            assert (await pool.run({"do": "allocate", "bytes": 64 * MIB})) == {"length": 64 * MIB}
            with pytest.raises(WorkerMemory, match="more than 256 MiB of memory: MemoryError"):
                await pool.run({"do": "allocate", "bytes": 8 << 30})
            assert pool.workers()[0].starts == 1

    async def test_resident_memory_is_watched(self):
        """Where the address space is not limited, a worker that grows beyond the limit is killed."""
        async with pool_of(limit_address_space=False) as pool:
            with pytest.raises(WorkerMemory, match=r"the job held \d+ MiB of memory, limit \d+ MiB, and was killed"):
                await pool.run({"do": "swallow"})
            assert (await pool.run({"do": "echo"}))["pid"]

    async def test_memory_of_children_counts(self):
        """Memory taken by processes that a job starts counts as the job's."""
        async with pool_of() as pool:
            with pytest.raises(WorkerMemory, match="and was killed"):
                await pool.run({"do": "allocate_in_children"})

    async def test_broken_start_is_told(self):
        """A worker that cannot warm up fails its job with its last words, and the next job tries again."""
        async with pool_of(warm="worker_jobs:broken_warm") as pool:
            for _ in range(2):
                with pytest.raises(WorkerCrashed, match=r"(?s)did not start: exited with status 1.*libnothing\.so"):
                    await pool.run({"do": "echo"})
            assert pool.workers()[0].starts >= 2

    @pytest.mark.parametrize("what", ["esper.mesh.workers.Child.start", "esper.mesh.workers.tempfile.mkdtemp"])
    async def test_a_process_that_the_system_refuses_is_told(self, monkeypatch, what):
        """Where no process or no room is to be had, a job fails like any whose worker did not start; the next tries."""

        def refuse(*_args, **_options):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(what, refuse)
            async with pool_of() as pool:
                with pytest.raises(WorkerCrashed, match=r"did not start: .*temporarily unavailable") as caught:
                    await pool.run({"do": "echo"})
                assert "WORKER_NOT_STARTED" == caught.value.reason
                patch.undo()
                assert (await pool.run({"do": "echo"}))["pid"]

    async def test_slow_start_is_told(self):
        """A worker that does not get ready in time is killed and told as such."""
        async with pool_of(warm="worker_jobs:slow_warm", start_limit_s=0.5) as pool:
            with pytest.raises(WorkerCrashed, match=r"did not start: not ready after 0\.5 s"):
                await pool.ready()

    async def test_worker_killed_while_idle_is_replaced(self):
        """A worker that died between two jobs costs no job."""
        async with pool_of() as pool:
            pid = (await pool.run({"do": "echo"}))["pid"]
            os.kill(pid, signal.SIGKILL)
            assert gone(pid)
            assert pid != (await pool.run({"do": "echo"}))["pid"]


class TestConfinement:
    async def test_environment_is_scrubbed(self, monkeypatch):
        """Secrets of this process's environment are not in the worker's; named additions are."""
        monkeypatch.setenv("ESPER_AUTH__SECRET", "do-not-tell")
        async with pool_of(environ={"ESPER_JOB": "yes"}) as pool:
            seen = await pool.run({"do": "look"})
        assert "do-not-tell" not in str(seen["environ"])
        assert "yes" == seen["environ"]["ESPER_JOB"]
        assert str(Path.home()) != seen["environ"]["HOME"]

    async def test_jobs_have_a_private_directory(self):
        """Each job starts in a fresh directory, which nothing outlives."""
        async with pool_of() as pool:
            first = await pool.run({"do": "look"})
            second = await pool.run({"do": "look"})
            assert first["cwd"] != second["cwd"]
            assert not Path(first["cwd"]).exists()
            root = Path(first["cwd"]).parent.parent
            assert 0o700 == root.stat().st_mode & 0o777
        assert not root.exists()

    async def test_limits_hold_or_are_not_claimed(self, tmp_path):
        """Network and foreign files are refused exactly where the worker says that they are."""
        secret = tmp_path / "urabrask.key"
        secret.write_text("key")
        own = tmp_path / "cache"
        own.mkdir()
        async with pool_of(writable=(own,)) as pool:
            seen = await pool.run({"do": "look", "read": str(secret), "write": str(tmp_path / "planted")})
            inside = await pool.run({"do": "look", "write": str(own / "entry")})
            held = pool.workers()[0].held
        assert ("network: seccomp" in held) is not seen["network"]
        assert ("files: Landlock" in held) is not seen["read"]
        assert ("files: Landlock" in held) is not seen["write"]
        assert inside["write"]
        assert "parent death: SIGKILL" in held
        assert "memory: address space" in held

    async def test_other_processes_are_closed(self):
        """What is written of other processes, this one's environment above all, is refused to a confined worker."""
        others = [f"/proc/{os.getpid()}/{name}" for name in ("environ", "maps", "cmdline", "status")]
        async with pool_of() as pool:
            told = await pool.run(
                {"do": "peek", "paths": [*others, "/proc/self/status", "/proc/cpuinfo", "/etc/shadow"]}
            )
            held = pool.workers()[0].held
        if "files: Landlock" not in held:
            pytest.skip("this machine has no Landlock")
        seen = told["seen"]
        assert {None} == {seen[name] for name in (*others, "/etc/shadow")}
        assert seen["/proc/self/status"]
        assert seen["/proc/cpuinfo"]
        assert "privileges: none" in held
        assert {"0"} == {line.split()[1].strip("0") or "0" for line in told["capabilities"]}

    async def test_processes_cannot_leave(self):
        """Neither a session of its own nor a second fork takes a process out of reach of the kill."""
        seen = []
        async with pool_of() as pool:
            await pool.ready()
            if "processes: seccomp" not in pool.workers()[0].held:
                pytest.skip("this machine has no seccomp")
            job = asyncio.create_task(pool.run({"do": "escape"}, on_progress=seen.append))
            async with asyncio.timeout(15):
                while len(seen) < 2:  # noqa: ASYNC110  # the pool offers no event for it
                    await asyncio.sleep(0.01)
            assert all(psutil.pid_exists(told["orphan"]) for told in seen)
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
        assert all(gone(told["orphan"]) for told in seen)

    async def test_memory_outside_the_account_is_refused(self):
        """Files have a largest size, and memory that only looks like a file cannot be had."""
        async with pool_of(file_limit_bytes=4 * MIB) as pool:
            told = await pool.run({"do": "hoard", "bytes": 4 * MIB})
            held = pool.workers()[0].held
        assert not told["file"]
        assert ("processes: seccomp" in held) is not told["memfd"]
        assert ("files: Landlock" in held) is not told["shm"]

    @pytest.mark.parametrize("nameless", [False, True])
    async def test_files_are_watched(self, nameless):
        """A worker whose files hold too much together is killed, also when they have lost their names."""
        async with pool_of(file_limit_bytes=4 * MIB) as pool:
            with pytest.raises(WorkerMemory, match="the job held more than 4 MiB of files, and was killed"):
                await pool.run({"do": "hoard_many", "bytes": 1 << 16, "nameless": nameless})
            assert (await pool.run({"do": "echo"}))["pid"]

    async def test_limits_can_be_left_off(self, tmp_path):
        """A pool that is allowed network and files has both."""
        async with pool_of(network=True, files=True) as pool:
            seen = await pool.run({"do": "look", "write": str(tmp_path / "planted")})
        assert seen["network"]
        assert seen["write"]

    async def test_workers_die_with_a_killed_parent(self, tmp_path):
        """SIGKILL of the owner leaves no worker behind, not even one that hangs in a loop."""
        mark = tmp_path / "mark"
        script = (
            "import asyncio, sys\n"
            "from pathlib import Path\n"
            "from esper.mesh.workers import WorkerPool\n"
            "async def main():\n"
            "    pool = WorkerPool(size=1, entry='worker_jobs:do', wall_limit_s=600, memory_limit_bytes=1 << 30,\n"
            f"        python_path=(Path({str(HERE)!r}),), files=True)\n"
            f"    await pool.run({{'do': 'hang', 'mark': {str(mark)!r}}})\n"
            "asyncio.run(main())\n"
        )
        parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
        while not (mark.exists() and mark.read_text()):  # noqa: ASYNC110  # another process writes it
            await asyncio.sleep(0.05)
        worker = int(mark.read_text())
        assert psutil.pid_exists(worker)
        parent.kill()
        await parent.wait()
        assert gone(worker)


class TestLife:
    async def test_cancelled_job_is_killed(self):
        """Cancelling `run` ends the job's process at once and gives the worker to the next job."""
        async with pool_of() as pool:
            first = (await pool.run({"do": "echo"}))["pid"]
            task = asyncio.create_task(pool.run({"do": "hang"}, work_id="kernel-1"))
            while pool.workers()[0].state is not WorkerState.BUSY:  # noqa: ASYNC110  # the pool offers no event for it
                await asyncio.sleep(0.01)
            assert "kernel-1" == pool.workers()[0].work_id
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert gone(first)
            assert (await pool.run({"do": "echo"}))["pid"] != first
            assert "" == pool.workers()[0].work_id

    async def test_cancelled_while_starting(self):
        """A job that is cancelled while its worker starts leaves the start to the next job."""
        async with pool_of() as pool:
            task = asyncio.create_task(pool.run({"do": "echo"}))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await pool.run({"do": "echo"}))["pid"]
            assert 1 == pool.workers()[0].starts

    async def test_drain_lets_running_jobs_end(self):
        """A draining pool finishes what runs and refuses what is new."""
        async with pool_of() as pool:
            await pool.ready()
            task = asyncio.create_task(pool.run({"do": "echo", "n": 1}))
            await asyncio.sleep(0)
            await pool.drain()
            assert 1 == task.result()["n"]
            with pytest.raises(Unavailable, match="draining"):
                await pool.run({"do": "echo"})

    async def test_close_kills_and_is_safe(self):
        """Closing fails running jobs, leaves no process, and may be repeated."""
        async with pool_of() as pool:
            await pool.ready()
            pid = pool.workers()[0].pid
            task = asyncio.create_task(pool.run({"do": "hang"}))
            await asyncio.sleep(0.1)
            await pool.close()
            with pytest.raises((WorkerCrashed, Unavailable)):
                await task
            assert gone(pid)
            await pool.close()

    async def test_close_while_starting(self):
        """A pool closed before its workers are ready leaves none behind."""
        pool = WorkerPool(size=2, entry="worker_jobs:do", wall_limit_s=1, memory_limit_bytes=MIB, python_path=(HERE,))
        await pool.start()
        await asyncio.sleep(0.05)
        await pool.close()
        assert all(info.pid == 0 or gone(info.pid) for info in pool.workers())

    @pytest.mark.parametrize(
        "field", ["size", "wall_limit_s", "memory_limit_bytes", "file_limit_bytes", "start_limit_s", "recycle_after"]
    )
    def test_nonsense_is_refused(self, field):
        """Every number of a pool must be above zero."""
        options = {"size": 1, "entry": "a:b", "wall_limit_s": 1, "memory_limit_bytes": 1} | {field: 0}
        with pytest.raises(ValueError, match=f"{field} must be above 0, found 0"):
            WorkerPool(**options)


def test_a_worker_without_owner_ends():
    """The worker's program ends by itself when the parent that it was told of is not its parent."""
    run = subprocess.run(
        [sys.executable, "-m", "esper.mesh._worker", '{"parent": 1, "directory": "/", "writable": []}'],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert 1 == run.returncode
    assert b"" == run.stdout
