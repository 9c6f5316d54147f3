"""Recipe ``digits``."""

from __future__ import annotations

from esper.tolaria.config import (
    ConvHost,
    DigitsData,
    GrowthConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)

__all__ = ["digits"]


def digits() -> RunConfig:
    """scikit-learn's digits, 8 x 8 pixels, on a convolutional host with a narrow middle, in under a minute on one core.

    The smallest task on which growth has something to repair.
    """
    return RunConfig(
        recipe="digits",
        task="digits",
        data=DigitsData(),
        host=ConvHost(),
        optimizer=OptimizerConfig(name="adamw", learning_rate=5e-3, weight_decay=1e-4),
        schedule=ScheduleConfig(epochs=60),
        growth=GrowthConfig(parameter_budget=3_000, max_active_seeds=1),
    )
