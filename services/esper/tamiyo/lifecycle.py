"""What becomes of seeds that are there: forward when ready, out when they do not pay, open again when it is time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esper.kasmina.control import Action, Stage
from esper.tamiyo.domain import Proposal
from esper.tamiyo.pricing import price_of
from esper.tamiyo.shield import probation_served

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.control import SeedState
    from esper.tamiyo.domain import Situation

__all__ = ["Plan", "plan"]

_ENDING = 0.5  # of a boundary: the schedule is over, this is the last word


@dataclass(slots=True)
class Plan:
    """Commands for living and spent seeds, and why the others are left alone."""

    proposals: list[Proposal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan(situation: Situation) -> Plan:
    """Go through all seeds by index."""
    result = Plan()
    for index in sorted(situation.seeds):
        seed = situation.seeds[index]
        rule = _RULES.get(seed.stage)
        if rule is not None and index in situation.sites:
            said = rule(situation, seed)
            if isinstance(said, Proposal):
                result.proposals.append(said)
            else:
                result.notes.append(f"seed {index} {said}")
    return result


def _ends(situation: Situation) -> bool:
    left = situation.boundaries_left
    return left is not None and left < _ENDING


def _since(seed: SeedState) -> str:
    return f"{seed.stage.name} for {seed.boundaries_in_stage} boundaries"


def _advance(seed: SeedState, to_stage: Stage, reason: str, explanation: str) -> Proposal:
    return Proposal(
        seed=seed.index, action=Action.ADVANCE, to_stage=to_stage, reason=reason, explanation=f"{explanation}."
    )


def _out(situation: Situation, seed: SeedState, reason: str, why: str) -> Proposal:
    """Take a seed out: cancelled while it has not touched the host, culled and embargoed afterwards."""
    touched = seed.stage not in {Stage.GERMINATED, Stage.LOADING, Stage.TRAINING}
    explanation = f"{_since(seed)}: {why}."
    if not touched:
        return Proposal(seed=seed.index, action=Action.CANCEL, reason=reason, explanation=explanation)
    return Proposal(
        seed=seed.index,
        action=Action.CULL,
        reason=reason,
        explanation=explanation,
        embargo_boundaries=situation.rules.embargo_boundaries,
    )


def _born_zero(situation: Situation, seed: SeedState) -> bool:
    kernel = situation.shelf.kernels.get(seed.kernel_id)
    life = situation.memory.life(seed.index)
    return kernel.zero_birth if kernel is not None else life is None or life.zero_birth


def _arriving(situation: Situation, seed: SeedState) -> Proposal | str:
    zero = _born_zero(situation, seed)
    if seed.blocked_by == "NOT_FINITE":
        return _out(situation, seed, "NOT_FINITE", "a value is not finite")
    if _ends(situation):
        return _out(situation, seed, "SCHEDULE_END", "the schedule is over before it could be judged")
    if seed.ready:
        if zero:
            why = "ready; born at zero output, so it needs no isolation and no ramp"
            return _advance(seed, Stage.FINE_TUNING, "READY", f"{_since(seed)}: {why}")
        to_stage = Stage.GRAFTING if seed.stage is Stage.TRAINING else Stage.TRAINING
        gain = "" if seed.isolation_gain is None else f", isolation gain {seed.isolation_gain:.3g}"
        return _advance(seed, to_stage, "READY", f"{_since(seed)}: ready{gain}")
    training = seed.stage is Stage.TRAINING
    limit = situation.rules.training_patience if training else situation.rules.loading_patience
    if seed.boundaries_in_stage >= limit:
        reason = "NOT_LEARNING" if training else "KERNEL_LATE"
        return _out(situation, seed, reason, f"not ready within {limit} boundaries ({seed.blocked_by or 'no reason'})")
    return f"waits in {seed.stage.name} ({seed.blocked_by}), {seed.boundaries_in_stage} of {limit} boundaries"


def _grafted(situation: Situation, seed: SeedState) -> Proposal | str:
    limit = situation.rules.graft_patience
    if seed.blocked_by == "NOT_FINITE":
        return _out(situation, seed, "NOT_FINITE", "it harms its host")
    if _ends(situation):
        return _out(situation, seed, "SCHEDULE_END", "the schedule is over before it could be judged")
    if seed.ready:
        return _advance(seed, Stage.FINE_TUNING, "STABLE", f"{_since(seed)}, alpha {seed.alpha:.2f}: gate open")
    if seed.boundaries_in_stage >= limit:
        return _out(situation, seed, "NOT_STABLE", f"its gate stayed closed for {limit} boundaries ({seed.blocked_by})")
    return f"waits in {seed.stage.name} ({seed.blocked_by}), {seed.boundaries_in_stage} of {limit} boundaries"


def _on_probation(situation: Situation, seed: SeedState) -> Proposal | str:  # noqa: PLR0911  # one return per verdict
    rules, served, ends = situation.rules, seed.boundaries_in_stage, _ends(situation)
    price, measured = price_of(situation, seed), seed.counterfactual
    overtime = served - situation.probation
    if seed.blocked_by == "NOT_FINITE":
        return _out(situation, seed, "NOT_FINITE", "a value is not finite")
    if not probation_served(situation, seed):
        if ends:
            return _out(situation, seed, "SCHEDULE_END", f"{served} of {situation.probation} boundaries of probation")
        return f"is on probation, {served} of {situation.probation} boundaries"
    if measured is None:
        if ends or overtime >= rules.measure_patience:
            return _out(
                situation, seed, "NOT_MEASURED", "its gain was not measured, and what is not measured is not kept"
            )
        return f"has served its probation and waits to be measured, {price}"
    found = (
        f"gain {measured.mean_gain:.3g} (lower bound {measured.lower_bound:.3g}, {measured.batches} batches), {price}"
    )
    if measured.lower_bound > price.loss:
        if seed.ready:
            return _advance(seed, Stage.FOSSILIZED, "PROBATION_PASSED", f"{_since(seed)}: {found}")
        if ends or overtime > rules.probation_extensions:
            return _out(situation, seed, "GATE_CLOSED", f"{found}; gate closed ({seed.blocked_by})")
        return f"would be kept: {found}; its gate is closed ({seed.blocked_by})"
    if measured.mean_gain > price.loss and overtime < rules.probation_extensions and not ends:
        return f"is given {rules.probation_extensions - overtime} more boundaries: {found}"
    return _out(situation, seed, "NO_GAIN", found)


def _embargoed(situation: Situation, seed: SeedState) -> Proposal | str:
    mark = situation.marks.get(seed.index)
    until = 0 if mark is None else mark.closed_until
    if until > situation.state.boundary:
        return f"is under embargo until boundary {until}"
    if not seed.ready:
        return f"stays closed by the runtime ({seed.blocked_by})"
    return Proposal(
        seed=seed.index,
        action=Action.RELEASE,
        reason="EMBARGO_OVER",
        explanation=f"embargo ended at boundary {until}.",
    )


def _locked(situation: Situation, seed: SeedState) -> Proposal | str:
    life = situation.memory.life(seed.index)
    until = (0 if life is None else life.out_since) + situation.rules.lock_boundaries
    if until > situation.state.boundary:
        return f"is locked after a rollback until boundary {until}"
    if not seed.ready:
        return f"stays locked by the runtime ({seed.blocked_by})"
    return Proposal(
        seed=seed.index,
        action=Action.UNLOCK,
        reason="LOCK_EXPIRED",
        explanation=f"locked for {situation.rules.lock_boundaries} boundaries after its rollback.",
    )


_RULES: dict[Stage, Callable[[Situation, SeedState], Proposal | str]] = {
    Stage.GERMINATED: _arriving,
    Stage.LOADING: _arriving,
    Stage.TRAINING: _arriving,
    Stage.GRAFTING: _grafted,
    Stage.STABILIZING: _grafted,
    Stage.EVALUATING: _grafted,
    Stage.FINE_TUNING: _on_probation,
    Stage.EMBARGOED: _embargoed,
    Stage.ROLLED_BACK: _locked,
}
