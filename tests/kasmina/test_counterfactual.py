"""Paired gains and their lower bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.counterfactual import paired, student_t_cdf, student_t_quantile
from esper.mesh.errors import InvalidInput


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    # Tables of the t distribution, and scipy 1.17 for the fractional digits.
    [
        (0.95, 1, 6.313751514675043),
        (0.95, 2, 2.919985580353726),
        (0.95, 7, 1.894578605061305),
        (0.975, 10, 2.228138851964939),
        (0.99, 30, 2.457261542411411),
        (0.95, 1000, 1.646378817),
        (0.05, 7, -1.894578605061305),
        (0.5, 3, 0.0),
    ],
)
def test_quantiles(probability: float, degrees: float, expected: float) -> None:
    """Quantiles are those of the tables."""
    assert pytest.approx(expected, rel=1e-8, abs=1e-12) == student_t_quantile(probability, degrees)


@given(st.floats(0.001, 0.999), st.floats(1.0, 500.0))
def test_quantile_inverts_the_distribution(probability: float, degrees: float) -> None:
    """cdf(quantile(p)) is p."""
    assert pytest.approx(probability, abs=1e-9) == student_t_cdf(student_t_quantile(probability, degrees), degrees)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_bounds(probability: float, degrees: float) -> None:
    """Probabilities of 0 and 1 and less than one degree of freedom are refused."""
    with pytest.raises(InvalidInput, match="t quantile"):
        student_t_quantile(probability, degrees)


def test_pairing_cancels_what_makes_batches_hard() -> None:
    """A small gain that every batch shows is certain, though batches differ by a hundred times as much."""
    on = [1.0, 5.0, 20.0, 3.0, 9.0]
    found = paired([loss + gain for loss, gain in zip(on, [0.1, 0.11, 0.09, 0.1, 0.1], strict=True)], on)
    assert found is not None
    assert (pytest.approx(0.1), 5, 0.95) == (found.mean_gain, found.batches, found.confidence)
    assert pytest.approx(0.1 - 2.131846786 * math.sqrt(5e-5 / 5)) == found.lower_bound


def test_what_can_not_be_measured_is_none() -> None:
    """One batch, different numbers of batches, and losses that are not finite give no measurement."""
    assert paired([1.0], [1.0]) is None
    assert paired([1.0, 2.0], [1.0]) is None
    assert paired([1.0, math.nan], [1.0, 2.0]) is None
    assert paired([], []) is None
