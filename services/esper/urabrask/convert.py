"""Conversions between the engine's types and the contract."""

from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper.kasmina.convert import signature_from_proto
from esper.kasmina.kernels.signing import CheckResult, Figure, PublicKey, SignedVerdict, Statement
from esper.mesh.workers import WorkerInfo, WorkerState
from esper.urabrask.board import Judgement
from esper.urabrask.checks import CheckSpec
from esper.urabrask.engine import Candidate
from esper.v1 import blueprint_pb2, build_pb2, forge_pb2, kernel_pb2, urabrask_service_pb2, verdict_pb2

__all__ = [
    "candidate_from_proto",
    "check_spec_to_proto",
    "key_to_proto",
    "seconds",
    "signed_from_proto",
    "statement_from_proto",
    "verdict_to_proto",
    "worker_to_proto",
]

_STATES = {
    WorkerState.STARTING: forge_pb2.WORKER_STATE_STARTING,
    WorkerState.IDLE: forge_pb2.WORKER_STATE_IDLE,
    WorkerState.BUSY: forge_pb2.WORKER_STATE_BUSY,
}


def seconds(value: float) -> Duration:
    """A duration."""
    duration = Duration()
    duration.FromNanoseconds(round(value * 1e9))
    return duration


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC))
    return stamp


def candidate_from_proto(kernel: kernel_pb2.Kernel) -> Candidate:
    """A staged kernel of the library.

    Raises:
        InvalidInput: its signature is none.
    """
    tier = build_pb2.Tier.Name(kernel.tier).removeprefix("TIER_").lower()
    told = {
        "blueprint_id": kernel.blueprint_id,
        "signature": str(signature_from_proto(kernel.signature)),
        "tier": tier,
        "birth": blueprint_pb2.Birth.Name(kernel.birth).removeprefix("BIRTH_").lower(),
        "causal": kernel.causal,
        "parameters": kernel.parameters,
    }
    if kernel.tier != build_pb2.TIER_PORTABLE:
        told["target"] = kernel.target  # a portable kernel has none that counts
    return Candidate(kernel.id, kernel.size_bytes, told)


def key_to_proto(key: PublicKey, create_time: datetime) -> verdict_pb2.SigningKey:
    """A public key."""
    return verdict_pb2.SigningKey(
        key_id=key.key_id, public_key=key.raw, create_time=_timestamp(create_time), revoked=key.revoked
    )


def verdict_to_proto(judgement: Judgement) -> verdict_pb2.Verdict:
    """A verdict: the fields of its statement, and the exact bytes that were signed."""
    said = judgement.statement
    return verdict_pb2.Verdict(
        kernel_id=said.kernel_id,
        passed=said.passed,
        checks=[
            verdict_pb2.Check(name=c.name, passed=c.passed, finding=c.finding, elapsed_ms=c.elapsed_ms)
            for c in said.checks
        ],
        measurements=[verdict_pb2.Measurement(name=m.name, value=m.value, unit=m.unit) for m in said.measurements],
        tags=said.tags,
        target=said.target,
        gauntlet_version=said.gauntlet_version,
        issue_time=_timestamp(said.issued_at),
        statement=judgement.signed.statement,
        signature=judgement.signed.signature,
        key_id=judgement.signed.key_id,
    )


def signed_from_proto(verdict: verdict_pb2.Verdict) -> SignedVerdict:
    """The bytes, the signature and the key's name."""
    return SignedVerdict(verdict.statement, verdict.signature, verdict.key_id)


def statement_from_proto(verdict: verdict_pb2.Verdict) -> Statement:
    """What the fields beside the signed bytes claim."""
    return Statement(
        kernel_id=verdict.kernel_id,
        passed=verdict.passed,
        checks=tuple(CheckResult(c.name, c.passed, c.finding, c.elapsed_ms) for c in verdict.checks),
        measurements=tuple(Figure(m.name, m.value, m.unit) for m in verdict.measurements),
        tags=tuple(verdict.tags),
        target=verdict.target,
        gauntlet_version=verdict.gauntlet_version,
        issued_at=verdict.issue_time.ToDatetime(tzinfo=UTC),
    )


def check_spec_to_proto(spec: CheckSpec) -> urabrask_service_pb2.CheckDescription:
    """A test of the gauntlet."""
    return urabrask_service_pb2.CheckDescription(name=spec.name, description=spec.description)


def worker_to_proto(info: WorkerInfo) -> forge_pb2.Worker:
    """A worker process."""
    return forge_pb2.Worker(
        index=info.index, pid=info.pid, state=_STATES[info.state], work_id=info.work_id[:80], starts=info.starts
    )
