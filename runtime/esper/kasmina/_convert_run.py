"""Conversions: what a run tells at its beginning, at each boundary and between them; see `esper.kasmina.convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from google.protobuf.duration_pb2 import Duration

from esper.kasmina._convert_base import (
    GATE_BLOCKS,
    GATED,
    MAX_FAILURE,
    column,
    cut,
    entries,
    given,
    optional,
    site_from_proto,
    site_health_from_proto,
    site_health_to_proto,
    site_to_proto,
    stage,
)
from esper.kasmina.control import BoundaryState, Counterfactual, HealthColumns, RunHello, SeedState
from esper.mesh.blobs import digest_bytes, digest_text
from esper.mesh.errors import InvalidInput
from esper.v1 import health_pb2, run_pb2, seed_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence


def run_hello_to_proto(hello: RunHello) -> run_pb2.RunHello:
    """First words of a run for the wire."""
    return run_pb2.RunHello(
        run_id=hello.run_id,
        target=hello.target,
        total_steps=hello.total_steps,
        decay_start=hello.decay_start,
        host_parameters=hello.host_parameters,
        parameter_budget=hello.parameter_budget,
        max_active_seeds=hello.max_active_seeds,
        sites=[site_to_proto(site) for site in hello.sites],
        blueprints=hello.blueprints,
        task=hello.task,
        controller_state=hello.controller_state,
    )


def run_hello_from_proto(message: run_pb2.RunHello) -> RunHello:
    """First words of a run from the wire.

    Raises:
        InvalidInput: a site that is none.
    """
    return RunHello(
        run_id=message.run_id,
        target=message.target,
        total_steps=given(message, "total_steps"),
        decay_start=given(message, "decay_start"),
        host_parameters=message.host_parameters,
        parameter_budget=message.parameter_budget,
        max_active_seeds=message.max_active_seeds,
        sites=tuple(site_from_proto(site) for site in message.sites),
        blueprints=tuple(message.blueprints),
        task=message.task,
        controller_state=message.controller_state,
    )


def boundary_state_to_proto(state: BoundaryState) -> run_pb2.TrainingState:
    """A boundary for the wire."""
    elapsed = Duration()
    elapsed.FromNanoseconds(round(state.seconds * 1e9))
    return run_pb2.TrainingState(
        run_id=state.run_id,
        boundary=state.boundary,
        step=state.step,
        epoch=state.epoch,
        train_loss=state.train_loss,
        validation_loss=state.validation_loss,
        validation_accuracy=state.validation_accuracy,
        learning_rate=state.learning_rate,
        gradient_norm=state.gradient_norm,
        parameters_added=state.parameters_added,
        flops_per_sample=state.flops_per_sample,
        elapsed=elapsed,
        seeds=seeds_to_proto(state.seeds),
        sites=site_health_to_proto(state.sites),
    )


def boundary_state_from_proto(message: run_pb2.TrainingState) -> BoundaryState:
    """A boundary from the wire.

    Raises:
        InvalidInput: columns of different lengths, or an unknown stage.
    """
    return BoundaryState(
        run_id=message.run_id,
        boundary=message.boundary,
        step=message.step,
        epoch=given(message, "epoch"),
        train_loss=given(message, "train_loss"),
        validation_loss=given(message, "validation_loss"),
        validation_accuracy=given(message, "validation_accuracy"),
        learning_rate=given(message, "learning_rate"),
        gradient_norm=given(message, "gradient_norm"),
        parameters_added=message.parameters_added,
        flops_per_sample=given(message, "flops_per_sample"),
        seconds=message.elapsed.ToNanoseconds() / 1e9,
        seeds=seeds_from_proto(message.seeds),
        sites=site_health_from_proto(message.sites),
    )


# Seeds


def _blocked_to_proto(seed: SeedState) -> seed_pb2.GateBlock.ValueType:
    if not seed.blocked_by:
        silent = not seed.ready and seed.stage in GATED
        return seed_pb2.GATE_BLOCK_OTHER if silent else seed_pb2.GATE_BLOCK_UNSPECIFIED
    name = seed.blocked_by.upper()
    return seed_pb2.GateBlock.Value(f"GATE_BLOCK_{name if name in GATE_BLOCKS else 'OTHER'}")


def seeds_to_proto(seeds: Sequence[SeedState]) -> seed_pb2.SeedColumns:
    """Living and spent seeds as columns.

    Raises:
        InvalidInput: a kernel id that is no digest.
    """
    gains = [seed.counterfactual for seed in seeds]
    measured = any(gains)
    return seed_pb2.SeedColumns(
        seed=[seed.index for seed in seeds],
        stage=[cast("seed_pb2.SeedStage.ValueType", int(seed.stage)) for seed in seeds],
        boundaries_in_stage=[seed.boundaries_in_stage for seed in seeds],
        steps_in_stage=[seed.steps_in_stage for seed in seeds],
        blocked_by=[_blocked_to_proto(seed) for seed in seeds],
        alpha=[seed.alpha for seed in seeds],
        parameters=[seed.parameters for seed in seeds],
        isolation_gain=column(seed.isolation_gain for seed in seeds),
        gradient_norm=column(seed.gradient_norm for seed in seeds),
        weight_norm=column(seed.weight_norm for seed in seeds),
        gain_mean=column(None if gain is None else gain.mean_gain for gain in gains),
        gain_lower=column(None if gain is None else gain.lower_bound for gain in gains),
        gain_confidence=column(None if gain is None else gain.confidence for gain in gains),
        gain_batches=[0 if gain is None else gain.batches for gain in gains] if measured else (),
        kernel=[digest_bytes(seed.kernel_id) if seed.kernel_id else b"" for seed in seeds],
        failure=[cut(seed.failure, MAX_FAILURE) for seed in seeds] if any(seed.failure for seed in seeds) else (),
    )


def _counterfactual(message: seed_pb2.SeedColumns, row: int) -> Counterfactual | None:
    if not message.gain_batches or not message.gain_batches[row]:
        return None
    return Counterfactual(
        mean_gain=message.gain_mean[row] if message.gain_mean else float("nan"),
        lower_bound=message.gain_lower[row] if message.gain_lower else float("nan"),
        confidence=message.gain_confidence[row] if message.gain_confidence else float("nan"),
        batches=message.gain_batches[row],
    )


def _blocked_from_proto(number: seed_pb2.GateBlock.ValueType) -> str:
    if number == seed_pb2.GATE_BLOCK_UNSPECIFIED:
        return ""
    # A newer runtime may know more reasons than this reader; blocked is blocked.
    known = number in seed_pb2.GateBlock.values()
    return seed_pb2.GateBlock.Name(number).removeprefix("GATE_BLOCK_") if known else "OTHER"


def seeds_from_proto(message: seed_pb2.SeedColumns) -> tuple[SeedState, ...]:
    """Seeds from columns.

    Raises:
        InvalidInput: columns of different lengths, an unknown stage, or a digest that is not 32 bytes.
    """
    size = len(message.seed)
    columns: dict[str, Any] = {
        field.name: entries(getattr(message, field.name), size, field.name) for field in message.DESCRIPTOR.fields
    }
    if size and not columns["stage"]:
        raise InvalidInput(f"column stage: expected {size} entries, found none")
    return tuple(_seed(message, columns, row) for row in range(size))


def _seed(message: seed_pb2.SeedColumns, columns: dict[str, Any], row: int) -> SeedState:
    def at(name: str, missing: Any) -> Any:
        return columns[name][row] if columns[name] else missing

    now = stage(message.stage[row])
    blocked = _blocked_from_proto(at("blocked_by", 0))
    kernel = at("kernel", b"")
    return SeedState(
        index=message.seed[row],
        stage=now,
        boundaries_in_stage=at("boundaries_in_stage", 0),
        steps_in_stage=at("steps_in_stage", 0),
        ready=not blocked and now in GATED,
        blocked_by=blocked,
        alpha=at("alpha", 0.0),
        kernel_id=digest_text(kernel) if kernel else "",
        parameters=at("parameters", 0),
        isolation_gain=optional(message.isolation_gain, row),
        gradient_norm=optional(message.gradient_norm, row),
        weight_norm=optional(message.weight_norm, row),
        counterfactual=_counterfactual(message, row),
        failure=at("failure", ""),
    )


# Telemetry


def health_to_proto(columns: HealthColumns) -> health_pb2.HealthBatch:
    """Telemetry of all living seeds for the wire."""
    return health_pb2.HealthBatch(
        run_id=columns.run_id,
        step=columns.step,
        seed=columns.seed,
        stage=[cast("seed_pb2.SeedStage.ValueType", number) for number in columns.stage],
        alpha=columns.alpha,
        gradient_norm=columns.gradient_norm,
        weight_norm=columns.weight_norm,
        output_ratio=columns.output_ratio,
        bottleneck=columns.bottleneck,
    )


def health_from_proto(message: health_pb2.HealthBatch) -> HealthColumns:
    """Telemetry from the wire.

    Raises:
        InvalidInput: columns of different lengths.
    """
    size = len(message.seed)
    missing = (float("nan"),) * size

    def column_of(name: str) -> tuple[float, ...]:
        return tuple(entries(getattr(message, name), size, name)) or missing

    return HealthColumns(
        run_id=message.run_id,
        step=message.step,
        seed=tuple(message.seed),
        stage=tuple(int(number) for number in entries(message.stage, size, "stage")),
        alpha=column_of("alpha"),
        gradient_norm=column_of("gradient_norm"),
        weight_norm=column_of("weight_norm"),
        output_ratio=column_of("output_ratio"),
        bottleneck=column_of("bottleneck"),
    )
