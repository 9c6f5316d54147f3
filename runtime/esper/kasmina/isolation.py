"""Trains a seed in isolation: it learns from the host's activations and gradients, and the host never notices.

The objective is the descent direction that the task loss asks of the site: with the gradient g of the loss at the
site's output y, the target is ``t = -g * r * rms(y) / rms(g)`` and the loss ``mean((delta - t)**2) / mean(t**2)``.
The trust region r bounds what the seed may ask for; the scale of the loss, and of a gradient scaler, cancels. A delta
of zero has the loss 1, so ``1 - loss`` on held-out batches is the share of the wanted direction that the seed has
learnt to give. Features are detached and the seed's output is not seen by the host. There is no straight-through
estimator: seeds trained that way are known to diverge.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina.attach import Capture

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["IsolationTrainer", "direction_loss"]

_HOLD_OUT_EVERY = 4


def direction_loss(delta: Tensor, y: Tensor, gradient: Tensor, trust: float) -> Tensor:
    """Squared distance to the descent direction inside the trust region, over its square; 0-dimensional."""
    gradient, y = gradient.float(), y.float()
    tiny = torch.finfo(torch.float32).tiny
    scale = trust * y.square().mean().sqrt() / gradient.square().mean().sqrt().clamp_min(tiny)
    target = -scale * gradient
    return (delta.float() - target).square().mean() / target.square().mean().clamp_min(tiny)


class IsolationTrainer:
    """One seed's private training; every fourth captured batch is held out and never trained on.

    Args:
        delta: the seed's module.
        learning_rate: of its own Adam.
        trust: size of the wanted change over that of the site's output, as root mean squares.
        keep: held-out batches kept, the oldest dropped.
    """

    def __init__(self, delta: nn.Module, *, learning_rate: float = 1e-3, trust: float = 0.1, keep: int = 8) -> None:
        self.delta = delta
        self.trust = trust
        self.steps = 0
        self.finite = True
        self._parameters = list(delta.parameters())
        # To all others the seed is not there: what reduces gradients over ranks must not wait for its.
        delta.requires_grad_(requires_grad=False)
        self._optimizer = torch.optim.Adam(self._parameters, lr=learning_rate)
        self._held_out: deque[Capture] = deque(maxlen=keep)
        self._norm: Tensor | None = None
        self._loss: Tensor | None = None

    def step(self, capture: Capture) -> None:
        """Learn from one captured batch, or hold it out.

        One that overflowed under a gradient scaler, which only its device knows, changes nothing and is not counted.
        """
        assert capture.gradient is not None
        self.steps += 1
        if self.steps % _HOLD_OUT_EVERY == 1:
            self._held_out.append(capture)
            return
        with torch.enable_grad():
            self.delta.requires_grad_()
            loss = direction_loss(self.delta(capture.features), capture.y, capture.gradient, self.trust)
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            self.delta.requires_grad_(requires_grad=False)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
            if gradient is not None and capture.overflowed is not None:
                parameter.grad = torch.where(capture.overflowed > 0, 0.0, gradient)
        self._norm = torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._loss = loss.detach()
        self._optimizer.step()
        # What the user's loop sees of these parameters must stay without gradients.
        self._optimizer.zero_grad(set_to_none=True)

    def measure(self) -> tuple[float | None, int, float | None]:
        """Held-out gain (1 - loss, mean over batches), the number of held-out batches, the last gradient's norm."""
        if not self._held_out:
            return None, 0, self.gradient_norm
        with torch.no_grad():
            losses = [
                float(direction_loss(self.delta(c.features), c.y, c.gradient, self.trust))
                for c in self._held_out
                if c.gradient is not None and not (c.overflowed is not None and bool(c.overflowed))
            ]
        if not losses:
            return None, 0, self.gradient_norm
        gain = 1.0 - sum(losses) / len(losses)
        self.finite = math.isfinite(gain) and all(bool(torch.isfinite(p).all()) for p in self._parameters)
        return gain, len(losses), self.gradient_norm

    @property
    def gradient_norm(self) -> float | None:
        """L2 norm of the last step's gradient before clipping; None before the first step."""
        return None if self._norm is None else float(self._norm)

    def tensors(self) -> list[Tensor]:
        """What training changes: parameters and moments, in an order of its own."""
        states = [self._optimizer.state[p] for p in self._parameters if p in self._optimizer.state]
        moments = [v for state in states for _, v in sorted(state.items()) if isinstance(v, Tensor)]
        return [*self._parameters, *moments]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed trainer needs; the parameters are in the model's own state."""
        batches = [
            {"features": c.features, "y": c.y, "gradient": c.gradient, "overflowed": c.overflowed}
            for c in self._held_out
            if c.gradient is not None
        ]
        return {"steps": self.steps, "optimizer": self._optimizer.state_dict(), "held_out": batches, "norm": self._norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps = state["steps"]
        self._norm = state["norm"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._held_out.extend(Capture(**batch) for batch in state["held_out"])


def birth_check(delta: nn.Module, x: Tensor) -> tuple[bool, float | None, bool]:
    """What a fresh kernel does with a small input of noise: finite?, gradient norm of its parameters, output all zero?

    The noise tests the mechanics of the module (does it run here, does a gradient arrive); it never stands in for data.
    """
    parameters = list(delta.parameters())
    with torch.enable_grad():
        y = delta(x)
        # A loss whose gradient at the output is neither constant nor zero.
        weights = torch.linspace(-1.0, 1.0, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad((y * weights).sum(), parameters, allow_unused=True)
    squares = [g.detach().float().square().sum() for g in gradients if g is not None]
    norm = math.sqrt(float(sum(squares))) if squares else None
    finite = bool(torch.isfinite(y).all()) and norm is not None and math.isfinite(norm)
    return finite, norm, not bool(y.detach().any())
