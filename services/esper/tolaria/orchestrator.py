"""Runs from request to end: queue, processes, pauses, resumes, watchers. Pure logic over a store and processes.

Runs wait in the order in which they were asked for; at most `max_parallel` train at one time. A STATIC run waits
until the run that it refers to has finished. A process tells what it does in its folder; the supervisor looks there a
few times a second, tells watchers what is new, notices processes that are gone, and starts the next in the queue.
Stopping the service stops no training: the next service finds the processes again.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from esper.mesh.errors import Conflict, EsperError
from esper.mesh.logging import get_logger
from esper.mesh.streams import BoundedQueue, Overflow, sleep_or_drain
from esper.tolaria import recipes
from esper.tolaria.admission import check_boundary, check_request, check_room
from esper.tolaria.blackbox import ended_by_kernel
from esper.tolaria.core import RESUMABLE, SETTLED, STOPPABLE, Arm, RunRecord, RunSpec, RunState, View
from esper.tolaria.overrides import apply
from esper.tolaria.rundir import Command
from esper.tolaria.store import new_run_id
from esper.tolaria.worker import Launch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime
    from pathlib import Path

    from esper.tolaria.core import ProcessMark
    from esper.tolaria.processes import Processes
    from esper.tolaria.store import RunStore
    from esper.tolaria.tokens import TokenWriter

__all__ = ["Limits", "Orchestrator"]

_log = get_logger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _alone(
    method: Callable[Concatenate[Orchestrator, _P], _T],
) -> Callable[Concatenate[Orchestrator, _P], _T]:
    """One of these at a time: they are called from threads, because they flush files."""

    @functools.wraps(method)
    def locked(self: Orchestrator, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of an orchestrator."""

    max_parallel: int = 2
    """Training processes at one time."""
    max_queued: int = 64
    """Runs that may wait."""
    stop_grace_s: float = 5.0
    """Time that a process gets to checkpoint after it was told to stop."""
    max_attempts: int = 16
    """Processes of one run until which one that a kernel took down is followed by another without being asked."""
    look_every_s: float = 0.2
    """Time between two looks at the folders of the runs."""


