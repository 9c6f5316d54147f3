"""Floating-point operations of a run: matrix products and convolutions, 2 operations per multiply-add.

A backward pass counts as two forwards. Validation, probes and counterfactuals count as forwards. What a module that
grew costs counts from the step at which it appears, whether it stays or is culled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TRAINING_FACTOR", "forward_flops"]

TRAINING_FACTOR = 3
"""Forward and backward over forward alone."""


def forward_flops(model: nn.Module, inputs: Tensor) -> float:
    """Operations of one forward of `model` per sample of `inputs` (N, ...); the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(inputs)
    finally:
        model.train(training)
    return float(counter.get_total_flops()) / len(inputs)
