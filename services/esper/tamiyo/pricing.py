"""What a growth must be worth: the price of its parameters and of its floating-point operations, in validation loss.

    price = loss * (lambda * parameters / host_parameters + mu * flops_added / flops_before)

Relative to the loss, so that the same lambda and mu serve a loss of 2.3 nats and one of 0.05.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina.control import Stage

if TYPE_CHECKING:
    from esper.kasmina.control import SeedState
    from esper.tamiyo.domain import Situation

__all__ = ["Price", "price_of"]


@dataclass(frozen=True, slots=True)
class Price:
    """A price and what it is made of."""

    loss: float
    """What the gain must exceed, in validation loss."""
    parameter_share: float
    """Parameters of the seed over those of the host."""
    flops_share: float | None
    """Operations that the seed added over those of the model before it; None: not measured, not charged."""

    def __str__(self) -> str:
        flops = "FLOPs not measured" if self.flops_share is None else f"{self.flops_share:.1%} FLOPs"
        return f"price {self.loss:.3g} ({self.parameter_share:.1%} parameters, {flops})"


def price_of(situation: Situation, seed: SeedState) -> Price:
    """The price of a seed now."""
    loss = situation.state.validation_loss
    scale = loss if loss is not None and math.isfinite(loss) and loss > 0 else 0.0
    share = seed.parameters / max(1, situation.hello.host_parameters)
    flops = _flops_share(situation, seed)
    rules = situation.rules
    return Price(scale * (rules.price_parameters * share + rules.price_flops * (flops or 0.0)), share, flops)


def _flops_share(situation: Situation, seed: SeedState) -> float | None:
    life = situation.memory.life(seed.index)
    now = situation.state.flops_per_sample
    if life is None or life.flops_before is None or now is None or not life.flops_before > 0:
        return None
    # Seeds that were born later share in what was added since; parameters tell how much.
    later = {other.seed for other in situation.memory.lives if other.born >= life.born}
    grown = sum(
        other.parameters
        for other in situation.state.seeds
        if other.index in later and Stage.GRAFTING <= other.stage <= Stage.FOSSILIZED
    )
    part = seed.parameters / grown if grown else 1.0
    return max(0.0, now - life.flops_before) / life.flops_before * min(1.0, part)
