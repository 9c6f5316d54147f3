"""Worker processes for work that may crash, hang or eat memory: compilers, and kernels that nobody has judged yet.

Typical use::

    pool = WorkerPool(size=2, entry="esper.tezzeret.worker:compile_job", wall_limit_s=300, memory_limit_bytes=4 << 30)
    await pool.start()                            # returns at once; workers warm up meanwhile
    result = await pool.run({"ir": text, "bundle": data}, work_id=build.id, on_progress=show)
    await pool.close()

The entry is `def compile_job(job: dict[str, Any], report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]`.
Jobs, progress and results are JSON values; top-level values may be `bytes`. Nothing is pickled, because what a worker
says is not to be trusted. Whatever becomes of one job harms no other: its process is killed with all its children and
replaced.

Each worker is a fresh interpreter (started, not forked, so gRPC's threads are no danger) in a process group of its
own. It dies with its parent, has an environment of a few named variables, a private directory, and on Linux neither
network nor files beyond what it was given, no privileges, and no way out of its process group; `WorkerInfo.held` says
which of these limits the machine enforces.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from esper.mesh._process import Child, Launch, mib
from esper.mesh.errors import InternalError, Unavailable
from esper.mesh.logging import get_logger

__all__ = [
    "WorkerCrashed",
    "WorkerError",
    "WorkerFailed",
    "WorkerInfo",
    "WorkerMemory",
    "WorkerPool",
    "WorkerState",
    "WorkerTimeout",
]

log = get_logger(__name__)

MEMORY_POLL_S = 0.05
"""Time between looks at a worker's resident memory. At 2 GB/s of page faults a bomb overshoots by 100 MB."""


class WorkerFailed(InternalError):
    """A job that gave no result; one of the four children below says why. `public` is written for people."""

    default_reason = "WORKER_FAILED"


class WorkerError(WorkerFailed):
    """The job raised an exception; the worker lives on."""

    default_reason = "WORKER_ERROR"

    @property
    def kind(self) -> str:
        """Name of the class of the job's exception."""
        return self.metadata.get("kind", "")


class WorkerCrashed(WorkerFailed):
    """The process ended in mid-job: a signal, an exit, nonsense on the wire.

    Also raised with the reason WORKER_NOT_STARTED where no process could be started: the job is not to blame then.
    """

    default_reason = "WORKER_CRASHED"


class WorkerTimeout(WorkerFailed):
    """The job ran past its wall time and was killed."""

    default_reason = "WORKER_TIMEOUT"


class WorkerMemory(WorkerFailed):
    """The job asked for more memory than it may have, or filled more files."""

    default_reason = "WORKER_MEMORY"


class WorkerState(StrEnum):
    """What a worker does."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker, as seen now."""

    index: int
    """Its number, from 0; kept when the process is replaced."""
    pid: int
    """Process id; 0 before the first start."""
    state: WorkerState
    work_id: str
    """What it works on; empty when idle."""
    starts: int
    """Processes started under this number."""
    held: tuple[str, ...]
    """Limits that the machine enforces on it, in words; empty until it is ready."""


@dataclass(eq=False)
class _Slot:
    index: int
    child: Child | None = None
    starting: "asyncio.Task[Child] | None" = None
    work_id: str = ""
    starts: int = 0
    jobs: int = 0

    def info(self) -> WorkerInfo:
        child = self.child
        if child is None or not child.alive or (self.starting is not None and not self.starting.done()):
            state = WorkerState.STARTING
        else:
            state = WorkerState.BUSY if self.work_id else WorkerState.IDLE
        held = () if child is None else child.held
        return WorkerInfo(self.index, 0 if child is None else child.pid, state, self.work_id, self.starts, held)


