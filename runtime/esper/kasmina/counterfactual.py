"""Measures what a seed is worth: the same network with the seed off and on, on the same held-out batches.

The difference ``loss(off) - loss(on)`` is taken per batch, so that what makes a batch hard cancels. The lower bound
of its mean is one-sided, by the t distribution of "Student" (W. S. Gosset, *The probable error of a mean*, Biometrika
6, 1908) with n - 1 degrees of freedom. Its quantile is found by bisection on the regularised incomplete beta
function, computed as a continued fraction by the modified Lentz method (W. J. Lentz, Applied Optics 15, 1976).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from esper.kasmina.control import Counterfactual
from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["paired", "student_t_cdf", "student_t_quantile"]

_TINY = 1e-300


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function; converges fast for x < (a + 1) / (a + b + 2)."""
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0) or _TINY)
    value = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + numerator * d or _TINY)
            c = 1.0 + numerator / c or _TINY
            value *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return value


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), regularised."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


def student_t_cdf(t: float, degrees: float) -> float:
    """Probability that a t-distributed number is at most `t`."""
    tail = 0.5 * _incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t * t))
    return 1.0 - tail if t > 0 else tail


def student_t_quantile(probability: float, degrees: float) -> float:
    """The t that `student_t_cdf` maps to `probability`.

    Raises:
        InvalidInput: a probability outside (0, 1) or fewer than one degree of freedom.
    """
    if not 0.0 < probability < 1.0 or degrees < 1.0:
        raise InvalidInput(f"t quantile: expected 0 < p < 1 and >= 1 degrees, found p={probability}, {degrees} degrees")
    if probability < 0.5:
        return -student_t_quantile(1.0 - probability, degrees)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        low, high = high, high * 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in {low, high}:
            break
        low, high = (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
    return 0.5 * (low + high)


def paired(off: Sequence[float], on: Sequence[float], confidence: float = 0.95) -> Counterfactual | None:
    """Mean gain and its lower bound, paired over batches.

    Args:
        off: loss of each batch without the seed.
        on: loss of the same batches, in the same order, with it.
        confidence: of the one-sided bound.

    Returns:
        None where it can not be measured: fewer than two batches, different numbers of them, or a loss that is not
        finite.
    """
    if len(off) != len(on) or len(on) < 2 or not all(map(math.isfinite, (*off, *on))):
        return None
    gains = [without - with_ for without, with_ in zip(off, on, strict=True)]
    count = len(gains)
    mean = math.fsum(gains) / count
    variance = math.fsum((gain - mean) ** 2 for gain in gains) / (count - 1)
    margin = student_t_quantile(confidence, count - 1) * math.sqrt(variance / count)
    return Counterfactual(mean_gain=mean, lower_bound=mean - margin, confidence=confidence, batches=count)
