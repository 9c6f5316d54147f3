"""The training process: ``python -m esper.tolaria.worker RUN_DIR``, started by the service in a session of its own.

Launch parameters (attempt, address of the mesh) come as one line of JSON on standard input. The process talks to the
service through the run's folder alone, outlives it, and is found again by the next one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from esper.mesh.errors import EsperError, InternalError
from esper.mesh.logging import LoggingSettings, configure, get_logger, shutdown
from esper.tolaria.core import NO_PROGRESS, ProcessMark, Progress, Result, RunState, Status
from esper.tolaria.desk import Desk
from esper.tolaria.rundir import RunDir
from esper.tolaria.tokens import TokenReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.cache import Fetched
    from esper.kasmina.control import ControlPlane
    from esper.tolaria.checkpoints import CheckpointStore, CheckpointWriter, Snapshot
    from esper.tolaria.config import MachineConfig, RunConfig
    from esper.tolaria.core import RunSpec
    from esper.tolaria.data.base import Dataset
    from esper.tolaria.growing import Network
    from esper.tolaria.trainer import Outcome, Trainer

__all__ = ["Launch", "main"]

_log = get_logger(__name__)
_FAILED, _OK = 1, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the service tells a process at its start."""

    attempt: int = 1
    """Number of this attempt at the run."""
    mesh: str = ""
    """``host:port`` of the mesh; empty to train without one."""
    token_file: str = ""
    """File with the token to call with, which the service keeps fresh; empty calls as a client of this machine."""
    cache_dir: str = ""
    """Folder of the kernel cache that all runs share; empty keeps kernels in memory only."""
    resume_boundary: int | None = None
    """Boundary of the checkpoint to go on from; None for the last, or for none."""

    @classmethod
    def from_line(cls, line: str) -> Launch:
        """Read the line that the service writes; nothing at all means the defaults."""
        return cls(**json.loads(line)) if line.strip() else cls()

    def token(self) -> TokenReader | None:
        """Gives the token to call with; None to call without one."""
        return TokenReader(Path(self.token_file)) if self.token_file else None

    def line(self) -> str:
        """What `from_line` reads."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}) + "\n"


def prepare_torch(machine: MachineConfig) -> None:
    """Fix everything about torch that would make two equal runs differ."""
    import torch

    torch.set_num_threads(machine.threads)
    if machine.deterministic:
        # Needed by cuBLAS alone, read by it at its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)


def connect_mesh(launch: Launch) -> ControlPlane | None:
    """The link to the mesh that was named at launch."""
    if not launch.mesh:
        return None
    from esper.kasmina.link import MeshLink

    cache_dir = Path(launch.cache_dir) if launch.cache_dir else None
    return MeshLink(launch.mesh, token=launch.token(), cache_dir=cache_dir)


class Session:
    """One attempt at a run, from its folder to its result.

    Args:
        run_dir: the run.
        launch: where the mesh is, which attempt this is.
        connect: makes the door to the mesh; None without one.
    """

    def __init__(
        self, run_dir: RunDir, launch: Launch, connect: Callable[[Launch], ControlPlane | None] | None = None
    ) -> None:
        self.run_dir = run_dir
        self._connect = connect or connect_mesh
        self.launch = launch
        self.desk = Desk(run_dir, launch.attempt)
        self._progress: Progress | None = None
        self._state = RunState.PREPARING
        self._mark = ProcessMark(pid=os.getpid(), started=psutil.Process().create_time())
        self._sequence = 0
        self._began = 0.0

    def run(self) -> int:
        """Train and tell how it went; the exit status of the process."""
        before = self.run_dir.status()
        if before is not None and before.progress is not None:
            self._progress, self._sequence = before.progress, before.progress.sequence
        self.desk.start()
        signal.signal(signal.SIGTERM, lambda *_: self.desk.ask("pause"))
        self.desk.event("process", pid=os.getpid())
        try:
            last = self._train()
        except EsperError as error:
            _log.exception("run failed", reason=error.reason)
            last = self._status(RunState.FAILED, error=str(error))
        except MemoryError:
            last = self._status(RunState.FAILED, error="the process ran out of memory")
        except Exception as error:  # noqa: BLE001  # whatever it is, the run failed and its owner is told
            _log.exception("run failed")
            trace = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(trace.filename).name}:{trace.lineno}"
            last = self._status(RunState.FAILED, error=f"{type(error).__name__}: {error} ({where})"[:8000])
        self.desk.event("end", state=last.state.value, error=last.error)
        self.desk.close(last)
        return _FAILED if last.state is RunState.FAILED else _OK

    def _train(self) -> Status:
        from esper.tolaria import data
        from esper.tolaria.checkpoints import CheckpointStore, CheckpointWriter
        from esper.tolaria.randomness import seed_everything

        self._began = time.monotonic()
        config, spec = self.run_dir.config(), self.run_dir.record().spec
        self._say("loading data", RunState.PREPARING)
        prepare_torch(config.machine)
        seed_everything(config.seed)
        dataset = data.load(config.data, config.seed)
        store = CheckpointStore(self.run_dir.checkpoints, config.checkpoint.keep)
        snapshot = store.load(self.launch.resume_boundary)
        writer = CheckpointWriter(store)
        try:
            while True:
                trainer, outcome = self._attempt(config, spec, dataset, snapshot, store, writer)
                if isinstance(outcome, _Rolled):
                    snapshot = outcome.snapshot
                    continue
                writer.flush()
                return self._end(config, trainer, outcome, store)
        finally:
            writer.close()

    def _attempt(
        self,
        config: RunConfig,
        spec: RunSpec,
        dataset: Dataset,
        snapshot: Snapshot | None,
        store: CheckpointStore,
        writer: CheckpointWriter,
    ) -> tuple[Trainer, Outcome | _Rolled]:
        """Build everything anew, go on from the snapshot, train."""
        from esper.tolaria.networks import build
        from esper.tolaria.trainer import Trainer, Unstable

        self._say("building the network", RunState.PREPARING)
        network = build(config, spec, self.run_dir, self.launch, dataset, self._connect)
        store.bundle = self._bundle_of(network, snapshot)
        try:
            trainer = Trainer(
                config,
                network,
                dataset,
                checkpoint=writer.submit,
                progress=self._take_progress,
                event=self.desk.event,
                command=lambda: self.desk.command,
            )
            # Also before a resume: kernels that were at hand then must be at hand now, or decisions would differ.
            self._prepare(network)
            if snapshot is not None:
                trainer.restore(snapshot)
                self.desk.event("resumed", boundary=snapshot.boundary, step=snapshot.step)
            self._state = RunState.RUNNING
            try:
                return trainer, trainer.run(time.monotonic() - self._began)
            except Unstable as fault:
                self._began = time.monotonic()
                network.close()
                return trainer, self._roll_back(config, fault)
        except BaseException:
            network.close()
            raise

    @staticmethod
    def _bundle_of(network: Network, snapshot: Snapshot | None) -> Callable[[str], Fetched | None]:
        """Bundles come from the kernel cache, or, where it was emptied meanwhile, from the checkpoint itself."""
        kept = {} if snapshot is None else snapshot.bundles
        return lambda kernel_id: network.bundle(kernel_id) or kept.get(kernel_id)

    def _prepare(self, network: Network) -> None:
        network.prepare(lambda phase: self._say(phase, RunState.PREPARING), lambda: bool(self.desk.command))

    def _roll_back(self, config: RunConfig, fault: Any) -> _Rolled:
        count = fault.snapshot.state["meter"]["rollbacks"]
        self.desk.event("rollback", step=fault.step, to_step=fault.snapshot.step, count=count)
        _log.warning("host unstable: rolled back", step=fault.step, to_step=fault.snapshot.step, count=count)
        if count > config.guard.max_rollbacks:
            raise InternalError(
                f"{fault}: rolled back {config.guard.max_rollbacks} times (guard.max_rollbacks) and became "
                "unstable again; "
                "lower optimizer.learning_rate or set optimizer.clip_norm",
                reason="RUN_UNSTABLE",
            )
        return _Rolled(fault.snapshot)

    def _end(self, config: RunConfig, trainer: Trainer, outcome: Outcome, store: CheckpointStore) -> Status:
        from esper.tolaria.finish import finish
        from esper.tolaria.trainer import Outcome

        if outcome is Outcome.FINISHED:
            result = finish(self.run_dir, config, trainer, self._say_finishing, store.bundle)
            trainer.network.close()
            trainer.report("done")
            return self._status(RunState.SUCCEEDED, result=result)
        trainer.network.close()
        phases = {
            Outcome.PAUSED: "paused",
            Outcome.WAITING: "waiting for the control plane",
            Outcome.STOPPED: "stopped",
        }
        trainer.report(phases[outcome])
        return self._status(RunState.STOPPED if outcome is Outcome.STOPPED else RunState.PAUSED)

    def _say_finishing(self, phase: str) -> None:
        self._say(phase, RunState.RUNNING)

    def _say(self, phase: str, state: RunState) -> None:
        """Tell a phase in which no step is made."""
        self._state = state
        self._take_progress(replace(self._progress or NO_PROGRESS, phase=phase))

    def _take_progress(self, progress: Progress) -> None:
        """Number a progress, across trainers and phases without one, and pass it on."""
        self._sequence += 1
        self._progress = replace(progress, sequence=self._sequence)
        self.desk.say(self._status(self._state))

    def _status(self, state: RunState, *, error: str = "", result: Result | None = None) -> Status:
        return Status(
            attempt=self.launch.attempt,
            state=state,
            update_time=datetime.now(UTC),
            process=self._mark,
            progress=self._progress,
            result=result,
            error=error,
        )


@dataclass(frozen=True, slots=True)
class _Rolled:
    """The host became unstable; go on from here."""

    snapshot: Snapshot


def main(arguments: list[str]) -> int:
    """Run one attempt; the exit status is 0 unless the run failed."""
    run_dir = RunDir(Path(arguments[0]))
    launch = Launch.from_line(sys.stdin.readline())
    configure(LoggingSettings(format="json"))
    try:
        with run_dir.claim() as ours:
            if not ours:
                _log.error("another process works on this run: this one ends", run_id=run_dir.run_id)
                return _FAILED
            return Session(run_dir, launch).run()
    finally:
        shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
