"""The gates of a seed's life: pure functions over measured facts that return reasons; no reason means open.

`esper.kasmina.seeds` is their public home.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.kasmina.control import Counterfactual

__all__ = [
    "GraftFacts",
    "ImpactFacts",
    "InterfaceFacts",
    "LearningFacts",
    "Reason",
    "ResetFacts",
    "SanityFacts",
    "g0_sanity",
    "g1_learning",
    "g2_stability",
    "g3_interface",
    "g4_impact",
    "g5_reset",
]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a gate does not open: a code for programs and a sentence for people."""

    code: str
    """A name of ``esper.v1.GateBlock`` without its prefix."""
    text: str

    def __str__(self) -> str:
        return self.text


def _blocked(rules: Sequence[tuple[bool, str, str]]) -> list[Reason]:
    return [Reason(code, text) for broken, code, text in rules if broken]


@dataclass(frozen=True, slots=True, kw_only=True)
class SanityFacts:
    """What G0 asks before GERMINATED."""

    kernel_named: bool
    validated: bool
    """True where only validated kernels can be had: the cache verifies a signed verdict before it loads a byte."""
    unfit: tuple[str, ...]
    """Why the kernel or the optimizer does not fit the site; empty where it fits or cannot be known yet."""
    parameters_left: int
    """Budget of the run minus what has grown."""
    kernel_parameters: int | None
    """None before the kernel is here: checked again when it is."""
    living: int
    """Other seeds from GERMINATED to FINE_TUNING."""
    max_living: int


