"""The host with seeds: Kasmina's growth session behind the face that the trainer knows."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.cache import DiskStore, Fetched
from esper.kasmina.control import SiteKind, Stage
from esper.kasmina.growth import Config as KasminaConfig
from esper.kasmina.kernels.load import load_kernel
from esper.kasmina.kernels.signing import TrustStore
from esper.kasmina.newborn import MARK
from esper.kasmina.wrapping import wrap
from esper.mesh.errors import EsperError
from esper.mesh.logging import get_logger
from esper.tolaria.attach import Attached
from esper.tolaria.blackbox import BlackBox
from esper.tolaria.core import SeedProgress
from esper.tolaria.flops import TRAINING_FACTOR, forward_flops
from esper.tolaria.growing import BoundaryOutcome, Network
from esper.tolaria.prepare import Trust, prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from esper.kasmina._seed import KernelLike, SeedRun
    from esper.kasmina.control import ControlPlane
    from esper.kasmina.growth import Applied, BoundaryReport
    from esper.tolaria.config import RunConfig
    from esper.tolaria.task import Evaluation
    from esper.tolaria.worker import Launch

__all__ = ["SeededNetwork"]

_log = get_logger(__name__)
_CACHE_BYTES = 4 << 30
_LOAD_AHEAD_S = 30.0
_POLL_S = 0.05
_SEED_KEY = "esper_seed_"


class SeededNetwork(Network):
    """A host that may grow.

    Args:
        config: the run.
        run_id: as the controller knows it.
        launch: where the mesh is.
        plane: the door to the mesh; None to train without one.
        sample: a training batch's inputs, to learn the sites from.
        total_steps: optimizer steps of the whole run.
        folder: of the run, for what must outlive a process that a kernel takes down; None keeps nothing.
    """

    grows = True

    def __init__(
        self,
        config: RunConfig,
        *,
        run_id: str,
        launch: Launch,
        plane: ControlPlane | None,
        sample: Tensor,
        total_steps: int,
        folder: Path | None = None,
    ) -> None:
        super().__init__(config)
        self._launch = launch
        self._plane = plane
        self._host_cost = forward_flops(self.model, sample)
        self._module_costs: dict[tuple[str, tuple[int, ...]], float] = {}
        self._disk = DiskStore(Path(launch.cache_dir), _CACHE_BYTES) if launch.cache_dir else None
        self._trust = Trust()
        self._isolation_flops = 0.0
        self._batch = len(sample)
        growth = config.growth
        self.growth = wrap(
            self.model,
            self.optimizer,
            mesh=plane,
            sites=growth.sites or None,
            example_inputs=(sample,),
            config=KasminaConfig(
                run_id=run_id,
                task=config.task,
                total_steps=total_steps,
                decay_start=config.schedule.decay_start,
                parameter_budget=growth.parameter_budget,
                max_active_seeds=growth.max_active_seeds,
                blueprints=growth.blueprints,
                kinds=tuple(SiteKind(kind) for kind in growth.kinds),
                granularities=growth.granularities,
                flops_per_sample=self._host_cost,
                advise_deadline_s=config.control.advise_deadline_s,
                probation_boundaries=growth.probation_boundaries,
                price_per_million_parameters=growth.price_per_million_parameters,
                watch_steps=growth.watch_steps,
                hang_timeout_s=config.guard.kernel_hang_s,
                abort_on_hang=folder is not None,
            ),
        )
        self._box = None if folder is None else BlackBox(folder)
        self._circuits: dict[str, Any] = {}
        if self._box is not None:
            self._circuits = self._box.open()
            self.growth.life.breakers.replace(self._circuits)
            self.growth.faults.on_breakers = self._keep
            self.growth.faults.watchdog.stream = self._box.stacks

    def _keep(self, circuits: dict[str, Any], ending: bool) -> None:  # the runtime's hook
        assert self._box is not None
        self._box.keep(circuits, ending=ending)

    # What the trainer asks at every step

    @property
    def parameters(self) -> int:
        """See `Network`."""
        return self.host_parameters + self.growth.life.parameters_added

    def _attached(self) -> list[SeedRun]:
        return [run for run in self.growth.life.runs.values() if run.attachment is not None]

    def forward_flops(self, sample: Tensor) -> float:  # noqa: ARG002  # known already
        """The host alone, measured once, and each blended module by its plain twin: compiled code cannot be counted."""
        blended = [run for run in self._attached() if run.isolation is None]
        return self._host_cost + sum(self._module_cost(run) for run in blended)

    def _module_cost(self, run: SeedRun) -> float:
        key = (run.choice.kernel_id, run.site.y_shape[1:])
        if key not in self._module_costs:
            signature, extent = run.site.descriptor.signature, list(run.site.extent)
            extent.insert(signature.layout.feature_dim - 1, signature.in_features)
            plan = getattr(run.kernel, "plan", None)
            twin = BlueprintModule(plan) if plan is not None else run.module
            self._module_costs[key] = forward_flops(twin, torch.zeros(1, *extent))
        return self._module_costs[key]

    @property
    def structure(self) -> object:
        """See `Network`."""
        return tuple((run.index, run.isolation is None) for run in self._attached())

    @property
    def extra_flops(self) -> float:
        """See `Network`: the private training of seeds in isolation."""
        return self._isolation_flops

    def set_rate(self, rate: float, step: int) -> None:  # noqa: ARG002  # for the static arm
        """The host's groups; each newborn's follows that of its site by itself."""
        for group in self.optimizer.param_groups:
            if MARK not in group:
                group["lr"] = rate

    def after_step(self, loss: Tensor) -> None:
        """See `Network`."""
        for run in self._attached():
            if run.isolation is not None:
                self._isolation_flops += TRAINING_FACTOR * self._module_cost(run) * self._batch
        self.growth.step(loss)

    # Boundaries

    def boundary(self, validate: Callable[[], Evaluation], epoch: float) -> BoundaryOutcome:
        """Validate, tell the controller, carry out what it decides; counterfactuals validate again."""
        first: list[Evaluation] = []

        def run() -> dict[str, Any]:
            found = validate()
            first.append(found)
            return {"loss": found.losses, "accuracy": found.accuracy, "epoch": epoch}

        ended = {id(r) for r in self.growth.records if r["outcome"] is not None}
        report = self.growth.boundary(run)
        events = [self._decision_event(applied) for applied in report.applied]
        events += [
            {"boundary": r["ended_boundary"], "step": r["ended_step"], "event": r["outcome"], "seed": r["seed"]}
            | {"site": r["site"], "blueprint_name": r["blueprint_name"], "reason": r["reason"]}
            for r in self.growth.records
            if r["outcome"] is not None and id(r) not in ended
        ]
        return BoundaryOutcome(
            validation=first[0],
            answered=report.advice is not None,
            explanation=self._explain(report),
            advice="" if report.advice is None else report.advice.explanation,
            events=events,
        )

    def _explain(self, report: BoundaryReport) -> str:
        if report.advice is None:
            return "no answer from the controller"
        decided = [
            f"{given.action} {self.growth.sites[given.seed].descriptor.name}: {given.explanation}"
            for given in (applied.decision for applied in report.applied)
        ]
        return " ".join(decided) or report.advice.explanation

    def _decision_event(self, applied: Applied) -> dict[str, Any]:
        given = applied.decision
        return {
            "event": "decision",
            "boundary": given.boundary,
            "decision_id": given.decision_id,
            "action": str(given.action),
            "seed": given.seed,
            "site": self.growth.sites[given.seed].descriptor.name,
            "blueprint_name": given.kernel.blueprint_name if given.kernel else "",
            "kernel_id": given.kernel.kernel_id if given.kernel else "",
            "stage": applied.stage.name,
            "reason": given.reason,
            "explanation": given.explanation,
            "refused": [str(reason) for reason in applied.refused],
        }

    def seeds(self) -> tuple[SeedProgress, ...]:
        """See `Network`."""
        life = self.growth.life
        return tuple(
            SeedProgress(
                index=index,
                site=run.site.descriptor.name,
                stage=life.stage(index),
                blueprint_name=run.choice.blueprint_name,
                alpha=float(run.attachment.seed.alpha) if run.attachment is not None else 0.0,
            )
            for index, run in sorted(life.runs.items())
        )

    # Kernels

    def prepare(self, say: Callable[[str], None], leave: Callable[[], bool]) -> None:
        """See `Network`."""
        prepared = prepare(
            self.growth.hello(),
            mesh=self._launch.mesh,
            token=self._launch.token(),
            wait_s=self.config.control.prepare_wait_s,
            say=say,
            leave=leave,
        )
        self._trust = prepared.trust
        self._load_ahead(prepared.kernels, leave)
        _log.info("library prepared", kernels=len(prepared.kernels), pending=prepared.pending, failed=prepared.failed)

    def _load_ahead(self, kernels: tuple[str, ...], leave: Callable[[], bool]) -> None:
        """Have the fitting kernels in memory before the first step.

        Not for speed: a kernel that is there is taken in at the boundary after its germination, however fast epochs
        pass on this machine, so that equal runs take equal decisions.
        """
        if self._plane is None or not kernels:
            return
        self._plane.prefetch(kernels)
        # Under memory pressure a cache keeps none but those in use: the others come when a seed asks for them.
        deadline = time.monotonic() + _LOAD_AHEAD_S
        waiting = set(kernels)
        began = time.monotonic()
        while waiting and not leave():
            # Looked at first: what ends its way between the two looks is there, or does not come at all.
            coming = self._plane.under_way(tuple(waiting))
            waiting = {kernel_id for kernel_id in waiting if not self._is_there(kernel_id)}
            if not (coming & waiting) or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        if waiting:
            waited_s = round(time.monotonic() - began, 1)
            _log.warning("kernels not loaded ahead", count=len(waiting), waited_s=waited_s)

    def _is_there(self, kernel_id: str) -> bool:
        assert self._plane is not None
        try:
            return self._plane.kernel(kernel_id) is not None
        except EsperError:
            return True  # refused: whoever germinates it will be told

    def kernels(self) -> tuple[str, ...]:
        """See `Network`."""
        return tuple(sorted({run.choice.kernel_id for run in self._attached()}))

    def bundle(self, kernel_id: str) -> Fetched | None:
        """See `Network`: from the cache on disk."""
        return self._disk.read(kernel_id) if self._disk is not None else None

    def _kernel_from(self, bundles: Mapping[str, Fetched]) -> Callable[[str], KernelLike | None]:
        """Kernels of a checkpoint, verified by the keys that the library named when the run began."""

        def find(kernel_id: str) -> KernelLike | None:
            fetched, trust = bundles.get(kernel_id), TrustStore(self._trust.keys)
            if fetched is None or not self._trust.keys:
                return None
            try:
                return load_kernel(fetched.bundle, fetched.verdict, trust, kernel_id, None)
            except EsperError as error:
                _log.warning("kernel of the checkpoint refused", kernel_id=kernel_id, error=str(error))
                return None

        return find

    # State

    def state_dict(self) -> dict[str, Any]:
        """See `Network`."""
        return {
            **super().state_dict(),
            "growth": self.growth.state_dict(),
            "trust": self._trust.document(),
            "isolation_flops": self._isolation_flops,
        }

    def load_state_dict(self, state: Mapping[str, Any], bundles: Mapping[str, Fetched]) -> None:
        """See `Network`."""
        # What the library says now, revocations included, is better than what it said when the run began.
        self._trust = self._trust if self._trust.keys else Trust.from_document(state["trust"])
        self._isolation_flops = state["isolation_flops"]
        kernels = self._kernel_from(bundles)
        self.growth.load_state_dict(state["growth"], kernels=kernels, breakers=self._circuits)
        super().load_state_dict(state, bundles)

    def host_state(self) -> dict[str, Tensor]:
        """See `Network`."""
        state: dict[str, Tensor] = self.model.state_dict()
        return {name: value for name, value in state.items() if _SEED_KEY not in name}

    def grown(self) -> list[tuple[Attached, nn.Module]]:
        """Modules that add to the output at the end, in the order in which they do."""
        found: list[tuple[Attached, nn.Module]] = []
        for run in self._attached():
            assert run.attachment is not None
            alpha = float(run.attachment.seed.alpha)
            if run.isolation is not None or alpha == 0.0:
                continue
            attached = Attached(
                site=run.site,
                kernel_id=run.choice.kernel_id,
                blueprint_name=run.choice.blueprint_name,
                learning_rate_scale=run.choice.learning_rate_scale,
                newborn_steps=_newborn_steps(run.record, self.growth.steps),
                alpha=alpha,
            )
            eager: Any = run.module
            found.append((attached, eager.eager()))
        return found

    def lineage(self) -> dict[str, Any]:
        """See `Network`."""
        records = self.growth.lineage()
        return {
            "adaptations": [_adaptation(record, self.growth) for record in records],
            "decisions": sorted(
                (
                    {"seed": r["seed"], "site": r["site"], "kernel_id": r["kernel_id"], **d}
                    for r in records
                    for d in r["decisions"]
                ),
                key=lambda d: int(d["boundary"]),
            ),
            "sites": [_site(site.descriptor) for site in self.growth.sites],
        }

    def close(self) -> None:
        """See `Network`."""
        self.growth.close()
        if self._box is not None:
            self._box.close()


def _newborn_steps(record: Mapping[str, Any], now: int) -> int:
    """Optimizer steps from the graft until the module was the host's own."""
    at = {entry["stage"]: entry["step"] for entry in record["stages"]}
    return int(at.get(Stage.FOSSILIZED.name, now)) - int(at.get(Stage.GRAFTING.name, now))


def _adaptation(record: Mapping[str, Any], growth: Any) -> dict[str, Any]:
    """One life as the reports show it; a life that is not over says where it stands."""
    measured = record["counterfactual"]
    outcome, reason = record["outcome"], record["reason"]
    if outcome is None:
        outcome = "unfinished"
        reason = f"still {record['stages'][-1]['stage']} when training ended" if record["stages"] else "never began"
        run = growth.life.runs.get(record["seed"])
        measured = asdict(run.counterfactual) if run is not None and run.counterfactual is not None else None
    last = record["decisions"][-1] if record["decisions"] else None
    return {
        **record,
        "outcome": outcome,
        "reason": reason or (last["explanation"] if last else ""),
        "ended_boundary": record.get("ended_boundary"),
        "ended_step": record.get("ended_step"),
        "gain": measured["mean_gain"] if measured else None,
        "gain_low": measured["lower_bound"] if measured else None,
    }


def _site(descriptor: Any) -> dict[str, Any]:
    return {
        "index": descriptor.index,
        "name": descriptor.name,
        "kind": descriptor.kind.value,
        "granularity": descriptor.granularity,
        "signature": str(descriptor.signature),
        "narrowest_width": descriptor.narrowest_width,
    }
