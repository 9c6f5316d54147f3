"""Conversions between the forge's types and the contract."""

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper.kasmina.blueprints import Birth
from esper.kasmina.convert import signature_from_proto, signature_to_proto
from esper.kasmina.kernels.bundle import ANY_TARGET, Tier
from esper.mesh.errors import FieldViolation, InvalidInput
from esper.mesh.workers import WorkerInfo, WorkerState
from esper.tezzeret.check import Report
from esper.tezzeret.orders import Built, Order, Phase, Step, Task
from esper.v1 import blueprint_pb2, build_pb2, forge_pb2, kernel_pb2, lease_pb2, tezzeret_service_pb2

__all__ = [
    "kernel_to_proto",
    "report_to_proto",
    "seconds",
    "step_to_proto",
    "task_from_proto",
    "tier_from_proto",
    "tier_to_proto",
    "worker_to_proto",
]

_TIERS = {
    Tier.PORTABLE: build_pb2.TIER_PORTABLE,
    Tier.STANDARD: build_pb2.TIER_STANDARD,
    Tier.AGGRESSIVE: build_pb2.TIER_AGGRESSIVE,
}
_BIRTHS = {Birth.ZERO: blueprint_pb2.BIRTH_ZERO, Birth.RANDOM: blueprint_pb2.BIRTH_RANDOM}
_STATES = {
    WorkerState.STARTING: forge_pb2.WORKER_STATE_STARTING,
    WorkerState.IDLE: forge_pb2.WORKER_STATE_IDLE,
    WorkerState.BUSY: forge_pb2.WORKER_STATE_BUSY,
}
_PHASES = {
    Phase.LEASED: forge_pb2.BUILD_PHASE_LEASED,
    Phase.EXPORTING: forge_pb2.BUILD_PHASE_EXPORTING,
    Phase.COMPILING: forge_pb2.BUILD_PHASE_COMPILING,
    Phase.UPLOADING: forge_pb2.BUILD_PHASE_UPLOADING,
    Phase.SUCCEEDED: forge_pb2.BUILD_PHASE_SUCCEEDED,
    Phase.FAILED: forge_pb2.BUILD_PHASE_FAILED,
}
_BUILD_STATES = {Phase.SUCCEEDED: build_pb2.BUILD_STATE_SUCCEEDED, Phase.FAILED: build_pb2.BUILD_STATE_FAILED}
_MAX_NODE = 64
_MAX_MESSAGE = 1024


def seconds(value: float) -> Duration:
    """A duration."""
    duration = Duration()
    duration.FromNanoseconds(round(value * 1e9))
    return duration


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC))
    return stamp


def tier_to_proto(tier: Tier) -> build_pb2.Tier.ValueType:
    """A tier for the wire."""
    return _TIERS[tier]


def tier_from_proto(number: build_pb2.Tier.ValueType) -> Tier:
    """A tier from the wire.

    Raises:
        InvalidInput: no tier that this forge knows.
    """
    for tier, wire in _TIERS.items():
        if wire == number:
            return tier
    name = build_pb2.Tier.Name(number) if number in build_pb2.Tier.values() else str(number)
    raise InvalidInput(f"tier: expected portable, standard or aggressive, found {name}", reason="TIER_NOT_OFFERED")


def task_from_proto(lease: lease_pb2.Lease) -> Task:
    """A leased order.

    Raises:
        InvalidInput: it is no order, or one of another signature or tier than there are.
    """
    if not lease.HasField("compile"):
        raise InvalidInput(f"lease {lease.id}: expected compile work, found {lease.WhichOneof('work')}")
    work = lease.compile
    order = Order(
        build_id=work.build.id,
        blueprint_id=work.build.blueprint_id,
        ir=work.blueprint.ir,
        signature=signature_from_proto(work.build.signature),
        target=work.build.target,
        tier=tier_from_proto(work.build.tier),
    )
    return Task(lease.id, lease.attempt, order)


def kernel_to_proto(order: Order, built: Built) -> kernel_pb2.Kernel:
    """What the library is told of a kernel before its bytes."""
    manifest = built.manifest
    return kernel_pb2.Kernel(
        build_id=order.build_id,
        blueprint_id=manifest.blueprint_id,
        blueprint_name=manifest.blueprint_name,
        signature=signature_to_proto(manifest.signature),
        tier=tier_to_proto(manifest.tier),
        target="" if manifest.target == ANY_TARGET else manifest.target,
        birth=_BIRTHS[manifest.birth],
        causal=manifest.causal,
        parameters=manifest.parameter_count,
        flops_per_position=manifest.flops_per_position,
        size_bytes=len(built.bundle),
    )


def worker_to_proto(info: WorkerInfo) -> forge_pb2.Worker:
    """A worker process."""
    return forge_pb2.Worker(
        index=info.index, pid=info.pid, state=_STATES[info.state], work_id=info.work_id, starts=info.starts
    )


def step_to_proto(step: Step) -> forge_pb2.BuildProgress:
    """A step of a build."""
    order = step.order
    build = build_pb2.Build(
        id=order.build_id,
        blueprint_id=order.blueprint_id,
        signature=signature_to_proto(order.signature),
        target=order.target,
        tier=tier_to_proto(order.tier),
        state=_BUILD_STATES.get(step.phase, build_pb2.BUILD_STATE_LEASED),
        attempts=step.attempt,
        kernel_id=step.kernel_id,
        error=step.error,
    )
    return forge_pb2.BuildProgress(
        build=build,
        phase=_PHASES[step.phase],
        elapsed=seconds(step.elapsed_s),
        error=step.error,
        occur_time=_timestamp(step.occurred_at),
        kernel_id=step.kernel_id,
    )


def _problem(violation: FieldViolation) -> tezzeret_service_pb2.BlueprintProblem:
    return tezzeret_service_pb2.BlueprintProblem(
        node=violation.field[:_MAX_NODE], message=violation.description[:_MAX_MESSAGE]
    )


def report_to_proto(report: Report) -> tezzeret_service_pb2.CheckBlueprintResponse:
    """What is known of an IR."""
    return tezzeret_service_pb2.CheckBlueprintResponse(
        ok=not report.problems,
        problems=[_problem(violation) for violation in report.problems],
        blueprint_id=report.blueprint_id,
        parameters=report.parameters,
        flops_per_position=report.flops_per_position,
    )
