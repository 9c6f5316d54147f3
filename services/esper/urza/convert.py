"""Between the contracts and the library's own types: `x_to_proto`, `x_from_proto`, and nothing else."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper.kasmina.convert import signature_from_proto, signature_to_proto
from esper.kasmina.kernels.signing import CheckResult, Figure, SignedVerdict, Statement
from esper.kasmina.signature import Layout
from esper.mesh.errors import InvalidInput
from esper.urza.blueprints import Birth, Blueprint, BlueprintState
from esper.urza.builds import Build, BuildOrder, BuildState, Tier
from esper.urza.changes import Change
from esper.urza.kernels import Kernel, KernelOffer, KernelState, Transition
from esper.urza.leases import Built, Failed, Judged, Lease, Outcome, Request, WorkKind
from esper.urza.search import KernelQuery
from esper.urza.verdicts import RegisteredKey
from esper.v1 import (
    blueprint_pb2,
    build_pb2,
    kernel_pb2,
    lease_pb2,
    signature_pb2,
    urza_service_pb2,
    verdict_pb2,
)

__all__ = [
    "BUILD_STATES",
    "KERNEL_STATES",
    "LAYOUTS",
    "blueprint_to_proto",
    "build_to_proto",
    "change_to_proto",
    "kernel_to_proto",
    "key_to_proto",
    "lease_to_proto",
    "offer_from_proto",
    "order_from_proto",
    "outcome_from_proto",
    "query_from_proto",
    "request_from_proto",
    "seconds",
    "stamp",
    "statement_from_proto",
    "text",
    "transition_to_proto",
    "verdict_to_proto",
]

_A = TypeVar("_A")
_B = TypeVar("_B")
_MAX_INT = (1 << 63) - 1
"""What every database holds in a big integer; the contract's uint64 goes twice as far."""


def _inverse(mapping: Mapping[_A, _B]) -> dict[_B, _A]:
    return {value: key for key, value in mapping.items()}


_LAYOUT = {
    Layout.VECTOR: signature_pb2.LAYOUT_VECTOR,
    Layout.SEQUENCE: signature_pb2.LAYOUT_SEQUENCE,
    Layout.IMAGE: signature_pb2.LAYOUT_IMAGE,
}
_BIRTH = {Birth.ZERO: blueprint_pb2.BIRTH_ZERO, Birth.RANDOM: blueprint_pb2.BIRTH_RANDOM}
_BLUEPRINT_STATE = {
    BlueprintState.ACTIVE: blueprint_pb2.BLUEPRINT_STATE_ACTIVE,
    BlueprintState.ARCHIVED: blueprint_pb2.BLUEPRINT_STATE_ARCHIVED,
}
_TIER = {
    Tier.PORTABLE: build_pb2.TIER_PORTABLE,
    Tier.STANDARD: build_pb2.TIER_STANDARD,
    Tier.AGGRESSIVE: build_pb2.TIER_AGGRESSIVE,
}
_BUILD_STATE = {
    BuildState.QUEUED: build_pb2.BUILD_STATE_QUEUED,
    BuildState.LEASED: build_pb2.BUILD_STATE_LEASED,
    BuildState.SUCCEEDED: build_pb2.BUILD_STATE_SUCCEEDED,
    BuildState.FAILED: build_pb2.BUILD_STATE_FAILED,
}
_KERNEL_STATE = {
    KernelState.STAGED: kernel_pb2.KERNEL_STATE_STAGED,
    KernelState.VALIDATED: kernel_pb2.KERNEL_STATE_VALIDATED,
    KernelState.REJECTED: kernel_pb2.KERNEL_STATE_REJECTED,
    KernelState.ARCHIVED: kernel_pb2.KERNEL_STATE_ARCHIVED,
    KernelState.QUARANTINED: kernel_pb2.KERNEL_STATE_QUARANTINED,
}
_WORK_KIND = {
    WorkKind.COMPILE: lease_pb2.WORK_KIND_COMPILE,
    WorkKind.EVALUATE: lease_pb2.WORK_KIND_EVALUATE,
}
LAYOUTS = _inverse(_LAYOUT)
"""Layouts of the contract -> ours; LAYOUT_UNSPECIFIED is missing."""
KERNEL_STATES = _inverse(_KERNEL_STATE)
"""States of kernels of the contract -> ours; KERNEL_STATE_UNSPECIFIED is missing."""
BUILD_STATES = _inverse(_BUILD_STATE)
"""States of builds of the contract -> ours; BUILD_STATE_UNSPECIFIED is missing."""
_TIERS = _inverse(_TIER)
_BIRTHS = _inverse(_BIRTH)
_WORK_KINDS = _inverse(_WORK_KIND)


