"""Recipe ``cifar10``."""

from __future__ import annotations

from esper.tolaria.config import (
    Cifar10Data,
    GrowthConfig,
    MachineConfig,
    OptimizerConfig,
    ResidualHost,
    RunConfig,
    ScheduleConfig,
)

__all__ = ["cifar10"]


def cifar10() -> RunConfig:
    """CIFAR-10 from its binary files (give their folder as data.dir) on a small residual network; hours on two cores.

    Lower schedule.epochs to try it.
    """
    return RunConfig(
        recipe="cifar10",
        task="cifar10",
        data=Cifar10Data(),
        host=ResidualHost(),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.05, weight_decay=5e-4, momentum=0.9),
        schedule=ScheduleConfig(epochs=30, warmup_steps=200),
        growth=GrowthConfig(parameter_budget=60_000, max_active_seeds=2),
        machine=MachineConfig(threads=2),
    )
