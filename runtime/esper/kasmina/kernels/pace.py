"""Where compiled code is used: only for shapes at which the gauntlet measured it to be no slower than plain torch.

A kernel is judged at a few shape classes, each a number of positions (samples, or samples times tokens or pixels); an
input belongs to the class that is nearest in proportion. Training and inference are judged apart, since the backward
may gain what the forward loses::

    pace = Pace.measured(statement, str(Target.here()))
    pace.chooses(positions=4096, training=True)

Torch-free: the library and the controller rank kernels by the same figures.
"""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.kasmina.kernels.signing import Statement

__all__ = ["SHAPE_CLASSES", "Pace", "Shape", "score"]

SHAPE_CLASSES = ("small", "nominal", "large")
"""Names of the classes in the figures of a verdict, `latency.<class>.…`; see `esper.urabrask.gauntlet.subject`."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What was measured at one shape class."""

    positions: int
    step: float
    """Time of forward and backward over plain torch's."""
    forward: float
    """The same of the forward alone, without gradients."""


class Pace:
    """The measurements of a kernel on one machine.

    Args:
        shapes: may be empty: then nothing was measured, and nothing is believed to be fast.
    """

    __slots__ = ("_bounds", "_forward", "_step", "shapes")

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = tuple(sorted(shapes))
        # Between two classes the boundary is half-way in proportion.
        self._bounds = [math.sqrt(a.positions * b.positions) for a, b in pairwise(self.shapes)]
        self._step = [shape.step <= 1.0 for shape in self.shapes]
        self._forward = [shape.forward <= 1.0 for shape in self.shapes]

    @classmethod
    def measured(cls, statement: Statement, here: str) -> Pace:
        """What a believed verdict says of this machine."""
        if statement.target != here:
            return cls(())
        return cls(_shapes({figure.name: figure.value for figure in statement.measurements}))

    def chooses(self, positions: int, *, training: bool) -> bool:
        """Whether compiled code is to run for an input."""
        table = self._step if training else self._forward
        return bool(table) and table[bisect(self._bounds, positions)]

    @property
    def ever(self) -> bool:
        """Whether there is any input for which it is to run."""
        return any(self._step) or any(self._forward)


def _shapes(figures: Mapping[str, float]) -> list[Shape]:
    found = []
    for name in SHAPE_CLASSES:
        parts = [figures.get(f"latency.{name}.{part}") for part in ("positions", "step.ratio", "forward.ratio")]
        if all(part is not None and part > 0 for part in parts):
            positions, step, forward = (part for part in parts if part is not None)
            found.append(Shape(int(positions), step, forward))
    return found


def score(figures: Mapping[str, float]) -> float:
    """How fast a kernel trains where it was measured: lower is better, 1 is plain torch.

    The geometric mean over the shape classes, each at most 1: where compiled code is slower, plain torch runs. 1 where
    nothing was measured.
    """
    shapes = _shapes(figures)
    return math.exp(sum(math.log(min(shape.step, 1.0)) for shape in shapes) / len(shapes)) if shapes else 1.0