def stamp(moment: datetime) -> Timestamp:
    """A moment as the contract has it."""
    result = Timestamp()
    result.FromDatetime(moment)
    return result


def seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.ToNanoseconds() / 1e9


def text(value: str) -> str:
    """A text as every database takes it: PostgreSQL refuses the character zero."""
    return value.replace("\x00", "\N{REPLACEMENT CHARACTER}")


def _count(name: str, value: int) -> int:
    if value > _MAX_INT:
        raise InvalidInput(f"{name}: expected at most {_MAX_INT}, found {value}", reason="NUMBER_TOO_LARGE")
    return value


def blueprint_to_proto(blueprint: Blueprint) -> blueprint_pb2.Blueprint:
    """A blueprint for the wire, with its IR when it was read with it."""
    return blueprint_pb2.Blueprint(
        id=blueprint.id,
        name=blueprint.name,
        ir=blueprint.ir,
        layouts=[_LAYOUT[layout] for layout in blueprint.layouts],
        birth=_BIRTH[blueprint.birth],
        causal=blueprint.causal,
        tags=blueprint.tags,
        parent_ids=blueprint.parent_ids,
        author=blueprint.author,
        create_time=stamp(blueprint.create_time),
        state=_BLUEPRINT_STATE[blueprint.state],
        description=blueprint.description,
    )


def order_from_proto(message: build_pb2.Build) -> BuildOrder:
    """What of a Build a request may say."""
    return BuildOrder(
        blueprint_id=message.blueprint_id,
        signature=signature_from_proto(message.signature),
        target=text(message.target),
        tier=_TIERS[message.tier],
        priority=message.priority,
    )


def build_to_proto(build: Build) -> build_pb2.Build:
    """A build for the wire."""
    return build_pb2.Build(
        id=build.id,
        blueprint_id=build.blueprint_id,
        signature=signature_to_proto(build.signature),
        target=build.target,
        tier=_TIER[build.tier],
        state=_BUILD_STATE[build.state],
        attempts=build.attempts,
        kernel_id=build.kernel_id,
        error=build.error,
        priority=build.priority,
        create_time=stamp(build.create_time),
        update_time=stamp(build.update_time),
    )


def offer_from_proto(message: kernel_pb2.Kernel) -> KernelOffer:
    """What of a Kernel an upload may say.

    Raises:
        InvalidInput: NUMBER_TOO_LARGE.
    """
    return KernelOffer(
        build_id=message.build_id,
        blueprint_id=message.blueprint_id,
        signature=signature_from_proto(message.signature),
        tier=_TIERS[message.tier],
        target=text(message.target),
        parameters=_count("kernel.parameters", message.parameters),
        flops_per_position=_count("kernel.flops_per_position", message.flops_per_position),
        id=message.id,
        size_bytes=message.size_bytes,
        birth=_BIRTHS.get(message.birth),
    )


def kernel_to_proto(kernel: Kernel) -> kernel_pb2.Kernel:
    """A kernel for the wire, with its verdict."""
    verdict = None
    if kernel.verdict is not None and kernel.statement is not None:
        verdict = verdict_to_proto(kernel.verdict, kernel.statement)
    return kernel_pb2.Kernel(
        id=kernel.id,
        build_id=kernel.build_id,
        blueprint_id=kernel.blueprint_id,
        blueprint_name=kernel.blueprint_name,
        signature=signature_to_proto(kernel.signature),
        tier=_TIER[kernel.tier],
        target=kernel.target,
        birth=_BIRTH[kernel.birth],
        causal=kernel.causal,
        parameters=kernel.parameters,
        flops_per_position=kernel.flops_per_position,
        size_bytes=kernel.size_bytes,
        state=_KERNEL_STATE[kernel.state],
        verdict=verdict,
        create_time=stamp(kernel.create_time),
        update_time=stamp(kernel.update_time),
    )


def verdict_to_proto(verdict: SignedVerdict, statement: Statement) -> verdict_pb2.Verdict:
    """A verdict for the wire: the signed bytes, and beside them what they say."""
    return verdict_pb2.Verdict(
        kernel_id=statement.kernel_id,
        passed=statement.passed,
        checks=[
            verdict_pb2.Check(name=c.name, passed=c.passed, finding=c.finding, elapsed_ms=c.elapsed_ms)
            for c in statement.checks
        ],
        measurements=[verdict_pb2.Measurement(name=m.name, value=m.value, unit=m.unit) for m in statement.measurements],
        tags=statement.tags,
        target=statement.target,
        gauntlet_version=statement.gauntlet_version,
        issue_time=stamp(statement.issued_at),
        statement=verdict.statement,
        signature=verdict.signature,
        key_id=verdict.key_id,
    )


