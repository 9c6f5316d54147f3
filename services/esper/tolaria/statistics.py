"""Means over seeds with their 95 % confidence intervals, and paired differences between arms."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from esper.kasmina.counterfactual import student_t_quantile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Interval", "interval", "paired_difference"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its two-sided 95 % confidence interval by Student's t; no interval for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """True where zero lies outside the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def interval(values: Sequence[float]) -> Interval:
    """Mean of at least one value, with its interval where there are two or more."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, None, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    margin = student_t_quantile(0.975, count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - margin, mean + margin, count)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Mean of ours - theirs over the seeds that both have; None where there is no such seed."""
    common = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in common]) if common else None
