"""From a state to an advice: remember, let the policy propose, let the shield pass what is lawful, remember again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.kasmina.control import Advice, Decision
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger
from esper.tamiyo.domain import Situation
from esper.tamiyo.memory import Memory, dump, load, observe
from esper.tamiyo.overlap import Overlaps
from esper.tamiyo.shield import review

if TYPE_CHECKING:
    from esper.kasmina.control import BoundaryState, RunHello
    from esper.tamiyo.domain import Policy, Proposal, Shelf
    from esper.tamiyo.rules import Rules

__all__ = ["Conversation"]

_log = get_logger("esper.tamiyo")
_MAX_SENTENCE = 512


class Conversation:
    """One run, from its hello on. Equal hello, states and shelves give equal advice.

    Args:
        hello: first words of the run.
        policy: who proposes.
        rules: numbers of policy and shield.

    Raises:
        InvalidInput: CONTROLLER_STATE, or two sites of one index.
    """

    def __init__(self, hello: RunHello, policy: Policy, rules: Rules) -> None:
        if len({site.index for site in hello.sites}) != len(hello.sites):
            raise InvalidInput("hello: expected sites of different indices", reason="SITE_TWICE")
        self.hello = hello
        self._policy = policy
        self._rules = rules
        self._memory = _remembered(hello)
        self._overlaps = Overlaps(hello.sites)
        self._last = 0

    def advise(self, state: BoundaryState, shelf: Shelf) -> Advice:
        """The answer to the next boundary.

        Raises:
            InvalidInput: BOUNDARY_ORDER: not after the boundary before; RUN_MISMATCH: of another run.
        """
        if state.run_id != self.hello.run_id:
            raise InvalidInput(
                f"state: expected run {self.hello.run_id}, found {state.run_id!r:.80}", reason="RUN_MISMATCH"
            )
        if state.boundary <= self._last:
            raise InvalidInput(
                f"state: expected a boundary after {self._last}, found {state.boundary}", reason="BOUNDARY_ORDER"
            )
        self._last = state.boundary
        rules = self._rules
        memory = observe(self._memory, state, embargo=rules.embargo_boundaries, rest=rules.kernel_rest_boundaries)
        situation = Situation(
            hello=self.hello, state=state, memory=memory, shelf=shelf, rules=self._rules, overlaps=self._overlaps
        )
        judgement = self._policy.decide(situation)
        ruling = review(situation, judgement.proposals)
        self._memory = memory.noted(state.boundary, ruling.admitted, shelf.kernels, state.flops_per_sample)
        explanation = " ".join([*(f"{refusal}." for refusal in ruling.refused), judgement.explanation])
        return Advice(
            boundary=state.boundary,
            decisions=tuple(_decision(state.boundary, n, proposal) for n, proposal in enumerate(ruling.admitted)),
            explanation=cut(explanation),
            controller_state=dump(self._memory),
            prefetch=judgement.prefetch,
        )


def cut(sentence: str) -> str:
    """At most 512 characters."""
    return sentence if len(sentence) <= _MAX_SENTENCE else sentence[: _MAX_SENTENCE - 1] + "…"


def _decision(boundary: int, number: int, proposal: Proposal) -> Decision:
    return Decision(
        decision_id=f"{boundary}.{proposal.seed}.{number}",
        boundary=boundary,
        seed=proposal.seed,
        action=proposal.action,
        reason=proposal.reason,
        explanation=cut(proposal.explanation),
        to_stage=proposal.to_stage,
        kernel=proposal.kernel,
        embargo_boundaries=proposal.embargo_boundaries,
    )


def _remembered(hello: RunHello) -> Memory:
    try:
        return load(hello.controller_state)
    except InvalidInput as error:
        if error.reason != "CONTROLLER_STATE_VERSION":
            raise
        # A newer controller must be able to go on with an older run: it loses embargoes and history, not the run.
        _log.warning("controller_state_set_aside", run_id=hello.run_id, detail=error.public)
        return Memory()