def statement_from_proto(message: verdict_pb2.Verdict) -> Statement:
    """What the fields beside the signed bytes of a verdict say."""
    return Statement(
        kernel_id=message.kernel_id,
        passed=message.passed,
        checks=tuple(CheckResult(c.name, c.passed, c.finding, c.elapsed_ms) for c in message.checks),
        measurements=tuple(Figure(m.name, m.value, m.unit) for m in message.measurements),
        tags=tuple(message.tags),
        target=message.target,
        gauntlet_version=message.gauntlet_version,
        issued_at=message.issue_time.ToDatetime(tzinfo=UTC),
    )


def transition_to_proto(transition: Transition) -> urza_service_pb2.KernelTransition:
    """A change of a kernel's state for the wire."""
    before = kernel_pb2.KERNEL_STATE_UNSPECIFIED
    return urza_service_pb2.KernelTransition(
        from_state=before if transition.from_state is None else _KERNEL_STATE[transition.from_state],
        to_state=_KERNEL_STATE[transition.to_state],
        identity=transition.identity,
        reason=transition.reason,
        occur_time=stamp(transition.occur_time),
    )


def query_from_proto(message: urza_service_pb2.ListKernelsRequest) -> KernelQuery:
    """The conditions of a listing of kernels."""
    return KernelQuery(
        states=frozenset(KERNEL_STATES[state] for state in message.states if state),
        signatures=frozenset(signature_from_proto(signature) for signature in message.signatures),
        target=text(message.target),
        blueprint_id=message.blueprint_id,
        tier=_TIERS.get(message.tier),
        tags=frozenset(text(tag) for tag in message.tags),
        max_parameters=min(message.max_parameters, _MAX_INT),
        causal_only=message.causal_only,
        max_latency_us=message.max_latency_us,
        max_memory_bytes=message.max_memory_bytes,
        fastest_only=message.fastest_only,
    )


def request_from_proto(message: urza_service_pb2.LeaseWorkRequest, *, default_lease_s: float) -> Request:
    """What somebody who wants work can do."""
    return Request(
        kind=_WORK_KINDS[message.kind],
        holder=text(message.holder),
        limit=message.max_leases or 1,
        lease_time_s=seconds(message.lease_time) if message.HasField("lease_time") else default_lease_s,
        tiers=frozenset(_TIERS[tier] for tier in message.tiers if tier),
        target=text(message.target),
    )


def lease_to_proto(lease: Lease) -> lease_pb2.Lease:
    """A lease with its work for the wire."""
    message = lease_pb2.Lease(
        id=lease.id,
        kind=_WORK_KIND[lease.kind],
        holder=lease.holder,
        attempt=lease.attempt,
        expire_time=stamp(lease.expire_time),
    )
    if lease.build is not None and lease.blueprint is not None:
        message.compile.build.CopyFrom(build_to_proto(lease.build))
        message.compile.blueprint.CopyFrom(blueprint_to_proto(lease.blueprint))
    if lease.kernel is not None:
        message.evaluate.kernel.CopyFrom(kernel_to_proto(lease.kernel))
    return message


def outcome_from_proto(message: urza_service_pb2.CompleteWorkRequest) -> Outcome:
    """How a piece of work ended."""
    match message.WhichOneof("outcome"):
        case "kernel_id":
            return Built(message.kernel_id)
        case "verdict":
            verdict = message.verdict
            signed = SignedVerdict(verdict.statement, verdict.signature, verdict.key_id)
            return Judged(signed, statement_from_proto(verdict))
        case _:  # validation lets nothing else through
            return Failed(text(message.failure.error), message.failure.retryable)


def key_to_proto(key: RegisteredKey) -> verdict_pb2.SigningKey:
    """A public key for the wire."""
    return verdict_pb2.SigningKey(
        key_id=key.key_id, public_key=key.public_key, create_time=stamp(key.create_time), revoked=key.revoked
    )


def change_to_proto(change: int | Change) -> urza_service_pb2.WatchLibraryResponse:
    """A change for the wire; a bare number is a position."""
    if isinstance(change, int):
        position: Any = urza_service_pb2.LibraryPosition()
        return urza_service_pb2.WatchLibraryResponse(sequence=change, position=position)
    message = urza_service_pb2.WatchLibraryResponse(sequence=change.sequence, occur_time=stamp(change.occur_time))
    match change.subject:
        case Blueprint():
            message.blueprint.CopyFrom(blueprint_to_proto(change.subject))
        case Build():
            message.build.CopyFrom(build_to_proto(change.subject))
        case Kernel():
            message.kernel.CopyFrom(kernel_to_proto(change.subject))
    return message