@dataclass
class WorkerPool:
    """A fixed number of persistent workers; jobs wait for a free one in order of arrival.

    Not thread-safe: it belongs to one event loop.
    """

    size: int
    """Workers."""
    entry: str
    """`module:function` that does a job, imported in the worker."""
    wall_limit_s: float
    """Longest a job may take; `run` may say otherwise for one job. Warming up does not count."""
    memory_limit_bytes: int
    """Memory that a job may use beyond what the warm worker holds. Enforced twice: allocations beyond it fail, and a
    worker whose resident memory exceeds it anyway is killed."""
    warm: str = ""
    """`module:function()` called once in each new worker: heavy imports belong there."""
    start_limit_s: float = 120.0
    """Longest a worker may take to get ready."""
    network: bool = False
    """True leaves the worker the network."""
    files: bool = False
    """True leaves the worker all files of this user."""
    writable: Sequence[Path] = ()
    """Directories, besides its own, that a worker may write to (and read). They must exist."""
    python_path: Sequence[Path] = ()
    """Further directories to import from."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Further variables of the worker's environment."""
    limit_address_space: bool = True
    """False leaves only the watch over resident memory: CUDA reserves more addresses than any sensible limit."""
    file_limit_bytes: int = 1 << 30
    """Bytes that the files in a worker's own directory may hold together, looked at twice a second, and that any file
    that it writes may hold. On some machines such files are memory."""
    recycle_after: int = 64
    """Jobs after which a worker is replaced, since native libraries that a job loaded are never unloaded."""
    max_message_bytes: int = 1 << 30
    """Largest job."""
    max_result_bytes: int = 1 << 30
    """Largest result believed, and largest report of progress."""
    max_reports: int = 1000
    """Reports of progress that one job may send; a worker that sends more is killed."""

    def __post_init__(self) -> None:
        for name in (
            "size",
            "wall_limit_s",
            "memory_limit_bytes",
            "file_limit_bytes",
            "start_limit_s",
            "recycle_after",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"worker pool: {name} must be above 0, found {getattr(self, name)}")
        self._slots = [_Slot(index) for index in range(self.size)]
        self._free: asyncio.LifoQueue[_Slot] = asyncio.LifoQueue()
        for slot in reversed(self._slots):
            self._free.put_nowait(slot)
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._root: Path | None = None

    async def start(self) -> None:
        """Begin to start every worker; does not wait for them."""
        for slot in self._slots:
            self._begin(slot)

    async def ready(self) -> None:
        """Wait until every worker has warmed up.

        Raises:
            WorkerCrashed: one of them could not be started; the text says why.
        """
        await asyncio.gather(*(self._ready(slot) for slot in self._slots))

    def workers(self) -> tuple[WorkerInfo, ...]:
        """The workers as they are now."""
        return tuple(slot.info() for slot in self._slots)

    async def run(
        self,
        job: Mapping[str, Any],
        *,
        work_id: str = "job",
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        wall_limit_s: float | None = None,
    ) -> dict[str, Any]:
        """Do a job in the next free worker and return its result. Cancelling kills the job.

        Raises:
            Unavailable: the pool is draining or closed.
            WorkerError: the job raised an exception.
            WorkerTimeout: it took longer than `wall_limit_s`.
            WorkerMemory: it needed more than `memory_limit_bytes`.
            WorkerCrashed: its process ended, or no process could be started.
        """
        self._refuse_when_closed()
        current = asyncio.current_task()
        if current is not None:
            self._running.add(current)
        try:
            slot = await self._free.get()
            try:
                self._refuse_when_closed()
                slot.work_id = work_id
                return await self._attempt(slot, job, on_progress, wall_limit_s or self.wall_limit_s)
            finally:
                slot.work_id = ""
                self._free.put_nowait(slot)
        finally:
            if current is not None:
                self._running.discard(current)

    async def drain(self) -> None:
        """Take no more jobs and wait for those that run."""
        self._closed = True
        others = self._running - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    async def close(self) -> None:
        """Kill what runs and remove every trace. Safe to call twice, and without `start`."""
        self._closed = True
        for slot in self._slots:
            if slot.starting is not None:
                slot.starting.cancel()
                await asyncio.gather(slot.starting, return_exceptions=True)
            if slot.child is not None:
                await slot.child.kill()
        root, self._root = self._root, None
        if root is not None:
            await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise Unavailable("the workers are draining: expected jobs before the drain only", reason="DRAINING")

    def _begin(self, slot: _Slot) -> "asyncio.Task[Child]":
        self._refuse_when_closed()
        # A start that failed while nobody waited is in the log; the next job deserves another attempt.
        if slot.starting is None or _failed(slot.starting):
            slot.starting = asyncio.create_task(self._launch(slot), name=f"worker-{slot.index}-start")
            slot.starting.add_done_callback(_failed)
        return slot.starting

    async def _ready(self, slot: _Slot) -> Child:
        if slot.starting is None and slot.child is not None and slot.child.alive and slot.jobs < self.recycle_after:
            return slot.child
        starting = self._begin(slot)
        try:
            # Shielded: a caller who loses patience must not stop a start that the next one will be glad of.
            return await asyncio.shield(starting)
        finally:
            if starting.done() and slot.starting is starting:
                slot.starting = None

    async def _launch(self, slot: _Slot) -> Child:
        if slot.child is not None:
            await slot.child.kill()
        slot.starts += 1
        slot.jobs = 0
        child = slot.child = await self._spawn(slot)
        try:
            async with asyncio.timeout(self.start_limit_s):
                await child.become_ready()
        except (TimeoutError, ValueError, EOFError, OSError) as error:
            late = isinstance(error, TimeoutError)
            ending = f"not ready after {self.start_limit_s:g} s" if late else await child.ending()
            await child.kill()
            log.warning("worker did not start", worker=slot.index, entry=self.entry, ending=ending, output=child.tail())
            words = child.tail() or "none"
            raise self._not_started(slot, f"{ending}; its last words: {words}") from error
        except asyncio.CancelledError:
            await child.kill()
            raise
        return child

    async def _spawn(self, slot: _Slot) -> Child:
        try:
            return await Child.start(self._plan(slot))
        except OSError as error:
            # No process, no memory or no room for another one: it may pass, and the next job tries again.
            log.warning("worker did not start", worker=slot.index, entry=self.entry, ending=str(error))
            raise self._not_started(slot, str(error)) from error

    def _not_started(self, slot: _Slot, ending: str) -> WorkerCrashed:
        return WorkerCrashed(
            f"worker {slot.index} of {self.entry} did not start: {ending}", reason="WORKER_NOT_STARTED"
        )

    def _plan(self, slot: _Slot) -> Launch:
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="esper-workers-"))
        return Launch(
            entry=self.entry,
            warm=self.warm,
            directory=self._root / f"{slot.index}-{slot.starts}",
            network=self.network,
            files=not self.files,
            writable=tuple(self.writable),
            python_path=tuple(self.python_path),
            environ=self.environ,
            memory=self.memory_limit_bytes if self.limit_address_space else 0,
            file_limit_bytes=self.file_limit_bytes,
            max_message_bytes=self.max_message_bytes,
            max_result_bytes=self.max_result_bytes,
        )

    async def _attempt(
        self,
        slot: _Slot,
        job: Mapping[str, Any],
        on_progress: Callable[[dict[str, Any]], None] | None,
        wall_limit_s: float,
    ) -> dict[str, Any]:
        child = await self._ready(slot)
        slot.jobs += 1
        try:
            message = await self._converse(child, job, on_progress, wall_limit_s)
        except BaseException:
            await child.kill()
            raise
        finally:
            if not self._closed and (not child.alive or slot.jobs >= self.recycle_after):
                self._begin(slot)
        if message["type"] == "result":
            prefix = "value."
            return {key.removeprefix(prefix): value for key, value in message.items() if key.startswith(prefix)}
        text = f"{message.get('kind')}: {message.get('text')}"
        if message.get("memory"):
            raise WorkerMemory(f"the job needed more than {mib(self.memory_limit_bytes)} of memory: {text}")
        raise WorkerError(text, metadata={"kind": str(message.get("kind"))}, private=str(message.get("traceback")))

    async def _converse(
        self,
        child: Child,
        job: Mapping[str, Any],
        on_progress: Callable[[dict[str, Any]], None] | None,
        wall_limit_s: float,
    ) -> dict[str, Any]:
        ceiling = child.warm_bytes + self.memory_limit_bytes
        watch = asyncio.create_task(child.kill_above(ceiling, MEMORY_POLL_S), name="worker-memory")
        try:
            async with asyncio.timeout(wall_limit_s):
                await child.send(job)
                for _ in range(self.max_reports + 1):
                    message = await child.receive()
                    kind = message.get("type")
                    if kind in {"result", "error"}:
                        return message
                    if kind == "progress" and on_progress is not None and isinstance(message.get("value"), dict):
                        on_progress(message["value"])
                raise WorkerCrashed(f"the worker sent more than {self.max_reports} reports of progress and was killed")
        except TimeoutError as error:
            raise WorkerTimeout(f"the job did not end within {wall_limit_s:g} s and was killed") from error
        except (EOFError, OSError, ValueError) as error:
            if child.overrun:
                raise WorkerMemory(f"the job held {child.overrun}, and was killed") from error
            reason = f"sent no {error}" if isinstance(error, ValueError) else await child.ending()
            raise WorkerCrashed(f"the worker {reason}; its last words: {child.tail() or 'none'}") from error
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)


def _failed(task: "asyncio.Task[Child]") -> bool:
    """Whether a start has failed; asking counts as taking note of its exception."""
    return task.done() and (task.cancelled() or task.exception() is not None)
