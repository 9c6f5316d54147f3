"""What a session tells: to the controller and to the bus. Pure reading of its state."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina import seeds
from esper.kasmina._seed import choice_document
from esper.kasmina._shards import whole
from esper.kasmina.control import (
    BoundaryState,
    Decision,
    FieldReport,
    HealthColumns,
    Outcome,
    RunHello,
    SeedState,
    Stage,
)
from esper.kasmina.health import HostCopy
from esper.kasmina.kernels.target import Target
from esper.kasmina.newborn import host_groups

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from esper.kasmina._decide import Applied
    from esper.kasmina._measure import Validation
    from esper.kasmina._seed import SeedRun
    from esper.kasmina.control import Advice
    from esper.kasmina.growth import Growth

__all__ = [
    "BoundaryReport",
    "boundary_state",
    "decision_fields",
    "end",
    "health_job",
    "hello",
    "lineage",
    "locks",
    "new_record",
    "new_run_id",
]


@dataclass(frozen=True, slots=True)
class BoundaryReport:
    """What happened at a boundary."""

    boundary: int
    loss: float | None
    """Mean validation loss; None where not given."""
    accuracy: float | None
    advice: Advice | None
    """None where no controller answered."""
    applied: tuple[Applied, ...]
    """What became of each decision."""


def new_run_id() -> str:
    """A slug that is unique enough: date, minute, four letters."""
    return f"run-{datetime.now(UTC):%Y%m%d-%H%M}-{secrets.token_hex(2)}"


def hello(growth: Growth) -> RunHello:
    """First words of the run."""
    config, life = growth.config, growth.life
    device = next((p.device.type for p in growth.model.parameters()), "cpu")
    if device == "meta":
        # Not materialised yet, which large models are where they will train.
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return RunHello(
        run_id=growth.run_id,
        target=str(Target.here(device)),
        total_steps=config.total_steps,
        decay_start=config.decay_start,
        host_parameters=life.host_parameters,
        parameter_budget=life.budget,
        max_active_seeds=config.max_active_seeds,
        sites=tuple(site.descriptor for site in life.sites),
        blueprints=config.blueprints,
        task=config.task,
        controller_state=growth.controller_state,
    )


def boundary_state(growth: Growth, validation: Validation) -> BoundaryState:
    """How things stand; reads the device, which is in order at a boundary."""
    groups = host_groups(growth.optimizer)
    sampler = growth.observation.sampler
    flops = growth.config.flops_per_sample
    grown = sum(run.flops for run in growth.life.runs.values() if run.attachment is not None)
    return BoundaryState(
        run_id=growth.run_id,
        boundary=growth.boundaries,
        step=growth.steps,
        epoch=validation.epoch,
        # As they are: that a loss is not finite was measured, and a controller must not germinate on it.
        train_loss=growth.losses.mean(),
        validation_loss=validation.loss,
        validation_accuracy=_known(validation.accuracy),
        learning_rate=float(groups[0]["lr"]) if groups else None,
        gradient_norm=growth.observation.gradient_norm,
        parameters_added=growth.life.parameters_added,
        flops_per_sample=None if flops is None else flops + grown,
        seconds=growth.seconds,
        seeds=tuple(_seed_state(growth, growth.life.runs[seed]) for seed in sorted(growth.life.runs)),
        sites=growth.shared.health(sampler.take() if sampler is not None else ()),
    )


def _known(value: float | None) -> float | None:
    """A number that is not finite says nothing that a controller could weigh: it counts as not measured."""
    return value if value is not None and math.isfinite(value) else None


def _seed_state(growth: Growth, run: SeedRun) -> SeedState:
    life, seed = growth.life, run.index
    stage = life.stage(seed)
    blocked = ""
    if stage in seeds.LIVING:
        reasons = life.gate(run, seeds.FORWARD[seeds.FORWARD.index(stage) + 1])
        blocked = reasons[0].code if reasons else ""
    elif stage in {Stage.EMBARGOED, Stage.ROLLED_BACK}:
        closed = life.layout.boundaries_of(seed) < life.layout.closed_boundaries[seed]
        blocked = "TOO_SOON" if closed else ""
    alpha = 0.0 if run.attachment is None else float(run.attachment.seed.alpha)
    life.layout.note_alpha(seed, alpha)
    norm = run.isolation.gradient_norm if run.isolation is not None else _read(life.groups.gradient_norm(seed))
    return SeedState(
        index=seed,
        stage=stage,
        boundaries_in_stage=life.layout.boundaries_of(seed),
        steps_in_stage=life.layout.steps_of(seed),
        ready=not blocked and stage in seeds.LIVING | {Stage.EMBARGOED, Stage.ROLLED_BACK},
        blocked_by=blocked,
        alpha=alpha,
        kernel_id=run.choice.kernel_id,
        parameters=run.parameters if run.attachment is not None else 0,
        isolation_gain=_known(run.isolation_gain),
        gradient_norm=_known(norm),
        weight_norm=_known(_weight_norm(run)),
        counterfactual=run.counterfactual,
        failure=run.failure,
    )


def _read(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _weight_norm(run: SeedRun) -> float | None:
    if run.attachment is None:
        return None
    return float(_weights(run))


def _weights(run: SeedRun) -> Tensor:
    from torch.nn.utils import get_total_norm

    return whole(get_total_norm([p.detach() for p in run.module.parameters()]))


def health_job(growth: Growth) -> Callable[[], None] | None:
    """Seed telemetry of a sampled step, for the worker: device scalars now, their values and the bus there."""
    life = growth.life
    runs = [run for run in life.runs.values() if run.attachment is not None]
    if not runs:
        return None
    indices, stages, found = [], [], []
    for run in runs:
        assert run.attachment is not None
        seed = run.attachment.seed
        indices.append(run.index)
        stages.append(int(life.stage(run.index)))
        found += [seed.alpha.detach().clone(), life.groups.gradient_norm(run.index), _weights(run), seed.ratio]
        seed.measuring = run.blend is not None
    copy = HostCopy([value for value in found if value is not None])
    step, run_id, plane, statistics = growth.steps, growth.run_id, growth.plane, life.layout.statistics

    def publish() -> None:
        arrived = iter(copy.wait())
        values = [math.nan if value is None else float(next(arrived)) for value in found]
        alpha, gradient, weight, ratio = (tuple(values[column::4]) for column in range(4))
        with statistics.writing():
            statistics["gradient_norm"][indices] = gradient
            statistics["weight_norm"][indices] = weight
            statistics["output_ratio"][indices] = ratio
        plane.publish_health(
            HealthColumns(
                run_id=run_id,
                step=step,
                seed=tuple(indices),
                stage=tuple(stages),
                alpha=alpha,
                gradient_norm=gradient,
                weight_norm=weight,
                output_ratio=ratio,
                bottleneck=tuple(statistics["bottleneck"][indices].tolist()),
            )
        )

    return publish


def decision_fields(applied: Applied) -> dict[str, object]:
    """What became of a decision, for the log and the bus."""
    given = applied.decision
    return {
        "decision_id": given.decision_id,
        "seed": given.seed,
        "action": str(given.action),
        "stage": applied.stage.name,
        "refused": [str(reason) for reason in applied.refused],
    }


def new_record(growth: Growth, decision: Decision) -> dict[str, Any]:
    """The lineage entry of a life that begins."""
    site = growth.sites[decision.seed].descriptor
    assert decision.kernel is not None
    return {
        "seed": decision.seed,
        "site": site.name,
        "kind": site.kind.value,
        "granularity": site.granularity,
        "signature": str(site.signature),
        **choice_document(decision.kernel),
        "germinated_boundary": growth.boundaries,
        "germinated_step": growth.steps,
        "stages": [],
        "decisions": [],
        "parameters": 0,
        "counterfactual": None,
        "outcome": None,
        "reason": "",
    }


def end(growth: Growth, run: SeedRun, outcome: Outcome, reason: str) -> FieldReport:
    """Close the lineage entry of a life and make its field report."""
    measured = run.counterfactual
    reason = "; ".join([reason, *(text for text in run.faults if text not in reason)])
    run.record |= {
        "outcome": outcome.value,
        "reason": reason,
        "ended_boundary": growth.boundaries,
        "ended_step": growth.steps,
        "parameters": run.parameters,
        "counterfactual": None if measured is None else asdict(measured),
    }
    return FieldReport(
        run_id=growth.run_id,
        task=growth.config.task,
        site=run.site.descriptor,
        kernel_id=run.choice.kernel_id,
        blueprint_name=run.choice.blueprint_name,
        outcome=outcome,
        germinated_boundary=run.germinated_boundary,
        ended_boundary=growth.boundaries,
        parameters=run.parameters,
        counterfactual=measured,
        reason=reason,
    )


def lineage(growth: Growth) -> list[dict[str, Any]]:
    """Copies of all entries, the living ones brought up to date."""
    for run in growth.life.runs.values():
        if run.attachment is not None:
            run.record["parameters"] = run.parameters
    return [{**r, "stages": [*r["stages"]], "decisions": [*r["decisions"]]} for r in growth.records]


def locks(growth: Growth) -> dict[int, int]:
    """Boundaries left for each locked seed."""
    layout = growth.life.layout
    at = layout.at(Stage.ROLLED_BACK)
    return {int(seed): max(0, int(layout.closed_boundaries[seed]) - layout.boundaries_of(int(seed))) for seed in at}
