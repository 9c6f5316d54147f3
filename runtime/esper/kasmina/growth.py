"""`Growth`: the session that a training loop holds; it fits any loop and never makes it wait.

Typical use::

    growth = esper.kasmina.wrap(model, optimizer, mesh="localhost:7600")   # model stays usable exactly as before
    for epoch in range(epochs):
        for batch in loader:
            ...; loss.backward(); optimizer.step(); optimizer.zero_grad()
            growth.step(loss)                                              # after each optimizer step
        growth.boundary(validate)                                          # after each epoch
    growth.close()

``validate`` is a callable without arguments that runs the held-out data, in the same order each time, and returns
``{"loss": [one per batch], "accuracy": ...}``; growth calls it again with a seed switched off to measure what the
seed is worth. With a mapping of finished numbers instead nothing can be measured, and seeds stay in FINE_TUNING:
missing is missing.

Until the first forward one observing hook stands on the model, afterwards, with dormant seeds, none, except on
sampled steps.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from esper.kasmina import _checkpoint, _report, _summary, _swap
from esper.kasmina._compile import inner_module
from esper.kasmina._decide import Applied, Decider
from esper.kasmina._faults import FaultDesk
from esper.kasmina._lifecycle import Lifecycle
from esper.kasmina._losses import LossReader, scalar
from esper.kasmina._measure import Measurer, Validation
from esper.kasmina._observation import Observation
from esper.kasmina._plane import GuardedPlane
from esper.kasmina._report import BoundaryReport
from esper.kasmina._shared import Shared
from esper.kasmina._steps import StepWatch
from esper.kasmina._structure import Change, ChangeKind
from esper.kasmina.config import Config
from esper.kasmina.control import Advice, ControlPlane, Decision, Outcome, Stage
from esper.kasmina.distributed import RankLost, join, unwrapped
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from esper.kasmina._seed import KernelLike, SeedRun
    from esper.kasmina.control import RunHello, SiteDescriptor
    from esper.kasmina.sites import Refusal, Site

__all__ = ["Applied", "BoundaryReport", "Change", "ChangeKind", "Config", "Growth"]

_log = get_logger("esper.kasmina.growth")


class Growth:
    """See the module. Made by `esper.kasmina.wrap`; one per model and optimizer.

    Args:
        model: the host, changed only while a seed lives in it.
        optimizer: the host's.
        plane: the control plane; None leaves every seed dormant unless `boundary` is given decisions.
        select: keeps a site when true; None keeps all that `config` allows.
        validate: as for `boundary`, for loops that hand finished numbers to it.
        config: options.
        group: processes that train this model together; None finds out, see `Config.distributed`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        plane: ControlPlane | None,
        select: Callable[[SiteDescriptor], bool] | None = None,
        validate: Callable[[], object] | None = None,
        config: Config | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.config = Config() if config is None else config
        model, found = unwrapped(inner_module(model))
        model = inner_module(model)
        self.ranks = join(group or found, wanted=self.config.distributed, timeout_s=self.config.rank_timeout_s)
        self.run_id = self.ranks.first(lambda: self.config.run_id or _report.new_run_id())
        self.model = model
        self.optimizer = optimizer
        self.steps = 0
        """Optimizer steps done."""
        self.boundaries = 0
        self.controller_state = b""
        self.counters: Counter[str] = Counter()
        """Refused decisions, failures of the control plane, rollbacks, shed samples, by name."""
        self.last_report: BoundaryReport | None = None
        self.plane = GuardedPlane(plane, self.counters, speaks=self.ranks.leads)
        self.life = Lifecycle(model, optimizer, self.config, on_transition=self._transitioned, on_end=self._ended)
        self.life.shared = not self.ranks.alone
        self.measurer = Measurer(model, self.config.confidence, validate, self.ranks)
        self.losses = LossReader()
        self._stepped = StepWatch(optimizer)
        self.observation = Observation(
            self.life, self.config, select, lambda: self.plane.open(_report.hello(self)), self.ranks
        )
        self.records: list[dict[str, Any]] = []
        self.elapsed_s = 0.0
        self._began = time.monotonic()
        self.faults = FaultDesk(self.life, self.counters, self.plane.event, shared=not self.ranks.alone)
        self.shared = Shared(self.ranks, self.life, self.losses, self.faults)
        self._decider = Decider(self.life, self.plane, record=self._record, measure=self._measure_one, ranks=self.ranks)
        self._said: set[str] = set()
        self._closed = False

    # ---- where it can grow -------------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the model can grow; empty until its first forward was seen."""
        return self.life.sites

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What can not grow, each with its reason."""
        return self.observation.refusals

    # ---- the three calls of a loop -----------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None) -> None:
        """After each optimizer step.

        A call after which none was done, since a gradient scaler skipped it or gradients are still being accumulated,
        counts as no step.

        Args:
            loss: training loss of this step, any shape, as the loop has it; it is detached and not waited for.
        """
        try:
            self._after_step(loss)
        except RankLost:
            raise
        except Exception:  # noqa: BLE001  # as in _guard; written out because it runs on every step
            self.counters["failed_step"] += 1
            _log.exception("growth failed", where="step")

    def _after_step(self, loss: Tensor | float | None) -> None:
        done = self._stepped.take()
        self.steps += done
        if self.observation.pending:
            self._guard("discovery", self.observation.settle)
        if loss is not None:
            loss = scalar(loss)
        skipped = not done if self._stepped.doubt is None else self._stepped.doubt
        if not self.ranks.alone:
            loss = self.shared.step(loss, skipped)
        elif loss is not None:
            self.losses.push(loss, skipped)
        finite = self._judge_losses()
        if finite is None:
            return
        if not done:
            self.life.forget_captures()
            return
        self.life.layout.tick()
        gradient = self.life.gradient.take()
        if self.life.runs:
            self.faults.judge(finite=finite)
            self.life.step(loss, gradient, self._stepped.doubt)
            self.shared.renew()
        if self.observation.collect(gradient):
            job = _report.health_job(self)
            if job is not None:
                self.observation.worker.submit(job)
        self.observation.arm(self.steps)

    def _judge_losses(self, *, wait: bool = False) -> bool | None:
        """Look at the losses that have arrived: whether all are finite; None where one rolled grafts back."""
        finite = True
        for loss in self.losses.read(wait=wait):
            finite = finite and (loss.skipped or math.isfinite(loss.value))
            why = self.life.watch.detector.update(loss.value, skipped=loss.skipped)
            if why:
                self._roll_back(why)
                return None
        return finite

    def _roll_back(self, why: str) -> None:
        blamed, restored = self.life.roll_back(why)
        self.shared.renew()
        self.measurer.forget()
        self.counters["rollbacks"] += 1
        _log.warning("graft rolled back", seeds=[run.index for run in blamed], host_restored=restored, why=why)
        self.plane.event("rollback", {"seeds": [r.index for r in blamed], "host_restored": restored, "why": why})

    def boundary(self, metrics: object, *, decisions: Sequence[Decision] | None = None) -> BoundaryReport:
        """After each validation: tell the controller how things stand, carry out what it decides.

        Args:
            metrics: a mapping (loss, accuracy, epoch; all optional), or a callable without arguments that validates
                and returns such a mapping with a loss per batch, or the losses alone.
            decisions: instead of the controller's; for replays and for growing by hand.

        Raises:
            InvalidInput: `metrics` is neither.
            Conflict: other processes train the same model since `wrap`.
            RankLost: another rank did not come to the boundary.
            Exception: whatever the user's own validation raises.
        """
        self.ranks.check()
        self.boundaries += 1
        self._guard("boundary", self._begin_boundary)
        validation = self._validate(metrics)
        found: list[BoundaryReport] = []
        self._guard("boundary", lambda: found.append(self._consult(validation, decisions)))
        self._guard("boundary", self._end_boundary)
        self.last_report = (
            found[0] if found else BoundaryReport(self.boundaries, validation.loss, validation.accuracy, None, ())
        )
        return self.last_report

    def _begin_boundary(self) -> None:
        self._guard("share", self.shared.finish)
        self.life.tick_boundary()
        self.faults.boundary()
        # Before anything is measured: a late loss may take a seed out, and the validation is of the network without it.
        self._guard("collect", self.finish_losses)

    def _end_boundary(self) -> None:
        self.shared.renew()
        self.measurer.forget()
        self._guard("kernels", partial(_swap.settle_kernels, self))
        self.faults.publish()

    def _consult(self, validation: Validation, decisions: Sequence[Decision] | None) -> BoundaryReport:
        """Tell the controller, and carry out what it decides."""
        self.shared.average_isolated()
        self._measure()
        self._guard("drain", self._drain)
        for run in list(self.life.runs.values()):
            self._decider.poll(run)
        advice: Advice | None = None
        applied: list[Applied | None] = []
        if self.sites:
            state = _report.boundary_state(self, validation)
            wait = self.config.advise_deadline_s
            found = self.ranks.first(lambda: self.plane.advise(state, wait) if decisions is None else tuple(decisions))
            given = found if isinstance(found, tuple) else ()
            if isinstance(found, Advice):
                advice, given, self.controller_state = found, found.decisions, found.controller_state
                self.plane.prefetch(found.prefetch)
            applied.extend(self._apply(decision) for decision in given)
            self.life.release_cancelled({seed.index for seed in state.seeds if seed.stage is Stage.CANCELLED})
        else:
            self._say_once(
                "no site is known: no training forward of the wrapped model was seen; give wrap() example_inputs, or "
                "boundary() a callable where the model is compiled"
                if self._stepped.seen
                else "no optimizer step was seen yet: give wrap() the optimizer whose step() the loop calls"
            )
        return BoundaryReport(
            self.boundaries, validation.loss, validation.accuracy, advice, tuple(a for a in applied if a is not None)
        )

    def _drain(self) -> None:
        self.observation.worker.drain(self.config.drain_timeout_s)

    def _validate(self, metrics: object) -> Validation:
        validation = self.measurer.validate(metrics) if callable(metrics) else self.measurer.share(lambda: metrics)
        if self.measurer.possible:
            self._guard("observation", partial(self.observation.look_at_validation, self.measurer.repeat))
        if not self.measurer.possible and any(s is Stage.FINE_TUNING for s in map(self.life.stage, self.life.runs)):
            self._say_once(
                "seeds stay in FINE_TUNING: their worth can not be measured without a validation to repeat; "
                "give boundary() a callable, or wrap() a validate="
            )
        return validation

    def finish_losses(self) -> None:
        """Wait for the training losses that are still on their way, and judge them."""
        self.shared.finish()
        while self._judge_losses(wait=True) is None:
            pass

    def _measure(self) -> None:
        judged = [
            r for r in self.life.runs.values() if self.life.stage(r.index) in {Stage.EVALUATING, Stage.FINE_TUNING}
        ]
        # What was measured at another boundary is not what the seed is worth now, also where measuring fails.
        for run in judged:
            run.counterfactual = None
        for run in judged:
            self._measure_one(run)

    def _measure_one(self, run: SeedRun) -> None:
        """An error of the user's own validation is not the seed's fault: it is measured again at the next boundary."""
        self._guard("measure", partial(self.measurer.measure, run))

    def _apply(self, decision: object) -> Applied | None:
        applied = self._decider.apply(decision, self.boundaries)
        if applied is None:
            self.counters["decisions_refused"] += 1
            return None
        fields = _report.decision_fields(applied)
        if not applied.done:
            self.counters["decisions_refused"] += 1
            # A gate that is still closed is the daily round; a decision that makes no sense is worth a look.
            odd = any(reason.code == "OTHER" for reason in applied.refused)
            (_log.warning if odd else _log.info)("decision refused", **fields)
        self.plane.event("decision_applied" if applied.done else "decision_refused", fields)
        # The network is another one now: what was measured with it does not hold any more.
        self.measurer.forget()
        return applied

    # ---- what it tells -----------------------------------------------------------------------------------------------

    def _record(self, decision: Decision) -> dict[str, object]:
        record = _report.new_record(self, decision)
        self.records.append(record)
        return record

    def _transitioned(self, run: SeedRun, before: Stage, after: Stage) -> None:
        run.record["stages"].append({"stage": after.name, "boundary": self.boundaries, "step": self.steps})
        self.plane.event("transition", {"seed": run.index, "from": before.name, "to": after.name, "step": self.steps})
        self.faults.entered(run, after)

    def _ended(self, run: SeedRun, outcome: Outcome, reason: str) -> None:
        report = _report.end(self, run, outcome, reason)
        self.plane.report(report)
        self.faults.ended(run)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning(text)

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        """Growth's own defects must not stop training either: they are logged with their traceback and counted."""
        try:
            action()
        except RankLost:
            raise
        except Exception:  # noqa: BLE001  # training goes on without growth; the log has the traceback
            self.counters[f"failed_{what}"] += 1
            _log.exception("growth failed", where=what)

    def summary(self, max_rows: int = 40) -> str:
        """Table of the sites with their shapes, parameters and seeds, and totals; long models are shortened."""
        return _summary.summary(self, max_rows)

    def lineage(self) -> list[dict[str, Any]]:
        """Every adaptation of the run, oldest first, as JSON types: where, what, when, decisions, result."""
        return _report.lineage(self)

    def locks(self) -> dict[int, int]:
        """Boundaries for which each rolled-back seed stays locked; keep it outside the checkpoint."""
        return _report.locks(self)

    def breakers(self) -> dict[str, Any]:
        """Circuits that are not closed, as JSON types; keep it outside the checkpoint, like `locks`."""
        return self.life.breakers.document()

    def on_change(self, listener: Callable[[Change], None]) -> Callable[[], None]:
        """Call `listener` whenever a seed's parameters came, went or entered another stage; the answer ends that."""
        return self.life.structure.listen(lambda change, _run: listener(change))

    def follow(self, copy: nn.Module) -> Callable[[], None]:
        """Have a deep copy of the model (an average, a teacher) get and lose the same seeds; the answer ends that."""
        return self.life.structure.follow(copy, self.life.runs.values())

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that growth must remember, as tensors and JSON types, for ``torch.load(weights_only=True)``.

        Of several ranks any may be asked, and what it gives serves all.
        """
        if self.ranks.alone:
            self._guard("collect", self.finish_losses)
        self._guard("drain", self._drain)
        return _checkpoint.save(self)

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        kernels: Mapping[str, KernelLike] | Callable[[str], KernelLike | None] | None = None,
        locks: Mapping[int, int] | None = None,
        breakers: Mapping[str, Any] | None = None,
    ) -> None:
        """Bring every seed back; call it before the model's and the optimizer's own ``load_state_dict``.

        Args:
            state: of `state_dict`.
            kernels: where the kernels in use are: by id, or a function of the id (``KernelCache.obtain``); what is
                not found there is asked of the control plane, for at most ``config.kernel_timeout_s``.
            locks: of `locks`, where seeds were rolled back after `state` was taken.
            breakers: of `breakers`, where kernels failed after `state` was taken.

        Raises:
            NotFound: a kernel in use could not be had: the run can not go on as it was.
            InvalidInput: `state` belongs to another model.
        """
        self.ranks.together(lambda: _checkpoint.load(self, state, kernels, locks or {}, breakers or {}))
        self.shared.renew()
        self.faults.resumed()
        self.plane.hold_kernels(self.life)

    def close(self, timeout_s: float = 2.0) -> None:
        """End observation and deliver what is buffered; fossilized and living seeds stay in the model as they are."""
        if self._closed:
            return
        self._closed = True
        self._guard("close", self._stepped.close)
        self._guard("close", self.faults.close)
        self._guard("close", self.observation.reset)
        self._guard("close", partial(self.observation.worker.close, timeout_s))
        self._guard("close", partial(self.plane.close, timeout_s))

    def hello(self) -> RunHello:
        """First words of the run to its controller."""
        return _report.hello(self)

    def restart_clock(self, now: float) -> None:
        """Count wall time from here on."""
        self._began = now

    @property
    def seconds(self) -> float:
        """Wall time since the run began, over all its resumptions."""
        return self.elapsed_s + time.monotonic() - self._began
