"""Recipe ``stdlib-lm``."""

from __future__ import annotations

from esper.tolaria.config import (
    GrowthConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StdlibData,
    TransformerHost,
)

__all__ = ["stdlib_lm"]


def stdlib_lm() -> RunConfig:
    """A small causal transformer over the bytes of the Python standard library's source, in some minutes on one core.

    Files are split by path, so that no file is both learnt from and judged on.
    """
    return RunConfig(
        recipe="stdlib-lm",
        task="stdlib-lm",
        data=StdlibData(),
        host=TransformerHost(),
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-3, weight_decay=0.01, betas=(0.9, 0.99)),
        schedule=ScheduleConfig(epochs=20, warmup_steps=50),
        growth=GrowthConfig(parameter_budget=30_000, max_active_seeds=1),
    )
