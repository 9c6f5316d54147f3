"""What is minimised and what is reported: cross-entropy over classes or bytes, and the share of right answers.

Shapes: logits_NK with targets_N, or logits_NTV with targets_NT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from esper.tolaria.data.base import Batch

__all__ = ["Evaluation", "evaluate", "loss_of"]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over all predictions."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A network on a held-out set."""

    losses: tuple[float, ...]
    """Mean loss of each batch, in nats, in a fixed order: what counterfactuals are paired over."""
    weights: tuple[int, ...]
    """Predictions per batch."""
    correct: int
    """Right predictions."""

    @property
    def loss(self) -> float:
        """Mean over predictions."""
        return sum(loss * weight for loss, weight in zip(self.losses, self.weights, strict=True)) / sum(self.weights)

    @property
    def accuracy(self) -> float:
        """Share of right predictions, 0 to 1."""
        return self.correct / sum(self.weights)

    @property
    def samples(self) -> int:
        """Predictions made."""
        return sum(self.weights)


def evaluate(model: nn.Module, batches: Sequence[Batch]) -> Evaluation:
    """Run a network over a held-out set; its mode is put back, no generator is touched."""
    training = model.training
    model.eval()
    losses, weights, correct = [], [], 0
    try:
        with torch.no_grad():
            for inputs, targets in batches:
                logits = model(inputs)
                losses.append(loss_of(logits, targets).item())
                weights.append(targets.numel())
                correct += int((logits.argmax(-1) == targets).sum().item())
    finally:
        model.train(training)
    return Evaluation(tuple(losses), tuple(weights), correct)
