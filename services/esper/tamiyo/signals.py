"""When: whether the validation loss still falls, measured against its own noise.

A loss that rises is no plateau and opens nothing: it tells of overfitting or of a host that comes apart, and more
capacity helps against neither. A site whose width is used up grows all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.tamiyo.rules import Rules

__all__ = ["Trend", "trend_of"]

_FEWEST = 3  # two points always lie on a line: nothing is known about their noise


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through the last validation losses, least squares."""

    points: int
    """Boundaries fitted; below 3 nothing is known and the rest is 0."""
    level: float
    """Mean loss over them."""
    slope: float
    """Change of the loss per boundary; negative while it falls."""
    error: float
    """Standard error of the slope."""
    plateau: bool
    """The loss neither falls nor rises by more than its noise, or moves by next to nothing."""
    rising: bool = False
    """The loss rises by more than its noise, and by more than next to nothing."""

    def __str__(self) -> str:
        if self.points < _FEWEST:
            return f"validation loss known at {self.points} boundaries, {_FEWEST} are needed for a trend"
        word = "on a plateau" if self.plateau else "rising" if self.rising else "falling"
        return f"validation loss {word}: {self.slope:+.3g} +- {self.error:.2g} a boundary over {self.points}"


def trend_of(losses: Sequence[float], rules: Rules) -> Trend:
    """The trend of the last `plateau_window` losses."""
    window = losses[-rules.plateau_window :]
    count = len(window)
    if count < _FEWEST:
        return Trend(count, 0.0, 0.0, 0.0, plateau=False)
    middle = (count - 1) / 2
    level = math.fsum(window) / count
    spread = math.fsum((x - middle) ** 2 for x in range(count))
    slope = math.fsum((x - middle) * (y - level) for x, y in enumerate(window)) / spread
    rest = math.fsum((y - level - slope * (x - middle)) ** 2 for x, y in enumerate(window))
    error = math.sqrt(rest / (count - 2) / spread)
    least = max(rules.plateau_noise * error, rules.plateau_relative * abs(level))
    rising = slope > least
    return Trend(count, level, slope, error, plateau=-slope < least and not rising, rising=rising)
