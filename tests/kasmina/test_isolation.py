"""Training in isolation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import Capture
from esper.kasmina.isolation import IsolationTrainer, birth_check, direction_loss
from tests.kasmina.hosts import TinyDelta, vector


def _captures(count: int, seed: int = 0) -> list[Capture]:
    """A site whose gradient depends linearly on its features."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    batches = [torch.randn(32, 6, generator=generator) for _ in range(count)]
    return [Capture(x, torch.randn(32, 4, generator=generator), 1e-3 * torch.tanh(x) @ rule) for x in batches]


def test_direction_loss_is_normalised() -> None:
    """Zero scores 1, the trust region's step down the gradient 0, whatever the scale of the gradient."""
    y, gradient = torch.randn(8, 4), torch.randn(8, 4)
    wanted = -0.1 * gradient * y.square().mean().sqrt() / gradient.square().mean().sqrt()
    for scale in (1e-6, 1.0, 1e6):
        assert pytest.approx(1.0, rel=1e-5) == float(direction_loss(torch.zeros(8, 4), y, gradient * scale, 0.1))
        assert pytest.approx(0.0, abs=1e-8) == float(direction_loss(wanted, y, gradient * scale, 0.1))


def test_learns_the_descent_direction() -> None:
    """The seed learns what generalises to held-out batches, at a bounded size, and its parameters keep no gradient."""
    delta = TinyDelta(vector(6, 4), "random", width=16)
    trainer = IsolationTrainer(delta, learning_rate=1e-2)
    assert (None, 0, None) == trainer.measure()
    for capture in _captures(300):
        trainer.step(capture)
    gain, held_out, norm = trainer.measure()
    assert gain is not None
    assert gain > 0.5
    assert (8, True) == (held_out, trainer.finite)
    assert norm is not None
    assert norm > 0
    assert all(p.grad is None for p in delta.parameters())
    fresh = _captures(1, seed=5)[0]
    step = delta(fresh.features).detach()
    assert float((step * fresh.gradient).sum()) < 0
    assert float(step.square().mean().sqrt()) < 0.2 * float(fresh.y.square().mean().sqrt())


def test_noise_teaches_nothing() -> None:
    """Where the gradient has nothing to do with the features, the held-out gain does not pass G1."""
    generator = torch.Generator().manual_seed(3)
    trainer = IsolationTrainer(TinyDelta(vector(6, 4), "random"), learning_rate=1e-2)
    for _ in range(200):
        trainer.step(Capture(*(torch.randn(8, n, generator=generator) for n in (6, 4, 4))))
    gain, _, _ = trainer.measure()
    assert gain is not None
    assert gain < 0.0


def test_not_finite_is_noticed() -> None:
    """A gradient that is not finite shows in the measurement."""
    trainer = IsolationTrainer(TinyDelta(vector(6, 4), "random"))
    for capture in _captures(3):
        assert capture.gradient is not None
        capture.gradient[0, 0] = math.nan
        trainer.step(capture)
    trainer.measure()
    assert not trainer.finite


def test_state_round_trip() -> None:
    """A resumed trainer goes on exactly as the one that was saved."""
    captures = _captures(20)
    delta = TinyDelta(vector(6, 4), "random")
    trainer = IsolationTrainer(delta)
    for capture in captures[:10]:
        trainer.step(capture)
    twin_delta = copy.deepcopy(delta)
    twin = IsolationTrainer(twin_delta)
    twin.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for capture in captures[10:]:
        trainer.step(capture)
        twin.step(capture)
    assert all(torch.equal(a, b) for a, b in zip(delta.parameters(), twin_delta.parameters(), strict=True))
    assert trainer.measure() == twin.measure()


class _Dead(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.detach() * x if self.scale == 0 else self.weight * x * self.scale


def test_birth_check() -> None:
    """A zero-output kernel is silent and alive, a random one loud; overflow and a kernel without gradient are told."""
    x = torch.randn(4, 6)
    finite, norm, silent = birth_check(TinyDelta(vector(6, 4), "zero"), x)
    assert (True, True) == (finite, silent)
    assert norm is not None
    assert norm > 0
    assert not birth_check(TinyDelta(vector(6, 4), "random"), x)[2]
    assert not birth_check(_Dead(math.inf), torch.ones(2, 4))[0]
