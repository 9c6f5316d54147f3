"""`esper train`: start a run (or a comparison of runs), follow it, and end with a report."""

import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from esper.cli.artifacts import fetch, fetch_all
from esper.cli.connection import Mesh, connect
from esper.cli.live import FINAL_STATES, Board
from esper.cli.report import print_comparison, print_run
from esper.cli.runs import exit_code, follow
from esper.cli.state import ExitCode, State, command, state_of
from esper.mesh.errors import InvalidInput, from_rpc_error
from esper.v1 import tolaria_service_pb2
from esper.v1.run_pb2 import ARM_GROWN, ARM_HOST, ARM_STATIC, Run, RunSpec, RunState

__all__ = ["EXAMPLES", "train"]

EXAMPLES = (
    "Examples: esper train digits --compare | esper train digits --seed 3 --set schedule.epochs=20 | "
    "esper train cifar10 --data-dir cifar-10-batches-bin"
)
_REPORT_FILES = frozenset({"report.json", "lineage.json", "config.json"})


@dataclass
class _Session:
    """One call of the command: what it starts, and what is running when it is interrupted."""

    state: State
    mesh: Mesh
    board: Board
    recipe: str
    overrides: dict[str, Any]
    group: str = ""
    started: dict[str, Run] = field(default_factory=dict)

    def train(self, *, seed: int, arm: int, reference: str = "") -> Run:
        """Start one run and follow it to its end."""
        spec = RunSpec(recipe=self.recipe, seed=seed, arm=arm, reference_run_id=reference, group=self.group)
        spec.overrides.update(self.overrides)
        request = tolaria_service_pb2.StartRunRequest(spec=spec, request_id=str(uuid.uuid4()))
        run = self.mesh.tolaria.StartRun(request, timeout=self.mesh.timeout).run
        self.started[run.id] = run
        self.started[run.id] = follow(self.mesh, run.id, self.board)
        return self.started[run.id]

    def pause_all(self) -> None:
        """Pause what still runs, wait until it has stopped, and say how to go on; a second call finds nothing to do."""
        paused = []
        for run in list(self.started.values()):
            if run.state in FINAL_STATES:
                continue
            try:
                self.mesh.tolaria.PauseRun(
                    tolaria_service_pb2.PauseRunRequest(run_id=run.id), timeout=self.mesh.timeout
                )
                paused.append(run.id)
            except grpc.RpcError:  # it has just ended, or the mesh is gone: nothing to pause
                continue
        for run_id in paused:
            self._wait_until_stopped(run_id)
            self.state.errors.print(f"paused; go on with: esper runs resume {run_id}", markup=False)

    def _wait_until_stopped(self, run_id: str, limit_s: float = 30.0) -> None:
        deadline = time.monotonic() + limit_s
        request = tolaria_service_pb2.GetRunRequest(run_id=run_id)
        while time.monotonic() < deadline:
            run = self.mesh.tolaria.GetRun(request, timeout=self.mesh.timeout).run
            if run.state in FINAL_STATES:
                self.started[run_id] = run
                return
            time.sleep(0.1)


@command
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe: digits, stdlib-lm or cifar10.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of all randomness; the first one with --compare.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train the host without growth and a static net of the final size too.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="With --compare: how many seeds.")] = 3,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="With --compare: runs at one time.")] = 2,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe; repeatable.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Data of recipes that do not bring their own.")] = None,
    report_dir: Annotated[Path | None, typer.Option("--report", help="Folder for the report.", file_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON to standard output.")] = False,
) -> None:
    """Train a recipe, growing the network while it trains.

    Uses the mesh that runs on --home or at --mesh, else starts one for as long as the training lasts. Ctrl-C pauses the
    run at its next step; 'esper runs resume' goes on with it.
    """
    state = state_of(context).with_json(as_json)
    overrides = parse_overrides(settings or ())
    if data_dir is not None:
        overrides["data.dir"] = str(data_dir.absolute())
    board = Board(state.errors if state.json else state.console)
    with connect(state, start=True) as mesh, board:
        session = _Session(state, mesh, board, recipe, overrides)
        try:
            if compare:
                ended = _compare(session, range(seed, seed + seeds), parallel, report_dir)
            else:
                ended = _single(session, seed, report_dir)
        except KeyboardInterrupt:
            session.pause_all()
            raise
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
    raise typer.Exit(ended)


def _single(session: _Session, seed: int, report_dir: Path | None) -> int:
    run = session.train(seed=seed, arm=ARM_GROWN)
    if run.state != RunState.RUN_STATE_SUCCEEDED:
        session.state.errors.print(f"run {run.id} {RunState.Name(run.state)[10:].lower()}: {run.error}", markup=False)
        return exit_code(run)
    folder = report_dir or session.state.settings.home / "reports" / run.id
    fetch_all(session.mesh, run.id, folder, names=_REPORT_FILES | {"report.html"})
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if session.state.json:
        session.state.emit(report)
    else:
        print_run(session.state.console, report, folder / "report.html")
    return ExitCode.OK


def _compare(session: _Session, seeds: Sequence[int], parallel: int, report_dir: Path | None) -> int:
    session.group = f"{session.recipe}-{uuid.uuid4().hex[:8]}"
    with ThreadPoolExecutor(parallel, thread_name_prefix="follow") as pool:
        try:
            # The grown runs first: their static twins need to know what grew.
            grown = {seed: pool.submit(session.train, seed=seed, arm=ARM_GROWN) for seed in seeds}
            hosts = [pool.submit(session.train, seed=seed, arm=ARM_HOST) for seed in seeds]
            static = [pool.submit(_static_twin, session, seed, grown[seed]) for seed in seeds]
            runs = [future.result() for future in (*grown.values(), *hosts, *static)]
        except KeyboardInterrupt:
            # The threads end when their runs do; leaving the block would wait for that.
            pool.shutdown(wait=False, cancel_futures=True)
            session.pause_all()
            raise
    failed = [run for run in runs if run.state != RunState.RUN_STATE_SUCCEEDED]
    for run in failed:
        session.state.errors.print(f"run {run.id} {RunState.Name(run.state)[10:].lower()}: {run.error}", markup=False)
    if failed:
        return ExitCode.FAILED
    folder = report_dir or session.state.settings.home / "reports" / session.group
    report = _write_comparison(session, runs, folder)
    if session.state.json:
        session.state.emit(report)
    else:
        print_comparison(session.state.console, report, folder / "report.html")
    return ExitCode.OK


def _static_twin(session: _Session, seed: int, grown: Future[Run]) -> Run:
    return session.train(seed=seed, arm=ARM_STATIC, reference=grown.result().id)


def _write_comparison(session: _Session, runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    from esper.tolaria.report import write_comparison

    run_dirs = []
    for run in runs:
        run_dirs.append(folder / "runs" / run.id)
        for name in sorted(_REPORT_FILES):
            fetch(session.mesh, run.id, name, run_dirs[-1])
    write_comparison(run_dirs, folder)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Read `key.path=value` pairs; a value is JSON where it is JSON, else text.

    Raises:
        InvalidInput: a text without `=`, or without a key before it.
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--set: expected KEY=VALUE like schedule.epochs=20, found {text!r}")
        try:
            overrides[key] = json.loads(value)
        except ValueError:
            overrides[key] = value
    return overrides
