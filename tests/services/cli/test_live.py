"""Progress on a terminal and without one."""

import io

from rich.console import Console

from esper.cli.live import Board, arm_name, state_name
from esper.v1.run_pb2 import ARM_STATIC, Run, RunProgress, RunSpec, RunState, SeedProgress
from esper.v1.seed_pb2 import SEED_STAGE_FINE_TUNING


def run_at(epoch, phase="training", state=RunState.RUN_STATE_RUNNING):
    """A run with one living seed."""
    progress = RunProgress(
        phase=phase,
        epoch=epoch,
        epochs=8,
        train_loss=0.5,
        validation_loss=0.25,
        validation_accuracy=0.75,
        parameters=1050,
        last_decision="grow [here] because of the plateau",
        seeds=[SeedProgress(index=1, site="body[0]", stage=SEED_STAGE_FINE_TUNING, blueprint_name="low_rank", alpha=1)],
    )
    return Run(id="digits-1", spec=RunSpec(recipe="digits"), state=state, progress=progress)


def test_names():
    """Enums as people write them; an arm that is not said is a grown one."""
    assert ("running", "grown") == (state_name(run_at(0)), arm_name(run_at(0)))
    assert "static" == arm_name(Run(spec=RunSpec(arm=ARM_STATIC)))


def test_without_a_terminal_one_line_for_each_change():
    """A log file gets a line per phase and quarter of the schedule, not one per message."""
    written = io.StringIO()
    with Board(Console(file=written, width=200)) as board:
        board.update(run_at(0, "loading data", RunState.RUN_STATE_PREPARING))
        for epoch in range(9):
            board.update(run_at(epoch))
            board.update(run_at(epoch))
        board.update(run_at(8, "", RunState.RUN_STATE_SUCCEEDED))
    lines = written.getvalue().splitlines()
    assert 1 + 5 + 1 == len(lines)
    assert "loading data" in lines[0]
    assert "training  epoch 2/8  train 0.5000  validation 0.2500  accuracy 75.0 %  1050 parameters" in lines[2]
    assert "succeeded" in lines[-1]


def test_a_run_that_has_said_nothing_yet():
    """A run in the queue has no figures; its phase is shown."""
    written = io.StringIO()
    with Board(Console(file=written, width=200)) as board:
        board.update(Run(id="digits-1", state=RunState.RUN_STATE_PREPARING, progress=RunProgress(phase="queued")))
    assert "digits-1  grown  preparing  queued" in written.getvalue()


def test_on_a_terminal_everything_alive_is_shown():
    """Epoch, losses, seeds with their stages, the last decision; a run that ended keeps one line."""
    written = io.StringIO()
    with Board(Console(file=written, width=200, force_terminal=True, color_system=None)) as board:
        board.update(run_at(3))
        board._live.refresh()
        shown = written.getvalue()
        board.update(run_at(8, "", RunState.RUN_STATE_FAILED))
        board._live.refresh()
        ended = written.getvalue()[len(shown) :]
    for part in ("digits-1", "epoch 3/8", "body[0]", "low_rank", "fine_tuning", "alpha 1.00", "grow [here] because"):
        assert part in shown
    assert "failed" in ended
    assert "body[0]" not in ended
