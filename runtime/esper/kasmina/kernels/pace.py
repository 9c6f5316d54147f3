"""Where compiled code is used: only for shapes at which the gauntlet measured it to be faster than plain torch.

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
from types import MappingProxyType
from typing import TYPE_CHECKING

from esper.kasmina.signature import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.kasmina.blueprints.plan import Plan
    from esper.kasmina.kernels.signing import Statement

__all__ = ["GAIN", "Pace", "Shape", "nominal_extents", "score", "shape_classes"]

GAIN = 0.02
"""Share of plain torch's time that compiled code must save to be used, at least ..."""
_DOUBT = 0.25
"""... and this share of the noise: what 41 repeats leave open of the median of their ratios."""
_CLASSES: Mapping[str, Mapping[Layout, tuple[int, ...]]] = MappingProxyType(
    {
        "small": {Layout.VECTOR: (8,), Layout.SEQUENCE: (1, 16), Layout.IMAGE: (1, 4, 4)},
        "nominal": {Layout.VECTOR: (256,), Layout.SEQUENCE: (16, 64), Layout.IMAGE: (16, 8, 8)},
        "large": {Layout.VECTOR: (4096,), Layout.SEQUENCE: (32, 128), Layout.IMAGE: (32, 16, 16)},
    }
)
"""Name in the figures of a verdict, `latency.<class>.…`, and extents that stand for the class."""
_ELEMENTS = 1 << 20
_FLOPS: Mapping[str, float] = MappingProxyType({"nominal": 5e7, "large": 1.5e8})
"""Elements of an input, and operations of a forward over it, at most: beyond either the batch shrinks, so that wide
kernels are judged in about the time of narrow ones (5e7 operations take 5 to 10 ms on one core)."""


def nominal_extents(plan: Plan) -> tuple[int, ...]:
    """Extents, all but the features, of an input of usual size."""
    return _within(plan, "nominal")


def shape_classes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Extents at which the speed of a kernel is judged; each class has more positions than the one before."""
    found: dict[str, tuple[int, ...]] = {}
    for name in _CLASSES:
        extents = _within(plan, name)
        if not found or math.prod(extents) > max(math.prod(other) for other in found.values()):
            found[name] = extents
    return found


def _within(plan: Plan, name: str) -> tuple[int, ...]:
    signature = plan.signature
    batch, *rest = _CLASSES[name][signature.layout]
    if name not in _FLOPS:
        return (batch, *rest)
    wide = max(signature.in_features, signature.out_features)
    room = min(_ELEMENTS / wide, _FLOPS[name] / max(plan.flops, 1.0)) / math.prod(rest)
    return (max(2, min(batch, int(room))), *rest)


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What was measured at one shape class."""

    positions: int
    step: float
    """Time of forward and backward over plain torch's."""
    forward: float
    """The same of the forward alone, without gradients."""
    noise: float = 0.0
    """Half the interquartile range of the repeats' ratios, as a share of their median."""

    @property
    def bar(self) -> float:
        """Time over plain torch's up to which compiled code is used."""
        return 1.0 - max(GAIN, _DOUBT * self.noise)


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
        self._step = [shape.step <= shape.bar for shape in self.shapes]
        self._forward = [shape.forward <= shape.bar for shape in self.shapes]

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
    for name in _CLASSES:
        parts = [figures.get(f"latency.{name}.{part}") for part in ("positions", "step.ratio", "forward.ratio")]
        if all(part is not None and part > 0 for part in parts):
            positions, step, forward = (part for part in parts if part is not None)
            noise = max(0.0, figures.get(f"latency.{name}.noise", 0.0))
            found.append(Shape(int(positions), step, forward, noise))
    return found


def score(figures: Mapping[str, float]) -> float:
    """How fast a kernel trains where it was measured: lower is better, 1 is plain torch.

    The geometric mean over the shape classes; where compiled code is not used a class counts as 1. So does a kernel of
    which nothing was measured.
    """
    steps = [shape.step if shape.step <= shape.bar else 1.0 for shape in _shapes(figures)]
    return math.exp(sum(map(math.log, steps)) / len(steps)) if steps else 1.0
