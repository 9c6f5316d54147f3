"""`esper runs`: training runs, past and present."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from esper.cli.comparison import check_folder, compared_runs, report
from esper.cli.connection import Mesh, connect
from esper.cli.following import exit_code, follow, pause_all, terminated_like_interrupted
from esper.cli.live import Board, arm_name, state_name
from esper.cli.state import State, as_document, command, state_of
from esper.mesh.errors import InvalidInput
from esper.v1 import tolaria_service_pb2
from esper.v1.run_pb2 import Run, RunState
from esper.v1.seed_pb2 import SeedStage

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Training runs.")
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON for scripts.")]
RunArgument = Annotated[str, typer.Argument(help="Id of the run, as 'esper runs list' shows it.")]


@app.command("list", epilog="Example: esper runs list --state running --json")
@command
def list_runs(
    context: typer.Context,
    only: Annotated[str, typer.Option("--state", help="Only runs of this state, like running or succeeded.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Entries at most.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List runs, newest first."""
    state = state_of(context).with_json(as_json)
    request = tolaria_service_pb2.ListRunsRequest(page_size=min(limit, 500))
    if only:
        request.states.append(_state(only))
    found: list[Run] = []
    with connect(state, start=True) as mesh:
        while len(found) < limit:
            page = mesh.tolaria.ListRuns(request, timeout=mesh.timeout)
            found.extend(page.runs)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    found = found[:limit]
    if state.json:
        state.emit(found)
        return
    rows = [
        (
            run.id,
            arm_name(run),
            state_name(run),
            f"{run.progress.epoch:.0f}/{run.progress.epochs:.0f}",
            f"{100 * run.result.test_accuracy:.2f} %" if run.result.HasField("test_accuracy") else "-",
            run.result.final_parameters or run.progress.parameters or "-",
            run.create_time.ToDatetime().isoformat(sep=" ", timespec="seconds"),
        )
        for run in found
    ]
    columns = ("RUN", "ARM", "STATE", "EPOCH", "TEST", "PARAMETERS", "CREATED (UTC)")
    state.table(columns, rows, empty="no runs: start one with 'esper train digits'")


def _state(name: str) -> RunState.ValueType:
    try:
        return RunState.Value(f"RUN_STATE_{name.upper()}")
    except ValueError as error:
        known = ", ".join(n.removeprefix("RUN_STATE_").lower() for n in RunState.keys()[1:])  # an enum wrapper
        raise InvalidInput(f"--state: expected one of {known}, found {name!r}") from error


@app.command("show", epilog="Example: esper runs show digits-20261123-201500-k3f9")
@command
def show(context: typer.Context, run_id: RunArgument, as_json: JsonOption = False) -> None:
    """Show one run: progress, seeds, figures, files."""
    state = state_of(context).with_json(as_json)
    with connect(state, start=True) as mesh:
        run = mesh.tolaria.GetRun(tolaria_service_pb2.GetRunRequest(run_id=run_id), timeout=mesh.timeout).run
        request = tolaria_service_pb2.ListArtifactsRequest(run_id=run_id)
        artifacts = mesh.tolaria.ListArtifacts(request, timeout=mesh.timeout).artifacts
    if state.json:
        state.emit({**as_document(run), "artifacts": [as_document(artifact) for artifact in artifacts]})
        return
    _print(state, run)
    if artifacts:
        state.console.print("[bold]files[/]")
        for artifact in artifacts:
            state.console.print(f"  {artifact.name}  {artifact.size_bytes} bytes", markup=False)


def _print(state: State, run: Run) -> None:
    out, progress = state.console, run.progress
    out.print(f"[bold]{escape(run.id)}[/]  {arm_name(run)}  {state_name(run)}")
    if run.error:
        out.print(f"  error       {run.error}", markup=False)
    out.print(f"  recipe      {run.spec.recipe}, seed {run.spec.seed}", markup=False)
    if run.spec.group:
        out.print(f"  compared    in {run.spec.group}", markup=False)
    out.print(f"  progress    {progress.phase}, epoch {progress.epoch:.1f}/{progress.epochs:.0f}", markup=False)
    if progress.last_decision:
        out.print(f"  decision    {progress.last_decision}", markup=False)
    for seed in progress.seeds:
        stage = SeedStage.Name(seed.stage).removeprefix("SEED_STAGE_").lower()
        out.print(f"  seed {seed.index:<6} {seed.site}  {seed.blueprint_name}  {stage}", markup=False)
    if run.HasField("result"):
        result = run.result
        if result.HasField("test_accuracy"):
            out.print(f"  test        {100 * result.test_accuracy:.2f} % (loss {result.test_loss:.4f})")
        else:
            out.print(f"  test        loss {result.test_loss:.4f}")
        out.print(f"  parameters  {result.host_parameters} host, {result.final_parameters} at the end")
        times = f"{result.training_time.ToTimedelta()}, prepared in {result.preparation_time.ToTimedelta()}"
        out.print(f"  training    {result.training_flops:.3g} FLOPs, {times}")
        for kernel in result.kernel_ids:
            out.print(f"  kernel      {kernel}", markup=False, soft_wrap=True)
        out.print(f"  weights     {result.weights_digest}", markup=False, soft_wrap=True)