def g0_sanity(facts: SanityFacts) -> list[Reason]:
    """G0: kernel known and validated, fits the site, budget left. Closed and locked sites are not DORMANT."""
    over = facts.kernel_parameters is not None and facts.kernel_parameters > facts.parameters_left
    found = f"found {facts.kernel_parameters} for {facts.parameters_left} left"
    return _blocked(
        [
            (not facts.kernel_named, "OTHER", "no kernel is named"),
            (not facts.validated, "OTHER", "the kernel is not VALIDATED"),
            *((True, "OTHER", text) for text in facts.unfit),
            (facts.parameters_left <= 0 or over, "OTHER", f"parameter budget: expected room for the kernel, {found}"),
            (
                facts.living >= facts.max_living,
                "OTHER",
                f"expected fewer than {facts.max_living} living seeds, found {facts.living}",
            ),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningFacts:
    """What G1 asks when TRAINING is left."""

    finite: bool
    gradient_norm: float | None
    gradient_limit: float
    needs_isolation: bool
    """False for a seed that is born at zero output: it passes through."""
    isolation_gain: float | None
    held_out: int
    """Held-out batches behind `isolation_gain`."""
    min_held_out: int


def g1_learning(facts: LearningFacts) -> list[Reason]:
    """G1: all finite, gradient non-zero and bounded, local objective improves on held-out activations."""
    norm, gain = facts.gradient_norm, facts.isolation_gain
    alive = norm is not None and math.isfinite(norm) and 0.0 < norm <= facts.gradient_limit
    few = facts.needs_isolation and (gain is None or facts.held_out < facts.min_held_out)
    return _blocked(
        [
            (not facts.finite, "NOT_FINITE", "a parameter, output or gradient of the seed is not finite"),
            (not alive, "GRADIENT", f"gradient norm: expected within (0, {facts.gradient_limit:g}], found {norm}"),
            (few, "TOO_SOON", f"expected {facts.min_held_out} held-out batches, found {facts.held_out}"),
            (
                facts.needs_isolation and not few and not (gain is not None and gain > 0.0),
                "NOT_LEARNING",
                f"held-out local objective: expected a gain above 0, found {gain}",
            ),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftFacts:
    """What G2 asks when GRAFTING is left."""

    ramp_complete: bool
    steps: int
    """Optimizer steps since the graft."""
    min_steps: int
    losses: int
    """Training losses seen since the graft."""
    high: int
    """High losses in a row up to now: too few for a spike, which takes the seed out, too many to call it stable."""
    drift: float | None
    """Root mean square of alpha * delta over that of the host's output; None where not measured."""
    drift_limit: float


def g2_stability(facts: GraftFacts) -> list[Reason]:
    """G2: ramp complete, losses seen and none high, drift of what everything downstream sees inside the limit."""
    drift = facts.drift
    return _blocked(
        [
            (not facts.ramp_complete, "RAMP", "the ramp of alpha is not complete"),
            (
                facts.high > 0,
                "SPIKE",
                f"expected the training loss to be calm, found {facts.high} high losses in a row",
            ),
            (facts.losses <= 0, "NOT_MEASURED", "no training loss was seen since the graft: growth.step() got none"),
            (drift is None, "NOT_MEASURED", "the drift of activations was not measured yet"),
            (
                drift is not None and not drift <= facts.drift_limit,
                "DRIFT",
                f"drift of activations: expected at most {facts.drift_limit:g}, found {drift}",
            ),
            (facts.steps < facts.min_steps, "TOO_SOON", f"expected {facts.min_steps} steps, found {facts.steps}"),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceFacts:
    """What G3 asks when STABILIZING is left."""

    groups_per_parameter: tuple[int, ...]
    """For each parameter of the seed, the number of optimizer groups that hold it."""
    changed: tuple[str, ...]
    """Parameters whose shape or dtype is no longer that of the kernel."""
    steps: int
    settle_steps: int
    """Steps that the host's running statistics need to settle; 0 for a host without any."""


def g3_interface(facts: InterfaceFacts) -> list[Reason]:
    """G3: every trainable parameter in exactly one optimizer group, shapes and dtypes hold, buffers settled."""
    loose = sum(count != 1 for count in facts.groups_per_parameter)
    return _blocked(
        [
            (
                loose > 0,
                "INTERFACE",
                f"expected each parameter in exactly one optimizer group, found {loose} otherwise",
            ),
            (bool(facts.changed), "INTERFACE", f"shape or dtype changed: {', '.join(facts.changed)}"),
            (
                facts.steps < facts.settle_steps,
                "TOO_SOON",
                f"running statistics: expected {facts.settle_steps} steps to settle, found {facts.steps}",
            ),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImpactFacts:
    """What G4 asks before FOSSILIZED."""

    counterfactual: Counterfactual | None
    price: float
    """Loss that the parameters and FLOPs must be worth."""
    boundaries: int
    """Boundaries of the probation so far."""
    min_boundaries: int
    steps: int
    min_steps: int
    """Equivalent of the probation in steps; 0 where only boundaries count."""


def g4_impact(facts: ImpactFacts) -> list[Reason]:
    """G4: after a fair probation, the lower confidence bound of the counterfactual gain exceeds the price."""
    measured = facts.counterfactual
    early = facts.boundaries < facts.min_boundaries or facts.steps < facts.min_steps
    asked = f"{facts.min_boundaries} boundaries and {facts.min_steps} steps"
    return _blocked(
        [
            (early, "PROBATION", f"expected {asked}, found {facts.boundaries} and {facts.steps}"),
            (measured is None, "NOT_MEASURED", "no counterfactual was measured on held-out data"),
            (
                measured is not None and not measured.lower_bound > facts.price,
                "NO_GAIN",
                (
                    f"lower bound of the gain: expected above {facts.price:.3g}, "
                    f"found {measured.lower_bound if measured else math.nan:.3g}"
                ),
            ),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetFacts:
    """What G5 asks before a seed is DORMANT again."""

    parameters: int
    """Parameters of the seed that are still in the model."""
    optimizer_entries: int
    """Groups and states of the optimizer that still know them."""
    hooks: int
    """Hooks of the seed that are still on host modules."""
    cache_entries: int
    """Modules, isolation data and captured activations that the runtime still keeps for the seed."""


def g5_reset(facts: ResetFacts) -> list[Reason]:
    """G5: parameters, optimizer state, cache entries and hooks are gone."""
    left = {
        "parameters": facts.parameters,
        "optimizer entries": facts.optimizer_entries,
        "hooks": facts.hooks,
        "cache entries": facts.cache_entries,
    }
    return [Reason("OTHER", f"expected no {name} left, found {count}") for name, count in left.items() if count]
