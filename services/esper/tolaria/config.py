"""The full configuration of one training run: frozen dataclasses, each field documented, faults told in sentences.

A recipe returns a `RunConfig`; a user changes fields of it by dotted path (`overrides.apply`). It is written to
``config.json`` of the run and read back by the training process::

    config = recipes.get("digits").build()
    config = apply(config, {"schedule.epochs": 20})
    assert decode(RunConfig, encode(config)) == config
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from esper.tolaria.config_task import (
    Cifar10Data,
    ConvHost,
    Data,
    DigitsData,
    Host,
    ResidualHost,
    StdlibData,
    TransformerHost,
    at_least,
    fraction,
    need,
)

__all__ = [
    "ArtifactsConfig",
    "CheckpointConfig",
    "Cifar10Data",
    "ControlConfig",
    "ConvHost",
    "Data",
    "DigitsData",
    "GrowthConfig",
    "GuardConfig",
    "Host",
    "MachineConfig",
    "OptimizerConfig",
    "ResidualHost",
    "RunConfig",
    "ScheduleConfig",
    "StdlibData",
    "TransformerHost",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """How host parameters are updated; newborns get groups of their own in the same optimizer."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or stochastic gradient descent with Nesterov momentum."""
    learning_rate: float = 3e-3
    """Rate of the host while growing."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (AdamW) or L2 penalty (SGD) of the host. Newborns have none until they are fossilized."""
    momentum: float = 0.9
    """SGD only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only: decay rates of the two moments."""
    clip_norm: float = 1.0
    """Largest L2 norm of the whole gradient, host and newborns together; 0 for no clipping."""

    def __post_init__(self) -> None:
        need(
            self.learning_rate > 0,
            f"optimizer.learning_rate: expected above 0, found {self.learning_rate}",
            "optimizer.learning_rate",
        )
        at_least(self.weight_decay, 0, "optimizer.weight_decay")
        need(
            0 <= self.momentum < 1,
            f"optimizer.momentum: expected 0 up to but not 1, found {self.momentum}",
            "optimizer.momentum",
        )
        need(
            all(0 <= b < 1 for b in self.betas),
            f"optimizer.betas: expected 0 up to but not 1, found {self.betas}",
            "optimizer.betas",
        )
        at_least(self.clip_norm, 0, "optimizer.clip_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Length of the run, and the learning rate over it: warm-up, constant while growing, one decay at the end."""

    epochs: int = 40
    """Passes over the training data."""
    boundaries_per_epoch: int = 1
    """Validations, and so possible decisions, in an epoch."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from nothing."""
    decay_start: float = 0.7
    """Fraction of the run after which the rate decays linearly; the controller stops growing there."""
    final_scale: float = 0.02
    """Rate at the very end over the constant rate."""

    def __post_init__(self) -> None:
        at_least(self.epochs, 1, "schedule.epochs")
        at_least(self.boundaries_per_epoch, 1, "schedule.boundaries_per_epoch")
        at_least(self.warmup_steps, 0, "schedule.warmup_steps")
        fraction(self.decay_start, "schedule.decay_start")
        need(
            0 <= self.final_scale <= 1,
            f"schedule.final_scale: expected 0 to 1, found {self.final_scale}",
            "schedule.final_scale",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthConfig:
    """How much the host may grow, and where."""

    parameter_budget: int = 2_000
    """Parameters that growth may add over the whole run."""
    max_active_seeds: int = 1
    """Seeds between GERMINATED and FINE_TUNING at one time."""
    blueprints: tuple[str, ...] = ()
    """Names of the only blueprints allowed; empty for all that the library has."""
    sites: tuple[str, ...] = ()
    """Shell patterns of the names of modules that may grow, like "body" or "blocks.*"; empty for all."""
    kinds: tuple[Literal["series", "parallel"], ...] = ("series", "parallel")
    """Ways of attaching that may be used."""
    granularities: tuple[Literal["layer", "block", "span"], ...] = ("layer", "block", "span")
    """Sizes of places that may grow."""
    probation_boundaries: int = 2
    """Boundaries that a module must train on the task before it may be kept for good: about two epochs."""
    price_per_million_parameters: float = 0.1
    """Validation loss, in nats, that a million parameters must be worth to be kept; smaller modules in proportion."""
    watch_steps: int = 200
    """Optimizer steps after a graft in which a loss spike takes the module out and puts the host back."""
    static_learning_rate_scale: float = 0.0
    """For the STATIC arm: rate of the modules over the host's for as long as they were newborns in the reference run.
    0 takes the scale that each of them had there."""

    def __post_init__(self) -> None:
        at_least(self.parameter_budget, 0, "growth.parameter_budget")
        at_least(self.max_active_seeds, 1, "growth.max_active_seeds")
        at_least(self.probation_boundaries, 1, "growth.probation_boundaries")
        at_least(self.price_per_million_parameters, 0, "growth.price_per_million_parameters")
        at_least(self.watch_steps, 0, "growth.watch_steps")
        at_least(self.static_learning_rate_scale, 0, "growth.static_learning_rate_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """How the run deals with its controller."""

    advise_deadline_s: float = 5.0
    """Longest wait for advice at a boundary. None within it means: no growth at this boundary."""
    prepare_wait_s: float = 120.0
    """Longest wait, before training, for the library to build what this run could grow; 0 starts at once."""
    on_loss: Literal["continue", "pause"] = "continue"
    """When the controller does not answer at a boundary: train on without growth, or go back to before this boundary,
    checkpoint and pause, so that a resume takes the same decisions as a run that was never interrupted."""

    def __post_init__(self) -> None:
        need(
            self.advise_deadline_s > 0,
            f"control.advise_deadline_s: expected above 0, found {self.advise_deadline_s}",
            "control.advise_deadline_s",
        )
        at_least(self.prepare_wait_s, 0, "control.prepare_wait_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and how many checkpoints stay."""

    keep: int = 3
    """Checkpoints kept; older ones are deleted after a newer one is safe."""
    every_steps: int = 0
    """Save also every so many optimizer steps between boundaries; 0 saves at boundaries only."""

    def __post_init__(self) -> None:
        at_least(self.keep, 1, "checkpoint.keep")
        at_least(self.every_steps, 0, "checkpoint.every_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """What happens when the host itself becomes unstable; seeds have their own spike detector."""

    max_rollbacks: int = 3
    """Times that a loss or gradient that is not finite sends the run back to its last boundary; once more, it fails."""
    rate_cut: float = 0.5
    """Factor on the learning rate of the rest of the run after each such rollback: repeating the same steps at the same
    rate would end in the same place."""

    kernel_hang_s: float = 60.0
    """Seconds from which a call into a kernel counts as hung: the process ends, and the run is resumed without that
    kernel's compiled code. 0 waits for ever."""

    def __post_init__(self) -> None:
        at_least(self.max_rollbacks, 0, "guard.max_rollbacks")
        at_least(self.kernel_hang_s, 0, "guard.kernel_hang_s")
        need(
            0 < self.rate_cut < 1,
            f"guard.rate_cut: expected between 0 and 1, both excluded, found {self.rate_cut}",
            "guard.rate_cut",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """How the training process uses the machine. Results are repeatable for equal values on equal machines."""

    threads: int = 1
    """Threads of torch; part of the result, because sums are split among them."""
    deterministic: bool = True
    """Ask torch for deterministic algorithms only."""

    def __post_init__(self) -> None:
        at_least(self.threads, 1, "machine.threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactsConfig:
    """What a finished run leaves behind, beside its checkpoints and lineage."""

    export: bool = True
    """Write the final network as plain PyTorch under ``export/``."""
    html: bool = True
    """Write ``report.html`` beside ``report.json``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    recipe: str
    """Name of the recipe that this began as."""
    task: str
    """Free label of the task, for field reports."""
    data: Data
    """What is learnt."""
    host: Host
    """What learns."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the host is updated."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How long, at which rate."""
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    """How much may grow."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """How the controller is asked."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens when the host becomes unstable."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """Threads and determinism."""
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)
    """What is left behind."""
    seed: int = 0
    """Seed of initialisation, order of the data and augmentation."""

    def __post_init__(self) -> None:
        fits = {"digits": "conv", "stdlib": "transformer", "cifar10": "residual"}[self.data.kind]
        need(
            self.host.kind == fits,
            f"host.kind: expected {fits!r} for data of kind {self.data.kind!r}, found {self.host.kind!r}",
            "host.kind",
        )
        need(0 <= self.seed < 2**63, f"seed: expected 0 to 2**63 - 1, found {self.seed}", "seed")