@app.command("watch", epilog="Example: esper runs watch digits-20261123-201500-k3f9")
@command
def watch(context: typer.Context, run_id: RunArgument, as_json: JsonOption = False) -> None:
    """Follow a run until it ends; Ctrl-C stops the watching, not the run."""
    state = state_of(context).with_json(as_json)
    with connect(state) as mesh:
        _follow_to_end(state, mesh, run_id)


def _follow_to_end(state: State, mesh: Mesh, run_id: str) -> None:
    with Board(state.errors if state.json else state.console) as board:
        run = follow(mesh, run_id, board)
    if state.json:
        state.emit(run)
    else:
        _print(state, run)
    raise typer.Exit(exit_code(run))


@app.command("pause", epilog="Example: esper runs pause digits-20261123-201500-k3f9")
@command
def pause(context: typer.Context, run_id: RunArgument, as_json: JsonOption = False) -> None:
    """Ask a run to checkpoint and pause."""
    state = state_of(context).with_json(as_json)
    request = tolaria_service_pb2.PauseRunRequest(run_id=run_id)
    with connect(state, start=True) as mesh:
        run = mesh.tolaria.PauseRun(request, timeout=mesh.timeout).run
    if state.json:
        state.emit(run)
        return
    verb = "is paused" if run.state == RunState.RUN_STATE_PAUSED else "will pause at its next step"
    state.console.print(f"{run_id} {verb}; go on with: esper runs resume {run_id}", markup=False, soft_wrap=True)


@app.command("resume", epilog="Example: esper runs resume digits-20261123-201500-k3f9 --boundary 12")
@command
def resume(
    context: typer.Context,
    run_id: RunArgument,
    boundary: Annotated[
        int | None, typer.Option(min=1, help="Checkpoint to go on from; the last one by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a paused, failed or interrupted run, and follow it.

    Ctrl-C stops the watching, and the run goes on; where this command had to start the mesh, which ends with it, Ctrl-C
    pauses the run.
    """
    state = state_of(context).with_json(as_json)
    request = tolaria_service_pb2.ResumeRunRequest(run_id=run_id)
    if boundary is not None:
        request.boundary = boundary
    with terminated_like_interrupted(), connect(state, start=True) as mesh:
        run = mesh.tolaria.ResumeRun(request, timeout=mesh.timeout).run
        try:
            _follow_to_end(state, mesh, run_id)
        except KeyboardInterrupt:
            if mesh.own:
                pause_all(state, mesh, [run])
            raise


@app.command("compare", epilog="Example: esper runs compare digits-1f9c03ab --report report")
@command
def compare(
    context: typer.Context,
    group: Annotated[str, typer.Argument(help="Name of the comparison, as 'esper train --compare' said it.")],
    report_dir: Annotated[Path | None, typer.Option("--report", help="Folder for the report.", file_okay=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Report a comparison that was interrupted, once its runs have been resumed and have succeeded."""
    state = state_of(context).with_json(as_json)
    folder = report_dir or state.settings.home / "reports" / group
    with connect(state, start=True) as mesh:
        runs = compared_runs(state, mesh, group)
        check_folder(folder)
        report(state, mesh, runs, folder, compared=True)


@app.command("stop", epilog="Example: esper runs stop digits-20261123-201500-k3f9")
@command
def stop(context: typer.Context, run_id: RunArgument, as_json: JsonOption = False) -> None:
    """End a run for good; its checkpoints stay."""
    state = state_of(context).with_json(as_json)
    with connect(state, start=True) as mesh:
        run = mesh.tolaria.StopRun(tolaria_service_pb2.StopRunRequest(run_id=run_id), timeout=mesh.timeout).run
    if state.json:
        state.emit(run)
    else:
        state.console.print(f"{run.id} {state_name(run)}", markup=False, soft_wrap=True)
