"""How alpha gets from 0 to 1."""

from __future__ import annotations

import copy

import pytest
import torch

from esper.kasmina.blending import BAND, Blend, Signals, resolve
from esper.kasmina.control import BlendStrategy as B


def _run(strategy: B, signals: list[Signals], steps: int = 10) -> list[float]:
    alpha = torch.zeros(())
    blend = Blend(strategy, steps, alpha)
    blend.start()
    seen = [float(alpha)]
    for signal in signals:
        blend.step(signal)
        seen.append(float(alpha))
    assert blend.complete == (seen[-1] > 0.999)
    return seen


def test_immediate_and_fixed() -> None:
    """Immediate is 1 from the first step; a fixed ramp begins above 0, rises evenly, and ends at 1."""
    assert [1.0, 1.0] == _run(B.IMMEDIATE, [Signals()])
    ramp = _run(B.FIXED_RAMP, [Signals()] * 12)
    assert [round(0.1 * i, 5) for i in range(1, 11)] + [1.0] * 3 == [round(a, 5) for a in ramp]


def test_performance_waits_for_the_loss() -> None:
    """Alpha advances while the loss falls and waits while it is above its band; without a loss it waits."""
    falling = [Signals(loss=torch.tensor(2.0 - 0.1 * i)) for i in range(9)]
    assert _run(B.PERFORMANCE, falling)[-1] == pytest.approx(1.0)
    rising = [*falling[:3], *(Signals(loss=torch.tensor(50.0 * 3**i)) for i in range(9))]
    assert _run(B.PERFORMANCE, rising)[-1] == pytest.approx(0.4)
    assert [pytest.approx(0.1)] * 4 == _run(B.PERFORMANCE, [Signals()] * 3)


def test_drift_and_gradient_norm() -> None:
    """Alpha waits while activations drift, and while the newborn's gradient outgrows the host's."""
    low, high = Signals(drift=torch.tensor(0.1)), Signals(drift=torch.tensor(0.3))
    seen = _run(B.DRIFT, [low, high, Signals(), high, high, low])
    assert [0.1, 0.2, 0.2, 0.2, 0.3, 0.4, 0.4] == [round(a, 5) for a in seen]
    host = torch.tensor(1.0)
    calm = Signals(newborn_gradient=torch.tensor(BAND), host_gradient=host)
    wild = Signals(newborn_gradient=torch.tensor(BAND * 1.1), host_gradient=host)
    assert [0.1, 0.2, 0.2, 0.2] == [round(a, 5) for a in _run(B.GRADIENT_NORM, [calm, wild, Signals()])]


def test_needs() -> None:
    """Only the strategies that look at a signal ask for it."""
    alpha = torch.zeros(())
    assert [B.DRIFT] == [s for s in B if Blend(s, 1, alpha).needs_drift]
    assert [B.GRADIENT_NORM] == [s for s in B if Blend(s, 1, alpha).needs_host_gradient]


def test_resolve() -> None:
    """A silent newborn never ramps, a loud one always does."""
    assert {B.IMMEDIATE} == {resolve(s, "zero") for s in B}
    assert B.FIXED_RAMP is resolve(B.IMMEDIATE, "random")
    assert B.DRIFT is resolve(B.DRIFT, "random")


def test_state_round_trip() -> None:
    """A resumed ramp goes on exactly."""
    losses = [Signals(loss=torch.tensor(2.0 + (-1) ** i * 0.05 * i)) for i in range(12)]
    alpha = torch.zeros(())
    blend = Blend(B.PERFORMANCE, 10, alpha)
    blend.start()
    for signal in losses[:6]:
        blend.step(signal)
    twin_alpha = alpha.clone()
    twin = Blend(B.FIXED_RAMP, 3, twin_alpha)
    twin.load_state_dict(copy.deepcopy(blend.state_dict()))
    for signal in losses[6:]:
        blend.step(signal)
        twin.step(signal)
    assert torch.equal(alpha, twin_alpha)
