"""The safety shield: of whatever a policy proposes only lawful commands pass; each refusal has its reason.

The shield is deterministic and knows no policy. It asks of every command what the runtime's gates would ask and what
they cannot know: budget over the whole run, embargoes and cooldowns, the schedule, who may be chosen at all. A
command that fails is dropped and named in the advice; the run goes on without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina.control import Action, BlendStrategy, Stage, living
from esper.kasmina.seeds import FORWARD, LIVING
from esper.tamiyo.pricing import price_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from esper.kasmina.control import RunHello, SeedState, SiteDescriptor
    from esper.tamiyo.domain import KernelFacts, Proposal, Shelf, Situation

__all__ = ["MAX_DECISIONS", "Refusal", "Ruling", "fits", "germination_closed", "growable", "probation_served", "review"]

MAX_DECISIONS = 256
"""Of one advice, by contract."""

_CULLABLE = LIVING - {Stage.GERMINATED}
_CANCELLABLE = frozenset({Stage.GERMINATED, Stage.LOADING, Stage.TRAINING})


@dataclass(frozen=True, slots=True)
class Refusal:
    """A proposal that did not pass."""

    proposal: Proposal
    reason: str
    """One clause with the numbers."""

    def __str__(self) -> str:
        return f"shield refused {self.proposal.action.value} of seed {self.proposal.seed}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Ruling:
    """What passed and what did not, in the order of the proposals."""

    admitted: tuple[Proposal, ...]
    refused: tuple[Refusal, ...]


def review(situation: Situation, proposals: Iterable[Proposal]) -> Ruling:
    """Let lawful proposals pass: at most one for a seed, at most one germination, at most `MAX_DECISIONS`."""
    admitted: list[Proposal] = []
    refused: list[Refusal] = []
    taken: set[int] = set()
    for proposal in proposals:
        reason = _reason_against(situation, proposal, taken, admitted)
        if reason:
            refused.append(Refusal(proposal, reason))
        else:
            admitted.append(proposal)
            taken.add(proposal.seed)
    return Ruling(tuple(admitted), tuple(refused))


def _reason_against(situation: Situation, proposal: Proposal, taken: set[int], admitted: Sequence[Proposal]) -> str:
    if proposal.seed not in situation.sites:
        return f"no site {proposal.seed} among the {len(situation.sites)} of this run"
    if proposal.seed in taken:
        return "another command for this seed was let pass already"
    if len(admitted) >= MAX_DECISIONS:
        return f"an advice holds at most {MAX_DECISIONS} commands"
    return _RULES[proposal.action](situation, proposal, admitted)


# Germination


def germination_closed(situation: Situation) -> str:  # noqa: PLR0911  # one return per reason
    """Why nothing may germinate anywhere at this boundary, whatever the kernel; empty when something may."""
    state, rules, memory = situation.state, situation.rules, situation.memory
    alive = living(state.seeds)
    left = situation.boundaries_left
    needed = rules.loading_boundaries + situation.probation + rules.benefit_boundaries
    cooldown = memory.last_rollback + rules.rollback_cooldown - state.boundary
    unwell = [
        name
        for name in ("train_loss", "validation_loss", "gradient_norm")
        if (value := getattr(state, name)) is not None and not math.isfinite(value)
    ]
    if unwell:
        return f"the host is not well at boundary {state.boundary}: {', '.join(unwell)} not finite"
    if alive >= situation.hello.max_active_seeds:
        return f"{alive} of at most {situation.hello.max_active_seeds} seeds are alive"
    if situation.parameters_left <= 0:
        return f"the budget of {situation.hello.parameter_budget} parameters is used up"
    if situation.in_last_decay:
        return (
            f"step {state.step} is in the last decay, which began at {situation.hello.decay_start:.0%} of the schedule"
        )
    if left is not None and left < needed:
        return (
            f"{left:.1f} boundaries are left, and growth needs {needed}: {rules.loading_boundaries} to load, "
            f"{situation.probation} of probation, {rules.benefit_boundaries} to benefit"
        )
    if memory.last_rollback and cooldown > 0:
        return f"cooldown for {cooldown} more boundaries after the rollback at boundary {memory.last_rollback}"
    return ""


def fits(hello: RunHello, site: SiteDescriptor, kernel: KernelFacts, parameters_left: int) -> str:
    """Why a validated kernel may not grow at a site of a run; empty when it may."""
    if kernel.signature != site.signature:
        return f"kernel for {kernel.signature}, site {site.signature}"
    if not kernel.portable and kernel.target != hello.target:
        return f"kernel compiled for {kernel.target}, run on {hello.target}"
    if site.causal and not kernel.causal:
        return f"site is causal, blueprint {kernel.blueprint_name} is not"
    if hello.blueprints and kernel.blueprint_name not in hello.blueprints:
        return f"blueprint {kernel.blueprint_name} is not among those allowed for this run"
    if kernel.parameters > parameters_left:
        return f"{kernel.parameters} parameters, {parameters_left} of the budget left"
    return ""


def growable(hello: RunHello, shelf: Shelf) -> list[str]:
    """Ids of the kernels that could grow somewhere in a run that has grown nothing yet."""
    budget = hello.parameter_budget
    return sorted(
        {
            kernel.kernel_id
            for site in hello.sites
            for kernel in shelf.of(site.signature)
            if not fits(hello, site, kernel, budget)
        }
    )


def _germinate(  # noqa: PLR0911  # one return per reason
    situation: Situation, proposal: Proposal, admitted: Sequence[Proposal]
) -> str:
    seed = situation.seeds.get(proposal.seed)
    mark = situation.marks.get(proposal.seed)
    choice = proposal.kernel
    kernel = None if choice is None else situation.shelf.kernels.get(choice.kernel_id)
    if any(other.action is Action.GERMINATE for other in admitted):
        return "one germination was let pass already at this boundary"
    if closed := germination_closed(situation):
        return closed
    if seed is not None:
        return f"the seed is {seed.stage.name}, not DORMANT"
    if mark is not None and mark.closed_until > situation.state.boundary:
        return f"the site is under embargo until boundary {mark.closed_until}"
    if choice is None:
        return "it names no kernel"
    if kernel is None:
        return f"kernel {choice.kernel_id[:19]} is not among the validated ones"
    if reason := fits(situation.hello, situation.sites[proposal.seed], kernel, situation.parameters_left):
        return reason
    if choice.blend is BlendStrategy.IMMEDIATE and not kernel.zero_birth:
        return "a kernel born at random cannot be blended in at once"
    if not 0 < choice.learning_rate_scale <= 100:
        return f"learning rate scale {choice.learning_rate_scale:g} is not within (0, 100]"
    return ""


# What lives


def probation_served(situation: Situation, seed: SeedState) -> bool:
    """Whether a seed has trained on the task loss for its probation."""
    return seed.stage is Stage.FINE_TUNING and seed.boundaries_in_stage >= situation.probation


def _advance(situation: Situation, proposal: Proposal, _admitted: Sequence[Proposal]) -> str:
    seed, target = situation.seeds.get(proposal.seed), proposal.to_stage
    if seed is None or seed.stage not in LIVING:
        return f"expected a living seed, found it {'DORMANT' if seed is None else seed.stage.name}"
    if target not in FORWARD or FORWARD.index(target) <= FORWARD.index(seed.stage):
        return f"{'no stage' if target is None else target.name} does not lie ahead of {seed.stage.name}"
    if not seed.ready:
        return f"it is not ready ({seed.blocked_by or 'no reason given'})"
    if target is Stage.FOSSILIZED:
        return _keep(situation, seed)
    return ""


def _keep(situation: Situation, seed: SeedState) -> str:
    if not probation_served(situation, seed):
        return (
            f"probation is not served: {seed.boundaries_in_stage} boundaries of {situation.probation} in "
            f"FINE_TUNING, found {seed.stage.name}"
        )
    measured = seed.counterfactual
    if measured is None:
        return "its gain was not measured"
    price = price_of(situation, seed)
    if not measured.lower_bound > price.loss:
        return f"lower bound of its gain {measured.lower_bound:.3g} does not exceed its {price}"
    return ""


def _cull(situation: Situation, proposal: Proposal, _admitted: Sequence[Proposal]) -> str:
    return _in_stage(situation, proposal, _CULLABLE) or (
        "" if proposal.embargo_boundaries >= 1 else "a cull must close its site for at least one boundary"
    )


def _cancel(situation: Situation, proposal: Proposal, _admitted: Sequence[Proposal]) -> str:
    return _in_stage(situation, proposal, _CANCELLABLE)


def _release(situation: Situation, proposal: Proposal, _admitted: Sequence[Proposal]) -> str:
    if wrong := _in_stage(situation, proposal, frozenset({Stage.EMBARGOED})):
        return wrong
    mark = situation.marks.get(proposal.seed)
    until = 0 if mark is None else mark.closed_until
    return f"its embargo lasts until boundary {until}" if until > situation.state.boundary else ""


def _unlock(situation: Situation, proposal: Proposal, _admitted: Sequence[Proposal]) -> str:
    if wrong := _in_stage(situation, proposal, frozenset({Stage.ROLLED_BACK})):
        return wrong
    life = situation.memory.life(proposal.seed)
    until = (0 if life is None else life.out_since) + situation.rules.lock_boundaries
    return f"its lock lasts until boundary {until}" if until > situation.state.boundary else ""


def _in_stage(situation: Situation, proposal: Proposal, stages: frozenset[Stage]) -> str:
    seed = situation.seeds.get(proposal.seed)
    if seed is not None and seed.stage in stages:
        return ""
    wanted = ", ".join(stage.name for stage in sorted(stages))
    return f"expected its stage to be one of {wanted}, found {'DORMANT' if seed is None else seed.stage.name}"


_RULES: dict[Action, Callable[[Situation, Proposal, Sequence[Proposal]], str]] = {
    Action.GERMINATE: _germinate,
    Action.ADVANCE: _advance,
    Action.CULL: _cull,
    Action.CANCEL: _cancel,
    Action.RELEASE: _release,
    Action.UNLOCK: _unlock,
}
