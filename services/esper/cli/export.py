"""`esper export`: a grown model as plain PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.artifacts import fetch_all
from esper.cli.connection import connect
from esper.cli.state import command, state_of
from esper.mesh.errors import NotFound

__all__ = ["export"]

_PREFIX = "export/"


@command
def export(
    context: typer.Context,
    run_id: Annotated[str, typer.Argument(help="Id of a run that succeeded.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder to write to; ./RUN-export by default.", file_okay=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON for scripts.")] = False,
) -> None:
    """Fetch the grown model of a run: a torch.export program, safetensors weights, lineage.json.

    The files load in a process that has torch and not Esper; docs/training.md shows how.
    """
    state = state_of(context).with_json(as_json)
    folder = to or Path(f"{run_id}-export")
    with connect(state, start=True) as mesh:
        written = fetch_all(mesh, run_id, folder, prefix=_PREFIX)
    if not written:
        raise NotFound(
            f"run {run_id} has no export: expected a run that succeeded; 'esper runs show {run_id}' tells more",
            reason="EXPORT_NOT_FOUND",
            metadata={"run_id": run_id},
        )
    if state.json:
        state.emit({"run_id": run_id, "files": [str(path) for path in written]})
        return
    for path in written:
        state.console.print(f"{path}  {path.stat().st_size} bytes", markup=False, soft_wrap=True)
