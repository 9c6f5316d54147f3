"""How alpha goes from 0 to 1 while a seed is grafted: one class per strategy, all arithmetic on the device.

Every strategy advances a progress by ``1 / blend_steps`` per optimizer step when its condition holds, and waits
otherwise:

- immediate: alpha is 1 from the first step. For modules that are born at zero output: a ramp would only starve them.
- fixed ramp: there is no condition.
- performance: the training loss is not above its moving mean by more than one moving deviation.
- drift: rms(alpha * delta) over rms(y) changed by at most a limit since the last step, so what everything downstream
  sees moves slowly.
- gradient norm: the newborn's gradient, per parameter root mean square, is at most `BAND` times that of the host.

Alpha is a device scalar and conditions are tensors, so a ramp costs no synchronisation and a compiled graph no
recompilation. A ramp without a condition is driven by the host, which only says what alpha is; the others are driven
on the device. The host branch is never faded: the blend is ``y + alpha * delta`` throughout. While alpha is below 1
the newborn's parameter gradients are divided by it (`newborn.NewbornGroups.compensate`), so a small alpha does not
mean a small step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.control import BlendStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["BAND", "Blend", "Signals", "resolve"]

BAND = 10.0
"""Largest lawful ratio of the newborn's to the host's gradient, per parameter."""
_DECAY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What a strategy may look at after an optimizer step; device scalars, None where not there."""

    loss: Tensor | float | None = None
    """One number; a plain one where the loop itself has it as such."""
    drift: Tensor | None = None
    newborn_gradient: Tensor | None = None
    """Root mean square per parameter."""
    host_gradient: Tensor | None = None


def resolve(strategy: BlendStrategy, birth: str) -> BlendStrategy:
    """The strategy that fits the kernel's birth: zero output grafts at once, any other output must ramp."""
    if birth == "zero":
        return BlendStrategy.IMMEDIATE
    return BlendStrategy.FIXED_RAMP if strategy is BlendStrategy.IMMEDIATE else strategy


class Blend:
    """Drives one seed's alpha during GRAFTING.

    Args:
        strategy: which condition lets alpha advance.
        steps: length of the shortest ramp, in optimizer steps.
        alpha: the seed's device scalar.
        write: takes what the host decides of alpha; None fills `alpha` itself.
        drift_limit: largest change of the ratio per step with which `BlendStrategy.DRIFT` advances.
    """

    def __init__(
        self,
        strategy: BlendStrategy,
        steps: int,
        alpha: Tensor,
        *,
        write: Callable[[float], object] | None = None,
        drift_limit: float = 0.1,
    ) -> None:
        self.strategy = strategy
        self.steps = max(1, steps)
        self.alpha = alpha
        self.drift_limit = drift_limit
        self.settled = False
        """True once the ramp was seen complete, at a boundary; unlike `complete` it does not read the device."""
        self._write = write or alpha.fill_
        self._ramp = np.float32(0.0)
        """Alpha of a ramp without a condition; in the arithmetic of the device."""
        self._mean = torch.full_like(alpha, float("nan"), dtype=torch.float32)
        self._variance = torch.zeros_like(self._mean)

    @property
    def needs_drift(self) -> bool:
        """True where the hook must measure the ratio of delta to output at every step."""
        return self.strategy is BlendStrategy.DRIFT

    @property
    def needs_host_gradient(self) -> bool:
        """True where the host's gradient norm is wanted at every step."""
        return self.strategy is BlendStrategy.GRADIENT_NORM

    def start(self) -> None:
        """Set alpha for the first grafted step: never 0, which would give the newborn no gradient."""
        self.settled = self.strategy is BlendStrategy.IMMEDIATE
        self._say(1.0 if self.settled else 1.0 / self.steps)

    def _say(self, alpha: float) -> None:
        self._ramp = min(np.float32(alpha), np.float32(1.0))
        self._write(float(self._ramp))

    def step(self, signals: Signals) -> None:
        """Advance alpha after an optimizer step where the strategy's condition holds."""
        if self.strategy is BlendStrategy.IMMEDIATE:
            return
        if self.strategy is BlendStrategy.FIXED_RAMP:
            if self._ramp < 1.0:
                self._say(float(self._ramp + np.float32(1.0 / self.steps)))
            return
        allowed = self._allowed(signals)
        if allowed is None:
            return
        with torch.no_grad():
            self.alpha.add_(allowed.to(self.alpha.dtype) / self.steps).clamp_(max=1.0)

    def _allowed(self, signals: Signals) -> Tensor | None:
        if self.strategy is BlendStrategy.PERFORMANCE:
            return None if signals.loss is None else self._within_band(self._scalar(signals.loss))
        if self.strategy is BlendStrategy.DRIFT:
            return None if signals.drift is None else self._moved_little(signals.drift.detach().to(self._mean))
        if signals.newborn_gradient is None or signals.host_gradient is None:
            return None
        return signals.newborn_gradient <= BAND * signals.host_gradient

    def _scalar(self, value: Tensor | float) -> Tensor:
        return value.detach().to(self._mean) if isinstance(value, Tensor) else torch.full_like(self._mean, value)

    def _moved_little(self, drift: Tensor) -> Tensor:
        last, self._mean = torch.where(torch.isnan(self._mean), drift, self._mean), drift
        return (drift - last).abs() <= self.drift_limit

    def _within_band(self, loss: Tensor) -> Tensor:
        first = torch.isnan(self._mean)
        mean = torch.where(first, loss, self._mean)
        gap = loss - mean
        allowed = gap <= self._variance.sqrt()
        self._mean = mean + (1.0 - _DECAY) * gap
        self._variance = torch.where(first, gap.square(), _DECAY * (self._variance + (1.0 - _DECAY) * gap.square()))
        return allowed

    @property
    def complete(self) -> bool:
        """True when alpha is 1. Reads the device: ask at boundaries."""
        # Sums of 1/steps in float32 end within rounding of 1.
        return float(self.alpha) >= 1.0 - 1e-4

    def state_dict(self) -> dict[str, Any]:
        """Progress beyond alpha itself, which is saved with the model."""
        return {
            "strategy": self.strategy.value,
            "steps": self.steps,
            "settled": self.settled,
            "mean": self._mean.detach().clone(),
            "variance": self._variance.detach().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; alpha has its value already."""
        self.strategy, self.steps = BlendStrategy(state["strategy"]), state["steps"]
        self.settled = state["settled"]
        self._ramp = np.float32(float(self.alpha))
        self._mean, self._variance = state["mean"].to(self.alpha.device), state["variance"].to(self.alpha.device)
