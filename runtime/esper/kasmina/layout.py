"""State of all seeds of a run as a structure of arrays: host-authoritative, lawful by construction, cheap in bulk.

Typical use::

    layout = SeedLayout(len(sites))
    layout.transition(3, Stage.GERMINATED)                       # Conflict where the table has no such edge
    layout.transition_many(np.array([4, 5]), Stage.GERMINATED)   # all of them or none
    layout.tick()                                                # after each optimizer step
    seen = layout.snapshot()                                     # any thread, no lock: rows that belong together
    layout.statistics.snapshot()["effective_rank"]               # what was measured; NaN where nothing was

The training thread is the only writer of the state, the health worker of the statistics; readers take snapshots
(`_columns`). The columns that are shown can not be written to: a stage changes along the table or not at all.
Devices are given the state by `mirror`. 1,000 seeds take about 60 kB, statistics included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from esper.kasmina import seeds
from esper.kasmina._columns import Columns
from esper.kasmina.control import Stage
from esper.mesh.errors import Conflict, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from esper.kasmina._columns import Snapshot

__all__ = ["STATE", "STATISTICS", "LayoutSnapshot", "SeedLayout"]

_SIZE = max(Stage) + 1
_LAWFUL = np.zeros((_SIZE, _SIZE), dtype=np.bool_)
for _before, _after in seeds.TRANSITIONS:
    _LAWFUL[_before, _after] = True
# The same rows for single transitions: an array asked for one element takes longer than all the rest of them.
_LAWFUL_FROM = [row.tobytes() for row in _LAWFUL]

_LIVING = np.zeros(_SIZE, dtype=np.bool_)
_LIVING[list(seeds.LIVING)] = True

STATE: Mapping[str, type[np.generic]] = {
    "stage": np.int8,
    "alpha_due": np.bool_,
    "alpha": np.float32,
    "entered_boundary": np.int32,
    "closed_boundaries": np.int32,
    "entered_step": np.int64,
}
"""Columns of the state. Counters stand as the moment since when they count, so that a step costs one addition."""

STATISTICS: Mapping[str, type[np.generic]] = {
    "gradient_norm": np.float32,
    "weight_norm": np.float32,
    "output_ratio": np.float32,
    "effective_rank": np.float32,
    "dead_fraction": np.float32,
    "site_gradient": np.float32,
    "bottleneck": np.float32,
    "rows": np.int32,
    "sample": np.int64,
}
"""Columns of the statistics: three of the seed, the others of its site, from ``rows`` of the sample of that number."""

_DOCUMENT = ("stage", "steps_in_stage", "boundaries_in_stage", "closed_boundaries", "alpha")


class LayoutSnapshot:
    """The state of all seeds at one moment: columns as those of `SeedLayout`, that do not change any more."""

    def __init__(self, state: Snapshot) -> None:
        steps, boundaries = state.header
        self.version = state.version
        self.stage: NDArray[np.int8] = state["stage"]
        self.steps_in_stage: NDArray[np.int64] = steps - state["entered_step"]
        self.boundaries_in_stage: NDArray[np.int32] = np.int32(boundaries) - state["entered_boundary"]
        self.closed_boundaries: NDArray[np.int32] = state["closed_boundaries"]
        self.alpha: NDArray[np.float32] = state["alpha"]


class SeedLayout:
    """One row per site, its seed's state in columns.

    Attributes:
        state: what devices are given a copy of; `STATE`.
        statistics: what was measured, NaN where nothing was; `STATISTICS`. Written by the health worker alone.
        changes: grows with every change that a device should hear of.
        stage: (seeds,) int8, values of `Stage`; changes through `transition` and `transition_many` alone.
        closed_boundaries: (seeds,) boundaries for which an embargo or a lock holds, counted from the stage's entry.
        alpha: (seeds,) what the host last set or, for blends that are driven on the device, last read.
    """

    def __init__(self, count: int) -> None:
        self.state = Columns(STATE, count)
        self.state["stage"].fill(Stage.DORMANT)
        self.state.header = (0, 0)
        self.statistics = Columns(STATISTICS, count)
        for name, dtype in STATISTICS.items():
            if issubclass(dtype, np.floating):
                self.statistics[name].fill(np.nan)
        self.changes = 0
        self.stage: NDArray[np.int8] = self.state.shown("stage")
        self.closed_boundaries: NDArray[np.int32] = self.state.shown("closed_boundaries")
        self.alpha: NDArray[np.float32] = self.state.shown("alpha")
        self._stage = self.state["stage"].data
        self._entered_step = self.state["entered_step"].data
        self._entered_boundary = self.state["entered_boundary"].data

    def __len__(self) -> int:
        return len(self.stage)

    @property
    def nbytes(self) -> int:
        """Of all columns."""
        return self.state.block.nbytes + self.statistics.block.nbytes

    @property
    def steps_in_stage(self) -> NDArray[np.int64]:
        """(seeds,) optimizer steps since the stage was entered."""
        return self.state.header[0] - self.state["entered_step"]

    @property
    def boundaries_in_stage(self) -> NDArray[np.int32]:
        """(seeds,) boundaries since the stage was entered."""
        return np.int32(self.state.header[1]) - self.state["entered_boundary"]

    def stage_of(self, seed: int) -> Stage:
        """Stage of one seed."""
        return Stage(self._stage[seed])

    def steps_of(self, seed: int) -> int:
        """Optimizer steps since one seed entered its stage."""
        return self.state.header[0] - self._entered_step[seed]

    def boundaries_of(self, seed: int) -> int:
        """Boundaries since one seed entered its stage."""
        return self.state.header[1] - self._entered_boundary[seed]

    def snapshot(self) -> LayoutSnapshot:
        """The state at one moment; from any thread, without a lock."""
        return LayoutSnapshot(self.state.snapshot())

    def transition(self, seed: int, to: Stage) -> None:
        """Move one seed along an edge of the table.

        Raises:
            Conflict: the table has no such edge; nothing was changed.
        """
        stages, state = self._stage, self.state
        if not _LAWFUL_FROM[stages[seed]][to]:
            seeds.check(self.stage_of(seed), to)
        # As `writing`, written out: a context manager takes longer than the transition.
        state.version += 1
        stages[seed] = to
        self._entered_step[seed], self._entered_boundary[seed] = state.header
        state.version += 1
        self.changes += 1

    def transition_many(self, index: NDArray[np.integer[Any]], to: Stage) -> None:
        """Move several seeds to the same stage: all of them or none.

        Raises:
            Conflict: one of the edges is not in the table; nothing was changed.
        """
        allowed = _LAWFUL[self.stage[index], to]
        if not allowed.all():
            wrong = index[~allowed]
            names = ", ".join(f"{seed} ({self.stage_of(int(seed)).name})" for seed in wrong[:5])
            raise Conflict(
                f"bulk transition to {to.name}: expected stages that allow it, found {len(wrong)} others: {names}",
                reason="UNLAWFUL_TRANSITION",
            )
        with self.state.writing():
            self.state["stage"][index] = to
            self.state["entered_step"][index], self.state["entered_boundary"][index] = self.state.header
        self.changes += 1

    def close(self, seed: int, boundaries: int) -> None:
        """Keep a seed's site closed for `boundaries`, counted from the entry of its stage; 0 opens it."""
        with self.state.writing():
            self.state["closed_boundaries"][seed] = boundaries
        self.changes += 1

    def set_alpha(self, seed: int, value: float) -> None:
        """Say what a seed's alpha is from the next step on: devices take it over (`mirror`)."""
        with self.state.writing():
            self.state["alpha"][seed] = value
            self.state["alpha_due"][seed] = True
        self.changes += 1

    def note_alpha(self, seed: int, value: float) -> None:
        """Say what a seed's alpha was found to be on its device, where it is driven."""
        with self.state.writing():
            self.state["alpha"][seed] = value

    def alpha_given(self) -> None:
        """Devices have taken over every alpha that was due."""
        with self.state.writing():
            self.state["alpha_due"][:] = False

    def tick(self) -> None:
        """Count one optimizer step for every seed."""
        state = self.state
        steps, boundaries = state.header
        # One assignment of one tuple: no reader can see half of it.
        state.header = (steps + 1, boundaries)

    def tick_boundary(self) -> None:
        """Count one boundary for every seed."""
        steps, boundaries = self.state.header
        self.state.header = (steps, boundaries + 1)

    def at(self, *stages: Stage) -> NDArray[np.intp]:
        """Indices of the seeds at one of these stages, ascending."""
        return np.flatnonzero(np.isin(self.stage, stages))

    @property
    def living(self) -> int:
        """Number of seeds from GERMINATED to FINE_TUNING."""
        return int(_LIVING[self.stage].sum())

    def document(self) -> dict[str, list[float]]:
        """The state as JSON types. Statistics are measured anew."""
        return {name: getattr(self, name).tolist() for name in _DOCUMENT}

    @classmethod
    def from_document(cls, document: Mapping[str, list[float]]) -> SeedLayout:
        """Read `document`.

        Raises:
            InvalidInput: a column is missing, of another length, or holds a stage that does not exist.
        """
        lengths = {len(document.get(name, ())) for name in _DOCUMENT}
        known = {int(stage) for stage in Stage}
        if len(lengths) != 1 or not set(document.get("stage", ())) <= known:
            raise InvalidInput(f"seed layout: expected columns {sorted(_DOCUMENT)} of one length with known stages")
        layout = cls(lengths.pop())
        for name in ("stage", "closed_boundaries", "alpha"):
            layout.state[name][:] = document[name]
        # Its clock starts at 0, so these entries lie before that.
        layout.state["entered_step"][:] = np.negative(np.asarray(document["steps_in_stage"], dtype=np.int64))
        layout.state["entered_boundary"][:] = np.negative(np.asarray(document["boundaries_in_stage"], dtype=np.int32))
        return layout
