"""Optimizer and learning-rate schedule.

The rate is a pure function of the step, so it needs no state of its own: a resumed run computes the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from esper.tolaria.config import OptimizerConfig, ScheduleConfig

__all__ = ["build_optimizer", "rate_at", "total_steps"]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the host: one group, parameters in the order of the model."""
    parameters = list(model.parameters())
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, foreach=True
    )


def total_steps(config: ScheduleConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return config.epochs * steps_per_epoch


def rate_at(step: int, total: int, config: ScheduleConfig) -> float:
    """Factor on the learning rate for the `step`-th step of `total`, counted from 0: warm-up, 1, linear decay."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    start = config.decay_start * total
    if step < start:
        return warm
    left = (total - step) / (total - start)
    return warm * (config.final_scale + (1.0 - config.final_scale) * left)
