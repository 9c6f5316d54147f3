"""The life of a seed: one enum, one transition table, one gate per forward edge; everything else follows from the stage.

Typical use::

    check(Stage.TRAINING, Stage.GRAFTING)               # raises Conflict where the table has no such edge
    reasons = g1_learning(facts)                        # [] means that the gate is open
    for stage in forward_path(Stage.LOADING, Stage.GRAFTING): ...

A gate is a pure function over facts that were measured; a fact that is None was not measured and never opens a gate.
Transitions are commanded by a controller and applied by the runtime at a boundary. Only what protects the host is the
runtime's own: taking out a seed that spiked, is not finite, or whose kernel could not be had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from esper.kasmina.control import Stage
from esper.mesh.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.kasmina.control import Counterfactual

__all__ = [
    "FORWARD",
    "LIVING",
    "TRANSITIONS",
    "AlphaOwner",
    "Execution",
    "GraftFacts",
    "ImpactFacts",
    "InterfaceFacts",
    "LearningFacts",
    "Reason",
    "ResetFacts",
    "SanityFacts",
    "alpha_owner",
    "check",
    "execution",
    "forward_path",
    "g0_sanity",
    "g1_learning",
    "g2_stability",
    "g3_interface",
    "g4_impact",
    "g5_reset",
    "lawful",
    "trainable",
]

S = Stage
FORWARD: tuple[Stage, ...] = (
    S.DORMANT,
    S.GERMINATED,
    S.LOADING,
    S.TRAINING,
    S.GRAFTING,
    S.STABILIZING,
    S.EVALUATING,
    S.FINE_TUNING,
    S.FOSSILIZED,
)
"""The way of a seed that succeeds."""

LIVING = frozenset(FORWARD[1:-1])
"""Stages that count against the limit of active seeds."""

_CULLABLE = frozenset({S.LOADING, S.TRAINING, S.GRAFTING, S.STABILIZING, S.EVALUATING, S.FINE_TUNING})
_CANCELLABLE = frozenset({S.GERMINATED, S.LOADING, S.TRAINING})


def _table() -> frozenset[tuple[Stage, Stage]]:
    edges = set(zip(FORWARD, FORWARD[1:], strict=False))
    edges |= {(stage, S.CULLED) for stage in _CULLABLE}
    edges |= {(stage, S.CANCELLED) for stage in _CANCELLABLE}
    edges |= {(S.CULLED, S.EMBARGOED), (S.EMBARGOED, S.RESETTING), (S.CANCELLED, S.RESETTING)}
    edges |= {(S.RESETTING, S.DORMANT)}
    # A restore may find the seed anywhere before it became the host's own; DORMANT is what an older checkpoint holds.
    edges |= {(stage, S.ROLLED_BACK) for stage in LIVING | {S.DORMANT}}
    edges |= {(S.ROLLED_BACK, S.DORMANT)}
    return frozenset(edges)


TRANSITIONS: frozenset[tuple[Stage, Stage]] = _table()
"""Every lawful (from, to) pair; what is not here is refused."""


def lawful(before: Stage, after: Stage) -> bool:
    """True where the table has the edge."""
    return (before, after) in TRANSITIONS


def check(before: Stage, after: Stage) -> None:
    """Refuse an edge that the table does not have.

    Raises:
        Conflict: reason UNLAWFUL_TRANSITION; the message names what would have been lawful.
    """
    if lawful(before, after):
        return
    ways = ", ".join(to.name for to in Stage if lawful(before, to)) or "nothing: this stage is final"
    raise Conflict(
        f"seed transition: expected from {before.name} one of {ways}, found {after.name}",
        reason="UNLAWFUL_TRANSITION",
        metadata={"from": before.name, "to": after.name},
    )


def forward_path(before: Stage, target: Stage) -> tuple[Stage, ...]:
    """The stages to enter, in order, to come from `before` to `target` along the forward way.

    Raises:
        Conflict: `target` does not lie ahead of `before`.
    """
    if before not in FORWARD or target not in FORWARD or FORWARD.index(target) <= FORWARD.index(before):
        raise Conflict(
            f"seed transition: expected a target ahead of {before.name}, found {target.name}",
            reason="UNLAWFUL_TRANSITION",
            metadata={"from": before.name, "to": target.name},
        )
    return FORWARD[FORWARD.index(before) + 1 : FORWARD.index(target) + 1]


class Execution(StrEnum):
    """What the hook of a seed does in the host's forward."""

    ABSENT = "absent"
    """There is no hook."""
    ISOLATED = "isolated"
    """It reads and adds nothing."""
    BLENDED = "blended"
    """It adds alpha * delta."""


class AlphaOwner(StrEnum):
    """Who sets alpha."""

    ZERO = "zero"
    """Nobody: it is 0."""
    BLEND = "blend"
    """The blend strategy of the decision."""
    ONE = "one"
    """Nobody: it is 1."""


_BLENDED = frozenset({S.GRAFTING, S.STABILIZING, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED})
_TRAINABLE = frozenset({S.TRAINING, S.GRAFTING, S.FINE_TUNING, S.FOSSILIZED})


def execution(stage: Stage) -> Execution:
    """What the seed does in the forward at this stage."""
    if stage in _BLENDED:
        return Execution.BLENDED
    return Execution.ISOLATED if stage is S.TRAINING else Execution.ABSENT


def trainable(stage: Stage) -> bool:
    """True where the seed's parameters learn: in isolation, or with the host."""
    return stage in _TRAINABLE


def alpha_owner(stage: Stage) -> AlphaOwner:
    """Who sets alpha at this stage."""
    if stage is S.GRAFTING:
        return AlphaOwner.BLEND
    return AlphaOwner.ONE if stage in _BLENDED else AlphaOwner.ZERO


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
    """True where only validated kernels can be had; the cache verifies the signed verdict before it loads a byte."""
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
    """G0: kernel known and validated, fits the site, budget left. Embargo and lock are stages: only DORMANT may grow."""
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
    spikes: int
    """Loss spikes seen since the graft."""
    drift: float | None
    """Root mean square of alpha * delta over that of the host's output; None where not measured."""
    drift_limit: float


def g2_stability(facts: GraftFacts) -> list[Reason]:
    """G2: ramp complete, no loss spike, drift of the activations that everything downstream sees inside the limit."""
    drift = facts.drift
    return _blocked(
        [
            (not facts.ramp_complete, "RAMP", "the ramp of alpha is not complete"),
            (facts.spikes > 0, "SPIKE", f"expected no loss spike since the graft, found {facts.spikes}"),
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
                f"lower bound of the gain: expected above {facts.price:.3g}, "
                f"found {measured.lower_bound if measured else math.nan:.3g}",
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
