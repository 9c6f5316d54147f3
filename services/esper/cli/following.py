"""Following runs to their end, and pausing them when a command that follows them is interrupted."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import grpc

from esper.cli.connection import Mesh
from esper.cli.live import FINAL_STATES, Board, state_name
from esper.cli.state import ExitCode, State
from esper.mesh.errors import Code, Unavailable, from_rpc_error
from esper.v1 import tolaria_service_pb2
from esper.v1.run_pb2 import Run, RunState

__all__ = ["exit_code", "follow", "pause_all", "terminated_like_interrupted"]

_PATIENCE_S = 30.0
_PAUSE_LIMIT_S = 60.0
_RETURN_LIMIT_S = 15.0


def follow(mesh: Mesh, run_id: str, board: Board) -> Run:
    """Follow one run until it says nothing more.

    A stream that ends before the run does is opened again, also when the mesh restarts: training goes on meanwhile.

    Raises:
        grpc.RpcError: the run does not exist.
        Unavailable: MESH_UNREACHABLE, the mesh has been away for too long.
    """
    request = tolaria_service_pb2.WatchRunRequest(run_id=run_id)
    away_since: float | None = None
    while True:
        try:
            for response in mesh.tolaria.WatchRun(request):
                away_since = None
                board.update(response.run)
                if response.run.state in FINAL_STATES:
                    return response.run
        except grpc.RpcError as error:
            if from_rpc_error(error).code is not Code.UNAVAILABLE:
                raise
            now = time.monotonic()
            away_since = now if away_since is None else away_since
            if now - away_since > _PATIENCE_S:
                raise Unavailable(
                    f"no mesh has answered at {mesh.address} for {_PATIENCE_S:.0f} s: the run goes on without it; once "
                    f"one is there again, follow it with: esper runs watch {run_id}",
                    reason="MESH_UNREACHABLE",
                ) from error
            time.sleep(0.2)


def exit_code(run: Run) -> int:
    """0 for a run that succeeded or was paused, 1 for any other end."""
    good = {RunState.RUN_STATE_SUCCEEDED, RunState.RUN_STATE_PAUSED}
    return ExitCode.OK if run.state in good else ExitCode.FAILED


def pause_all(state: State, mesh: Mesh, runs: Sequence[Run]) -> None:
    """Pause those of the runs that have not ended, wait until they have stopped, and say how to go on."""
    say = state.errors.print
    asked = []
    for run in runs:
        if run.state in FINAL_STATES:
            continue
        request = tolaria_service_pb2.PauseRunRequest(run_id=run.id)
        try:
            # A mesh that has just come back is waited for; one that is gone is not waited for long.
            mesh.tolaria.PauseRun(request, timeout=_RETURN_LIMIT_S, wait_for_ready=True)
            asked.append(run.id)
        except grpc.RpcError as error:  # it has just ended, or the mesh is gone: nothing to pause
            say(f"{run.id} was not paused: {from_rpc_error(error).public}", markup=False, soft_wrap=True)
    if asked:
        say(f"pausing {len(asked)} run{'s' if len(asked) > 1 else ''} at the next step; Ctrl-C again does not wait")
    for run_id in asked:
        found = _stopped(mesh, run_id)
        if found is None:
            text = f"{run_id} has not paused yet; look with: esper runs show {run_id}"
        elif found.state == RunState.RUN_STATE_PAUSED:
            text = f"paused; go on with: esper runs resume {run_id}"
        else:
            text = f"{run_id} {state_name(found)}"
        say(text, markup=False, soft_wrap=True)


def _stopped(mesh: Mesh, run_id: str) -> Run | None:
    """The run once it says nothing more; None when that takes too long."""
    deadline = time.monotonic() + _PAUSE_LIMIT_S
    request = tolaria_service_pb2.GetRunRequest(run_id=run_id)
    while time.monotonic() < deadline:
        run = mesh.tolaria.GetRun(request, timeout=mesh.timeout).run
        if run.state in FINAL_STATES:
            return run
        time.sleep(0.1)
    return None


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, and the end of the terminal, interrupt the command as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
