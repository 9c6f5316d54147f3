"""Progress of runs on a terminal: one block per run, kept current until it ends."""

import threading
from collections.abc import Iterable
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.v1.run_pb2 import Arm, Run, RunState
from esper.v1.seed_pb2 import SeedStage

__all__ = ["FINAL_STATES", "Board", "arm_name", "state_name"]

FINAL_STATES = frozenset(
    {
        RunState.RUN_STATE_PAUSED,
        RunState.RUN_STATE_SUCCEEDED,
        RunState.RUN_STATE_FAILED,
        RunState.RUN_STATE_STOPPED,
        RunState.RUN_STATE_INTERRUPTED,
    }
)
"""States after which a run says nothing more by itself."""


def state_name(run: Run) -> str:
    """The state as people write it: running."""
    return RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def arm_name(run: Run) -> str:
    """The arm as people write it: grown."""
    name = Arm.Name(run.spec.arm).removeprefix("ARM_").lower()
    return "grown" if name == "unspecified" else name


class Board:
    """The latest of each run, drawn again as it changes; without a terminal, one line per change of phase.

    Safe to update from several threads, each of which follows one run.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._runs: dict[str, Run] = {}
        self._said: dict[str, tuple[str, int]] = {}
        self._guard = threading.Lock()
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, run: Run) -> None:
        """Take the latest of one run."""
        with self._guard:
            self._runs[run.id] = run
            if not self._console.is_terminal:
                self._say(run)

    def _say(self, run: Run) -> None:
        progress = run.progress
        quarter = int(4 * progress.epoch / progress.epochs) if progress.epochs else 0
        now = (f"{state_name(run)} {progress.phase}", quarter)
        if self._said.get(run.id) == now:
            return
        self._said[run.id] = now
        self._console.print(_line(run), markup=False, soft_wrap=True)

    def _draw(self) -> RenderableType:
        with self._guard:
            return Group(*_blocks(self._runs.values()))


def _blocks(runs: Iterable[Run]) -> Iterable[RenderableType]:
    for run in runs:
        if run.state in FINAL_STATES:
            yield Text(_line(run), style="dim")
            continue
        progress = run.progress
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(run.id, style="bold"),
            Text(arm_name(run)),
            Text(progress.phase or state_name(run)),
            ProgressBar(total=max(progress.epochs, 1e-9), completed=progress.epoch, width=30),
            Text(_summary(run)),
        )
        yield head
        if progress.seeds:
            seeds = Table.grid(padding=(0, 2))
            for seed in progress.seeds:
                stage = SeedStage.Name(seed.stage).removeprefix("SEED_STAGE_").lower()
                seeds.add_row("   ", escape(seed.site), escape(seed.blueprint_name), stage, f"alpha {seed.alpha:.2f}")
            yield seeds
        if progress.last_decision:
            yield Text(f"    {progress.last_decision}", style="italic")


def _line(run: Run) -> str:
    ended = run.state in FINAL_STATES
    parts = (run.id, arm_name(run), state_name(run), "" if ended else run.progress.phase, _summary(run))
    return "  ".join(part for part in parts if part)


def _summary(run: Run) -> str:
    progress = run.progress
    parts = [f"epoch {progress.epoch:.0f}/{progress.epochs:.0f}"] if progress.epochs else []
    if progress.HasField("train_loss"):
        parts.append(f"train {progress.train_loss:.4f}")
    if progress.HasField("validation_loss"):
        parts.append(f"validation {progress.validation_loss:.4f}")
    if progress.HasField("validation_accuracy"):
        parts.append(f"accuracy {100 * progress.validation_accuracy:.1f} %")
    if progress.parameters:
        parts.append(f"{progress.parameters} parameters")
    return "  ".join(parts)
