"""Reports of runs: fetched over the contract and, for a comparison, set side by side here.

The mesh may be on another machine; what it keeps of a run is all that is needed.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from esper.cli.artifacts import fetch_all
from esper.cli.connection import Mesh
from esper.cli.live import state_name
from esper.cli.report import print_comparison, print_run
from esper.cli.state import State
from esper.mesh.errors import Conflict, InvalidInput, NotFound, Unsupported
from esper.v1 import tolaria_service_pb2
from esper.v1.run_pb2 import Run, RunState

__all__ = ["check_folder", "compared_runs", "report", "tell_unfinished"]

_REPORT_FILES = frozenset({"report.json", "report.html"})


def check_folder(folder: Path) -> None:
    """Make the folder of a report, before work begins whose result goes there.

    Raises:
        InvalidInput: REPORT_FOLDER, nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInput(
            f"the report cannot be written to {folder}: {error.strerror}; choose another folder with --report",
            reason="REPORT_FOLDER",
        ) from error


def compared_runs(state: State, mesh: Mesh, group: str) -> list[Run]:
    """The runs of a comparison, once each has ended; seeds of which a run was stopped for good are left out.

    Raises:
        NotFound: GROUP_NOT_FOUND, there is no such comparison.
        Conflict: COMPARISON_UNFINISHED, some of its runs have not succeeded; they were named on standard error.
            COMPARISON_STOPPED, nothing is left.
    """
    runs: list[Run] = []
    request = tolaria_service_pb2.ListRunsRequest(group=group, page_size=500)
    while True:
        page = mesh.tolaria.ListRuns(request, timeout=mesh.timeout)
        runs.extend(page.runs)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    if not runs:
        raise NotFound(
            f"no comparison {group!r}: expected one that 'esper train --compare' named", reason="GROUP_NOT_FOUND"
        )
    stopped = {run.spec.seed for run in runs if run.state == RunState.RUN_STATE_STOPPED}
    if stopped:
        named = ", ".join(map(str, sorted(stopped)))
        state.errors.print(f"left out, because a run of theirs was stopped: seeds {named}", markup=False)
    runs = [run for run in runs if run.spec.seed not in stopped]
    if left := tell_unfinished(state, runs):
        raise Conflict(
            f"comparison {group}: expected every run to have succeeded, found {len(left)} of {len(runs)} that have not",
            reason="COMPARISON_UNFINISHED",
        )
    if not runs:
        raise Conflict(
            f"comparison {group}: expected a seed of which no run was stopped, found none", reason="COMPARISON_STOPPED"
        )
    return runs


def tell_unfinished(state: State, runs: Sequence[Run]) -> list[Run]:
    """Name the runs that have not succeeded, with how to go on; gives them."""
    unfinished = [run for run in runs if run.state != RunState.RUN_STATE_SUCCEEDED]
    for run in unfinished:
        state.errors.print(f"run {run.id} {state_name(run)}: {run.error}".rstrip(": "), markup=False, soft_wrap=True)
        if run.state in {RunState.RUN_STATE_PAUSED, RunState.RUN_STATE_INTERRUPTED}:
            state.errors.print(f"go on with: esper runs resume {run.id}", markup=False, soft_wrap=True)
    return unfinished


def report(state: State, mesh: Mesh, runs: Sequence[Run], folder: Path, *, compared: bool) -> None:
    """Write the report of one run, or of a comparison, to a folder, and show it.

    Raises:
        Unsupported: a comparison without the extra 'train'.
    """
    if compared:
        _write_comparison(mesh, runs, folder)
    else:
        fetch_all(mesh, runs[0].id, folder, names=_REPORT_FILES)
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if state.json:
        state.emit(document)
        return
    show = print_comparison if compared else print_run
    show(state.console, document, folder / "report.html")


def _write_comparison(mesh: Mesh, runs: Sequence[Run], folder: Path) -> None:
    try:
        from esper.tolaria.report import write_comparison
    except ImportError as error:
        raise Unsupported(
            f"the comparison of {len(runs)} runs needs the extra 'train' (pip install 'esper[train]'): "
            f"found no {error.name}"
        ) from error
    run_dirs = [folder / "runs" / run.id for run in runs]
    for run, run_dir in zip(runs, run_dirs, strict=True):
        fetch_all(mesh, run.id, run_dir, names=_REPORT_FILES)
    write_comparison(run_dirs, folder)
