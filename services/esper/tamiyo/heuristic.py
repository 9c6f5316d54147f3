"""The documented policy: when, where, which, and what stays. Pure; every rule and number is told in docs/tamiyo.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.kasmina.control import Action
from esper.tamiyo.choice import blended, choose
from esper.tamiyo.domain import Judgement, Proposal
from esper.tamiyo.lifecycle import plan
from esper.tamiyo.placement import candidates
from esper.tamiyo.shield import germination_closed
from esper.tamiyo.signals import trend_of

if TYPE_CHECKING:
    from esper.tamiyo.choice import Choice
    from esper.tamiyo.domain import Situation
    from esper.tamiyo.placement import Candidate

__all__ = ["HeuristicPolicy"]

_LOOKED_AT = 64  # sites asked for a kernel at one boundary: the best ones; keeps the decision within its 10 ms


class HeuristicPolicy:
    """Narrowest first, early, priced; implements `esper.tamiyo.domain.Policy`."""

    name = "heuristic"
    version = "2"

    def decide(self, situation: Situation) -> Judgement:
        """What should be done at this boundary."""
        living = plan(situation)
        options, closed = _options(situation)
        prefetch = tuple(dict.fromkeys(choice.kernel.kernel_id for _, choice in options[: situation.rules.prefetch]))
        said = _germinate(situation, options, closed)
        if isinstance(said, Proposal):
            proposals, word = (*living.proposals, said), _weighed(situation, *options[0])
        else:
            proposals, word = tuple(living.proposals), f"nothing germinates: {said}"
        explanation = "; ".join([word, *living.notes]) + "."
        return Judgement(proposals=proposals, explanation=explanation, prefetch=prefetch)


def _weighed(situation: Situation, candidate: Candidate, choice: Choice) -> str:
    """All that speaks for a germination. Its decision has what settled it, and no room for the rest."""
    left = situation.boundaries_left
    remaining = "unknown schedule" if left is None else f"{left:.1f} boundaries left"
    trend = trend_of(situation.memory.losses, situation.rules)
    return f"germination proposed at {candidate}; {trend}; {choice}; {remaining}"


def _options(situation: Situation) -> tuple[list[tuple[Candidate, Choice]], str]:
    """The best sites that have a kernel, and what keeps the others closed."""
    found, closed = candidates(situation)
    options: list[tuple[Candidate, Choice]] = []
    wanted = max(1, situation.rules.prefetch)
    for candidate in found[:_LOOKED_AT]:
        choice = choose(situation, candidate.site)
        if choice is not None:
            options.append((candidate, choice))
            if len(options) == wanted:
                break
    reasons = ", ".join(f"{count} {reason}" for reason, count in closed.items()) or "none closed"
    return options, f"{len(found)} of {len(situation.sites)} sites open ({reasons})"


def _germinate(situation: Situation, options: list[tuple[Candidate, Choice]], closed: str) -> Proposal | str:
    """The one germination of this boundary, or why there is none."""
    rules, boundary = situation.rules, situation.state.boundary
    if boundary < rules.warmup_boundaries:
        return f"boundary {boundary} of {rules.warmup_boundaries} of warm-up"
    if reason := germination_closed(situation):
        return reason
    since = boundary - situation.memory.last_germination
    if situation.memory.last_germination and since < rules.min_spacing_boundaries:
        return f"{since} of {rules.min_spacing_boundaries} boundaries since the last germination"
    if not options:
        return f"no validated kernel fits an open site; {closed}, {len(situation.shelf.kernels)} kernels in the library"
    candidate, choice = options[0]
    trend = trend_of(situation.memory.losses, rules)
    saturation, threshold = candidate.mark.saturation, rules.saturation_threshold
    if saturation is not None and saturation >= threshold:
        reason, settled = "SATURATED", f"saturation {saturation:.2f} of at least {threshold:.2f}, used up"
    elif trend.plateau:
        reason, settled = "PLATEAU", f"{trend}"
    else:
        return f"{trend}, and {candidate} is below {threshold:.2f}"
    return Proposal(
        seed=candidate.site.index,
        action=Action.GERMINATE,
        reason=reason,
        explanation=f"{candidate.narrowest}: {settled}.",
        kernel=blended(situation, choice.kernel),
    )
