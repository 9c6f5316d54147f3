"""`esper train`: start a run (or a comparison of runs), follow it, and end with a report."""

import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from esper.cli.comparison import check_folder, report, tell_unfinished
from esper.cli.connection import Mesh, connect
from esper.cli.following import exit_code, follow, pause_all, terminated_like_interrupted
from esper.cli.live import FINAL_STATES, Board
from esper.cli.state import State, command, state_of
from esper.mesh.errors import InvalidInput, from_rpc_error
from esper.v1 import tolaria_service_pb2
from esper.v1.run_pb2 import ARM_GROWN, ARM_HOST, ARM_STATIC, Arm, Run, RunSpec, RunState

__all__ = ["EXAMPLES", "train"]

EXAMPLES = (
    "Examples: esper train digits --compare | esper train digits --seed 3 --set schedule.epochs=20 | "
    "esper train cifar10 --data-dir cifar-10-batches-bin"
)
_SEEDS = 3


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
    twins: dict[str, str] = field(default_factory=dict)
    """Grown run -> the static run that waits for it."""

    def start(self, *, seed: int, arm: Arm.ValueType, reference: str = "") -> str:
        """Ask for a run; where the mesh has no room for another one yet, wait for it. Gives its id."""
        spec = RunSpec(recipe=self.recipe, seed=seed, arm=arm, reference_run_id=reference, group=self.group)
        spec.overrides.update(self.overrides)
        request = tolaria_service_pb2.StartRunRequest(spec=spec, request_id=str(uuid.uuid4()))
        while True:
            try:
                run = self.mesh.tolaria.StartRun(request, timeout=self.mesh.timeout).run
            except grpc.RpcError as error:
                refusal = from_rpc_error(error)
                if refusal.reason != "TOO_MANY_RUNS" or not self.started:
                    raise
                self.release_twins()
                time.sleep(refusal.retry_after_s or 1.0)
            else:
                self.started[run.id] = run
                if reference:
                    self.twins[reference] = run.id
                return run.id

    def follow(self, run_id: str) -> Run:
        """Follow a run that was started to its end."""
        self.started[run_id] = follow(self.mesh, run_id, self.board)
        return self.started[run_id]

    def release_twins(self) -> None:
        """Pause static runs whose grown run has ended without success: it may be resumed, but not while we wait."""
        for grown_id, static_id in list(self.twins.items()):
            if self.started[grown_id].state not in FINAL_STATES - {RunState.RUN_STATE_SUCCEEDED}:
                continue
            del self.twins[grown_id]
            request = tolaria_service_pb2.PauseRunRequest(run_id=static_id)
            try:
                self.mesh.tolaria.PauseRun(request, timeout=self.mesh.timeout, wait_for_ready=True)
            except grpc.RpcError as error:
                if from_rpc_error(error).reason != "RUN_NOT_RUNNING":  # it has failed with its reference
                    raise

    def tell_group(self) -> None:
        """Say how to come to the report of a comparison that does not end here."""
        if self.group:
            text = f"once all of its runs have succeeded, report with: esper runs compare {self.group}"
            self.state.errors.print(text, markup=False, soft_wrap=True)


@command
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe: digits, stdlib-lm or cifar10.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of all randomness; the first one with --compare.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train the host without growth and a static net of the final size too.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="With --compare: how many seeds.", show_default=str(_SEEDS)),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe; repeatable.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Data of recipes that do not bring their own.")] = None,
    report_dir: Annotated[Path | None, typer.Option("--report", help="Folder for the report.", file_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON to standard output.")] = False,
) -> None:
    """Train a recipe, growing the network while it trains.

    Uses the mesh that runs on --home or at --mesh, else starts one for as long as the training lasts; the mesh decides
    how many runs train at one time (tolaria.max_parallel_runs). Ctrl-C pauses the run at its next step; 'esper runs
    resume' goes on with it, and 'esper runs compare' reports a comparison whose runs were resumed.
    """
    state = state_of(context).with_json(as_json)
    if seeds is not None and not compare:
        raise InvalidInput(f"--seeds {seeds}: expected --compare beside it; one run takes its seed from --seed")
    overrides = parse_overrides(settings or ())
    check_folder(report_dir or state.settings.home / "reports")
    if data_dir is not None:
        overrides["data.dir"] = str(data_dir.absolute())
    board = Board(state.errors if state.json else state.console)
    with terminated_like_interrupted(), connect(state, start=True) as mesh:
        session = _Session(state, mesh, board, recipe, overrides)
        try:
            with board:
                runs = _compare(session, range(seed, seed + (seeds or _SEEDS))) if compare else _single(session, seed)
        except KeyboardInterrupt:
            pause_all(state, mesh, list(session.started.values()))
            session.tell_group()
            raise
        unfinished = tell_unfinished(state, runs)
        if unfinished:
            session.tell_group()
            raise typer.Exit(max(map(exit_code, unfinished)))
        folder = report_dir or state.settings.home / "reports" / (session.group or runs[0].id)
        report(state, mesh, runs, folder, compared=compare)


def _single(session: _Session, seed: int) -> list[Run]:
    return [session.follow(session.start(seed=seed, arm=ARM_GROWN))]


def _compare(session: _Session, seeds: Sequence[int]) -> list[Run]:
    session.group = f"{session.recipe}-{uuid.uuid4().hex[:8]}"
    # Followers wait, they do not work: one thread for each run costs little.
    pool = ThreadPoolExecutor(3 * len(seeds), thread_name_prefix="follow")
    try:
        # All are asked for at once, the grown ones first: the mesh lets the static twins wait for what grew.
        ids = [session.start(seed=seed, arm=ARM_GROWN) for seed in seeds]
        grown = [pool.submit(session.follow, run_id) for run_id in ids]
        others = []
        for seed, run_id in zip(seeds, ids, strict=True):
            for arm, reference in ((ARM_HOST, ""), (ARM_STATIC, run_id)):
                other = session.start(seed=seed, arm=arm, reference=reference)
                others.append(pool.submit(session.follow, other))
        for ended in as_completed(grown):
            ended.result()
            session.release_twins()
        return [follower.result() for follower in (*grown, *others)]
    finally:
        # Not waited for: after an interrupt they end when the channel closes.
        pool.shutdown(wait=False, cancel_futures=True)


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
