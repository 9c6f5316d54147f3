"""Applies decisions: each is judged, passes the gates on its way or is refused with reasons, and never raises."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from esper.kasmina import seeds
from esper.kasmina._plane import load_failure
from esper.kasmina._seed import KernelLike, SeedRun
from esper.kasmina.breaker import Scope
from esper.kasmina.control import Action, Decision, Stage
from esper.kasmina.distributed import ALONE, RankLost
from esper.kasmina.seeds import Reason
from esper.mesh.errors import Conflict, EsperError
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina._lifecycle import Lifecycle
    from esper.kasmina._plane import GuardedPlane
    from esper.kasmina.distributed import Ranks

__all__ = ["Applied", "Decider"]

_log = get_logger("esper.kasmina.growth")


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a decision."""

    decision: Decision
    stage: Stage
    """Where the seed stands afterwards."""
    refused: tuple[Reason, ...]
    """Why it was not carried out, or not to its end; empty where it was."""

    @property
    def done(self) -> bool:
        """True where it was carried out in full."""
        return not self.refused


class Decider:
    """Carries decisions out on a lifecycle.

    Args:
        life: the seeds.
        plane: where kernels come from.
        record: makes the lineage entry of a new life.
        measure: measures the counterfactual of one seed, where held-out data can be evaluated.
        ranks: who must carry out the same: a gate opens where it opens on every rank, and what fails on one rank is
            undone on all.
    """

    def __init__(
        self,
        life: Lifecycle,
        plane: GuardedPlane,
        *,
        record: Callable[[Decision], dict[str, object]],
        measure: Callable[[SeedRun], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self._life = life
        self._ranks = ranks
        self._plane = plane
        self._record = record
        self._measure = measure

    def apply(self, decision: object, boundary: int) -> Applied | None:
        """Carry out one decision; None where it is not even a decision."""
        if not isinstance(decision, Decision):
            _log.warning("decision refused", found=type(decision).__name__)
            return None
        reasons = self._malformed(decision, boundary)
        if not reasons:
            try:
                reasons = self._act(decision)
            except Conflict as error:
                reasons = [Reason("OTHER", error.public)]
                # A way that the table does not have was refused before anything moved.
                if error.reason != "UNLAWFUL_TRANSITION":
                    self._give_up(decision.seed, error.public)
            except RankLost:
                raise
            except Exception as error:  # noqa: BLE001  # a wrong decision, or a kernel that fails here, must not stop training
                reasons = [Reason("OTHER", load_failure(error))]
                self._give_up(decision.seed, reasons[0].text)
        stage = self._life.stage(decision.seed) if self._knows(decision.seed) else Stage.DORMANT
        return Applied(decision, stage, tuple(reasons))

    def _malformed(self, decision: Decision, boundary: int) -> list[Reason]:
        count = len(self._life.sites)
        text = ""
        if not _is_lawful_word(decision.action, decision.to_stage):
            text = (
                f"decision {decision.decision_id}: expected an action, found {decision.action!r} {decision.to_stage!r}"
            )
        elif decision.boundary != boundary:
            text = f"decision {decision.decision_id}: expected boundary {boundary}, found {decision.boundary}"
        elif not self._knows(decision.seed):
            text = f"decision {decision.decision_id}: expected a seed from 0 to {count - 1}, found {decision.seed}"
        return [Reason("OTHER", text)] if text else []

    def _knows(self, seed: object) -> bool:
        return isinstance(seed, int) and 0 <= seed < len(self._life.sites)

    def _give_up(self, seed: int, why: str) -> None:
        """Something broke in the middle of a seed's transition: take the seed out, leave the host as it was."""
        run = self._life.runs.get(seed)
        if run is None:
            return
        run.failure = why
        stage = self._life.stage(seed)
        if seeds.lawful(stage, Stage.CANCELLED):
            self._life.cancel(run, why)
        elif seeds.lawful(stage, Stage.CULLED):
            self._life.cull(run, why, self._life.config.embargo_boundaries)

    def _act(self, decision: Decision) -> list[Reason]:
        life, seed = self._life, decision.seed
        action = decision.action
        if action is Action.GERMINATE:
            return self._germinate(decision)
        run = life.runs.get(seed)
        if run is None:
            return [Reason("OTHER", f"seed {seed}: expected a living seed for {action.value}, found DORMANT")]
        run.record["decisions"].append(_decision_document(decision))
        if action is Action.ADVANCE:
            return self._advance(run, decision.to_stage)
        why = f"{decision.reason}: {decision.explanation}"
        if action is Action.CULL:
            self._ranks.together(lambda: life.cull(run, why, decision.embargo_boundaries))
            return []
        if action is Action.CANCEL:
            self._ranks.together(lambda: life.cancel(run, why))
            return []
        return self._reopen(run, action, decision)

    def _reopen(self, run: SeedRun, action: Action, decision: Decision) -> list[Reason]:
        layout, seed = self._life.layout, run.index
        wanted = Stage.EMBARGOED if action is Action.RELEASE else Stage.ROLLED_BACK
        stage = layout.stage_of(seed)
        if stage is not wanted:
            return [Reason("OTHER", f"seed {seed}: expected {wanted.name} for {action.value}, found {stage.name}")]
        passed, closed = layout.boundaries_of(seed), int(layout.closed_boundaries[seed])
        operator = action is Action.UNLOCK and decision.reason.startswith("OPERATOR")
        if passed < closed and not operator:
            return [Reason("TOO_SOON", f"seed {seed}: expected {closed} boundaries closed, found {passed}")]
        if operator:
            self._life.breakers.reset(Scope.SITE, run.site.key)
        return self._agreed(partial(self._life.release if action is Action.RELEASE else self._life.unlock, seed))

    def _germinate(self, decision: Decision) -> list[Reason]:
        life, choice = self._life, decision.kernel
        stage = life.stage(decision.seed)
        if stage is not Stage.DORMANT:
            return [Reason("OTHER", f"seed {decision.seed}: expected DORMANT for germinate, found {stage.name}")]
        if choice is None:
            return [Reason("OTHER", f"decision {decision.decision_id}: expected a kernel to germinate, found none")]
        site = life.sites[decision.seed]
        reasons = self._agreed(lambda: life.sanity(choice, site))
        if reasons:
            return reasons
        run = SeedRun(site, choice, decision.boundary, self._record(decision))
        run.record["decisions"].append(_decision_document(decision))
        life.germinate(run)
        self._plane.request_kernel(choice.kernel_id, site.descriptor.signature)
        if decision.to_stage is not None:
            return self._advance(run, decision.to_stage)
        self.poll(run)
        return self._cancelled(run)

    def poll(self, run: SeedRun) -> None:
        """Look for the kernel of a LOADING seed; a refused or unfit one cancels it."""
        if run.kernel is not None or self._life.stage(run.index) is not Stage.LOADING:
            return
        found: list[KernelLike] = []
        try:
            here = self._ranks.together(lambda: self._look_for_kernel(run, found))
        except RankLost:
            raise
        except EsperError as error:
            run.failure = load_failure(error)
            self._life.cancel(run, run.failure)
            return
        # Where it is not there yet on every rank, none begins.
        if all(here):
            self._life.take_kernel(run, found[0])

    def _look_for_kernel(self, run: SeedRun, found: list[KernelLike]) -> bool:
        """Put the kernel into `found`; False while it is on its way.

        Raises:
            EsperError: it was refused, or does not fit.
        """
        kernel = self._plane.kernel(run.choice.kernel_id)
        if kernel is None:
            return False
        try:
            reasons = self._life.kernel_unfit(run, kernel)  # type: ignore[arg-type]  # the plane's contract; a liar is caught here
        except (AttributeError, TypeError) as error:
            reasons = [Reason("OTHER", f"expected a kernel, found {type(kernel).__name__}: {error}")]
        if reasons:
            raise Conflict("; ".join(map(str, reasons)), reason="UNFIT")
        found.append(kernel)  # type: ignore[arg-type]  # likewise
        return True

    def _agreed(self, ask: Callable[[], list[Reason]]) -> list[Reason]:
        """The reasons of all ranks, each once."""
        return list(dict.fromkeys(reason for reasons in self._ranks.together(ask) for reason in reasons))

    def _cancelled(self, run: SeedRun) -> list[Reason]:
        """Why the kernel could not be had, where that ended the seed."""
        return [Reason("OTHER", run.failure)] if self._life.stage(run.index) is Stage.CANCELLED else []

    def _advance(self, run: SeedRun, target: Stage | None) -> list[Reason]:
        life = self._life
        if target is None:
            return [Reason("OTHER", f"seed {run.index}: expected a stage to advance to, found none")]
        self.poll(run)
        if reasons := self._cancelled(run):
            return reasons
        for stage in seeds.forward_path(life.stage(run.index), target):
            reasons = self._agreed(partial(life.gate, run, stage))
            if reasons:
                return reasons
            self._ranks.together(partial(life.advance, run, stage))
            if stage is Stage.TRAINING:
                self._ranks.spread([p.detach() for p in run.module.state_dict().values()])
            if stage is Stage.EVALUATING:
                self._measure(run)
        return []


def _is_lawful_word(action: object, to_stage: object) -> bool:
    return isinstance(action, Action) and isinstance(to_stage, Stage | None)


def _decision_document(decision: Decision) -> dict[str, object]:
    return {
        "decision_id": decision.decision_id,
        "boundary": decision.boundary,
        "action": str(decision.action),
        "to_stage": None if decision.to_stage is None else decision.to_stage.name,
        "reason": decision.reason,
        "explanation": decision.explanation,
    }
