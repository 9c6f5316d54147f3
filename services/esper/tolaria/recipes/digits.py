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
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=1e-4),
        schedule=ScheduleConfig(epochs=40),
        growth=GrowthConfig(
            parameter_budget=3_000,
            max_active_seeds=2,
            # The features are what is too narrow; the head's width is the task's own.
            sites=("stem", "stem..body", "body", "body.*"),
            kinds=("parallel",),
            blueprints=("conv_bottleneck", "depthwise_separable", "dilated_conv", "wide_residual"),
        ),
    )