class Orchestrator:
    """Everything that happens to runs.

    Args:
        store: where runs are kept.
        processes: what runs them.
        limits: bounds.
        clock: aware UTC time.
        mesh: gives the address that training processes find the mesh at; empty for none.
        token: identity of training processes; None to let them call as clients of this machine.
        cache_dir: folder of the kernel cache that all runs share.
    """

    def __init__(
        self,
        store: RunStore,
        processes: Processes,
        *,
        limits: Limits,
        clock: Callable[[], datetime],
        mesh: Callable[[], str],
        token: TokenWriter | None,
        cache_dir: Path,
    ) -> None:
        self.store = store
        self._processes = processes
        self._limits = limits
        self._clock = clock
        self._mesh = mesh
        self._token = token
        self._cache_dir = cache_dir
        self._watchers: dict[str, set[BoundedQueue[View]]] = {}
        self._quiet: set[str] = set()
        self._stopping: set[str] = set()
        self._look_now = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.lock = threading.RLock()

    # What clients ask for

    @_alone
    def start(self, spec: RunSpec, request_id: str) -> View:
        """Promise a run; it begins when its turn comes.

        Raises:
            NotFound: RECIPE_NOT_FOUND, or RUN_NOT_FOUND for the reference.
            InvalidInput: OVERRIDE_UNKNOWN, OVERRIDE_INVALID.
            Conflict: DATA_MISSING, REFERENCE_NOT_GROWN.
            LimitExceeded: TOO_MANY_RUNS.
        """
        known = self.store.by_request(request_id)
        if known is not None:
            return self.store.view(known.id)
        config = apply(recipes.get(spec.recipe).build(), {**spec.overrides, "seed": spec.seed})
        check_request(spec, config, self.store)
        check_room(len(self._queue()), self._limits.max_queued)
        now = self._clock()
        record = RunRecord(
            id=new_run_id(spec.recipe, now), spec=spec, create_time=now, update_time=now, request_id=request_id
        )
        self.store.create(record, config)
        self._wake()
        return self.store.view(record.id)

    @_alone
    def pause(self, run_id: str) -> View:
        """Ask a run to checkpoint and pause; one that still waits in the queue pauses at once.

        Raises:
            NotFound: RUN_NOT_FOUND.
            Conflict: RUN_NOT_RUNNING.
        """
        seen = self.store.view(run_id)
        if seen.state is RunState.PAUSED:
            return seen
        if seen.state in SETTLED:
            raise Conflict(
                f"run {run_id} is {seen.state.value}: expected one that is preparing or running",
                reason="RUN_NOT_RUNNING",
            )
        if seen.record.process is None:
            return self._settle(seen.record, RunState.PAUSED, "")
        self.store.run_dir(run_id).write_command(Command(seen.record.attempt, "pause"))
        return seen

    @_alone
    def resume(self, run_id: str, boundary: int | None) -> View:
        """Go on from the last checkpoint, or from that of a boundary; the run waits for its turn.

        Raises:
            NotFound: RUN_NOT_FOUND, CHECKPOINT_NOT_FOUND.
            Conflict: RUN_NOT_RESUMABLE.
        """
        seen = self.store.view(run_id)
        if seen.state in {RunState.PREPARING, RunState.RUNNING}:
            return seen
        if seen.state not in RESUMABLE:
            raise Conflict(
                f"run {run_id} is {seen.state.value}: expected one that is paused, failed or interrupted",
                reason="RUN_NOT_RESUMABLE",
            )
        if boundary is not None:
            check_boundary(self.store.run_dir(run_id), boundary)
        self._quiet.discard(run_id)
        return self._again(seen.record, boundary)

    def _again(self, record: RunRecord, boundary: int | None = None) -> View:
        """Have another process go on from the last checkpoint, or from that of a boundary."""
        self.store.update(
            replace(
                record,
                attempt=record.attempt + 1,
                process=None,
                verdict=None,
                error="",
                resume_boundary=boundary,
                update_time=self._clock(),
            )
        )
        self._wake()
        return self.store.view(record.id)

    async def stop(self, run_id: str) -> View:
        """End a run for good; returns once its process is gone.

        Raises:
            NotFound: RUN_NOT_FOUND.
            Conflict: RUN_FINISHED.
        """
        seen = await asyncio.to_thread(self.store.view, run_id)
        if seen.state is RunState.STOPPED:
            return seen
        if seen.state not in STOPPABLE:
            raise Conflict(
                f"run {run_id} has {seen.state.value} already: nothing is left to stop", reason="RUN_FINISHED"
            )
        if seen.record.process is not None:
            self._stopping.add(run_id)
            try:
                await self._end(seen.record, seen.record.process)
            finally:
                self._stopping.discard(run_id)
        return await asyncio.to_thread(self._stopped, run_id)

    async def _end(self, record: RunRecord, mark: ProcessMark) -> None:
        """Ask a process to end, wait, end it."""
        await asyncio.to_thread(self.store.run_dir(record.id).write_command, Command(record.attempt, "stop"))
        deadline = self._loop.time() + self._limits.stop_grace_s
        while self._processes.alive(mark) and self._loop.time() < deadline:  # noqa: ASYNC110  # processes set no events
            await asyncio.sleep(0.05)
        self._processes.kill(mark)
        while self._processes.alive(mark):  # noqa: ASYNC110  # see above
            await asyncio.sleep(0.02)

    @_alone
    def _stopped(self, run_id: str) -> View:
        seen = self.store.view(run_id)
        # It may have come to its end before it heard us.
        return seen if seen.state is RunState.SUCCEEDED else self._settle(seen.record, RunState.STOPPED, "")

    async def watch(self, run_id: str) -> AsyncIterator[View]:
        """The run as it is now, then each change; ends once it is settled. A slow reader sees the newest only.

        Raises:
            NotFound: RUN_NOT_FOUND.
        """
        seen = self.store.view(run_id)
        queue: BoundedQueue[View] = BoundedQueue(1, Overflow.COALESCE, key=lambda _: 0)
        self._watchers.setdefault(run_id, set()).add(queue)
        try:
            yield seen
            if seen.state in SETTLED:
                return
            last = _position(seen)
            # What happened between the first look and now must not be lost.
            queue.put(self.store.view(run_id))
            async for seen in queue:
                # Looks are taken on several threads: an older one may arrive after a newer one.
                if _position(seen) > last:
                    last = _position(seen)
                    yield seen
                if seen.state in SETTLED:
                    return
        finally:
            self._watchers[run_id].discard(queue)
            if not self._watchers[run_id]:
                del self._watchers[run_id]

    # The supervisor

    async def supervise(self, drain: asyncio.Event) -> None:
        """Look after the runs until the drain."""
        while not drain.is_set():
            try:
                await asyncio.to_thread(self.look)
            except Exception:  # noqa: BLE001  # whatever is wrong with one look, the next one must still happen
                _log.exception("supervisor could not look after the runs")
            waiting = asyncio.ensure_future(self._look_now.wait())
            sleeping = asyncio.ensure_future(sleep_or_drain(self._limits.look_every_s, drain))
            await asyncio.wait({waiting, sleeping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (waiting, sleeping):
                task.cancel()
            self._look_now.clear()

    @_alone
    def look(self) -> None:
        """Notice what changed, mark processes that are gone, start what may start; renew what they call with."""
        if self._token is not None:
            self._token.renew()
        running = 0
        for record in self.store.records():
            if record.id in self._quiet:
                continue
            seen = self.store.view(self._adopted(record).id)
            mark = seen.record.process
            alive = mark is not None and self._processes.alive(mark)
            running += alive
            if mark is not None and not alive and seen.state not in SETTLED:
                seen = self._gone(seen.record)
            if seen.state in SETTLED and not alive:
                self._quiet.add(record.id)
            self._tell(seen)
        self._start_next(self._limits.max_parallel - running)

    def _adopted(self, record: RunRecord) -> RunRecord:
        """A record without a process whose process speaks nevertheless: the service was killed while starting it."""
        if record.process is None and record.verdict is None:
            status = self.store.run_dir(record.id).status()
            if status is not None and status.attempt == record.attempt and status.process is not None:
                record = replace(record, process=status.process)
                self.store.update(record)
        return record

    def _gone(self, record: RunRecord) -> View:
        # It may have said its last word between our look at its status and our look at the process.
        seen = self.store.view(record.id)
        if seen.state in SETTLED or record.id in self._stopping:
            return seen
        at = f"step {seen.progress.step}" if seen.progress else "its start"
        why = ended_by_kernel(self.store.run_dir(record.id).path)
        _log.warning("training process gone", run_id=record.id, at=at, why=why)
        if why and record.attempt < self._limits.max_attempts:
            # The next process does without that kernel: it can not end in the same way.
            return self._again(record)
        return self._settle(
            record,
            RunState.INTERRUPTED,
            f"the training process ended without a word at about {at} (killed, out of memory, or the machine "
            "went down); "
            "ResumeRun goes on from the last checkpoint, log.txt may tell more",
        )

    @_alone
    def _settle(self, record: RunRecord, state: RunState, error: str) -> View:
        self.store.update(replace(record, verdict=state, error=error, update_time=self._clock()))
        seen = self.store.view(record.id)
        self._tell(seen)
        self._wake()
        return seen

    def _tell(self, seen: View) -> None:
        for queue in tuple(self._watchers.get(seen.record.id, ())):
            self._loop.call_soon_threadsafe(queue.put, seen)

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._look_now.set)

    def _queue(self) -> list[RunRecord]:
        """Runs that wait, in the order in which they will start."""
        return [
            record
            for record in self.store.records()
            if record.process is None
            and record.verdict is None
            and self.store.view(record.id).state is RunState.PREPARING
        ]

    def _start_next(self, room: int) -> None:
        for record in self._queue():
            if room <= 0:
                return
            if record.spec.arm is Arm.STATIC and not self._reference_ready(record):
                continue
            self._launch(record)
            room -= 1

    def _reference_ready(self, record: RunRecord) -> bool:
        """Whether a static run may start; it fails with its reference, and waits for one that can be resumed."""
        reference = self.store.view(record.spec.reference_run_id)
        if reference.state is RunState.SUCCEEDED:
            return True
        if reference.state in {RunState.FAILED, RunState.STOPPED}:
            self._settle(
                record,
                RunState.FAILED,
                f"run {reference.record.id}, whose modules this run takes, has {reference.state.value}: "
                "expected it to succeed",
            )
        return False

    def _launch(self, record: RunRecord) -> None:
        try:
            mesh = self._mesh()
        except EsperError as error:
            _log.warning("training without a mesh", run_id=record.id, error=str(error))
            mesh = ""
        launch = Launch(
            attempt=record.attempt,
            mesh=mesh,
            token_file="" if self._token is None else str(self._token.path.absolute()),
            cache_dir=str(self._cache_dir),
            resume_boundary=record.resume_boundary,
        )
        try:
            mark = self._processes.start(self.store.run_dir(record.id), launch)
        except OSError as error:
            self._settle(record, RunState.FAILED, f"the training process could not be started: {error.strerror}")
            return
        self.store.update(replace(record, process=mark, update_time=self._clock()))
        _log.info("run started", run_id=record.id, attempt=record.attempt, pid=mark.pid)


def _position(seen: View) -> tuple[int, bool, int, bool]:
    """Grows with everything that happens to a run."""
    sequence = seen.progress.sequence if seen.progress else 0
    return seen.record.attempt, seen.state in SETTLED, sequence, seen.state is RunState.RUNNING
