"""The life of a seed: one enum, one transition table, one gate per forward edge; all else follows from the stage.

Typical use::

    check(Stage.TRAINING, Stage.GRAFTING)               # raises Conflict where the table has no such edge
    reasons = g1_learning(facts)                        # [] means that the gate is open
    for stage in forward_path(Stage.LOADING, Stage.GRAFTING): ...

A gate is a pure function over facts that were measured; a fact that is None was not measured and never opens a gate.
Transitions are commanded by a controller and applied by the runtime at a boundary. Only what protects the host is the
runtime's own: taking out a seed that spiked, is not finite, or whose kernel could not be had.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise

from esper.kasmina._gates import (
    GraftFacts,
    ImpactFacts,
    InterfaceFacts,
    LearningFacts,
    Reason,
    ResetFacts,
    SanityFacts,
    g0_sanity,
    g1_learning,
    g2_stability,
    g3_interface,
    g4_impact,
    g5_reset,
)
from esper.kasmina.control import Stage
from esper.mesh.errors import Conflict

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
    edges = set(pairwise(FORWARD))
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
