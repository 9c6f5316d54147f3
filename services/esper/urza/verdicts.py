"""Verdicts: the only way out of STAGED. A verdict counts when a key that an evaluation engine registered signed it.

The store takes a `Proof`, and `prove` is the only function that makes one: what was not verified is not written down.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from esper.kasmina.kernels.signing import PublicKey, SignedVerdict, Statement, TrustStore, key_id_of
from esper.mesh.errors import Forbidden, InvalidInput
from esper.mesh.identity import Identity, Role

__all__ = ["LATENCY", "MEMORY", "Proof", "RegisteredKey", "check_key", "figure", "prove"]

LATENCY: Final = "latency.forward.p50"
"""Measurement that `max_latency_us` asks about."""

MEMORY: Final = "memory.peak"
"""Measurement that `max_memory_bytes` asks about."""

MAX_CHECKS = 64
MAX_MEASUREMENTS = 64
MAX_TAGS = 32
MAX_TAG = 48
_UNITS: Mapping[str, Mapping[str, float]] = {
    LATENCY: {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6},
    MEMORY: {"bytes": 1.0, "KiB": 1024.0, "MiB": 1024.0**2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredKey:
    """A public key of an evaluation engine, as registered."""

    key_id: str
    """First 16 hexadecimal digits of the SHA-256 of the key."""

    public_key: bytes
    """32 raw bytes."""

    create_time: datetime
    """When it was registered."""

    revoked: bool
    """True: nothing that it ever signed may be loaded any more."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A verdict that was verified; made by `prove` only."""

    verdict: SignedVerdict
    """Exact bytes, signature, key."""

    statement: Statement
    """What the bytes say."""


def prove(
    verdict: SignedVerdict, claimed: Statement | None, *, kernel_id: str, keys: Iterable[RegisteredKey], by: Identity
) -> Proof:
    """Verify a verdict over a kernel.

    Args:
        verdict: statement, signature and key as received.
        claimed: the fields that came beside the statement; they must say the same. None when nothing came beside it.
        kernel_id: the kernel whose lease is being completed.
        keys: the keys registered by evaluation engines.
        by: who brings it.

    Raises:
        Forbidden: NOT_THE_EVALUATOR.
        InvalidInput: VERDICT_INVALID, with every reason.
    """
    check_evaluator(by)
    trust = TrustStore(PublicKey(key.public_key, key.revoked) for key in keys)
    reasons = trust.reasons_against(verdict)
    statement: Statement | None = None
    if not reasons:
        try:
            statement = Statement.from_bytes(verdict.statement)
        except InvalidInput as error:
            reasons = [error.public]
        else:
            reasons = list(_doubts(statement, claimed, kernel_id))
    if reasons or statement is None:
        raise InvalidInput(
            f"verdict over kernel {kernel_id}: expected one signed by a registered key, but {'; '.join(reasons)}",
            reason="VERDICT_INVALID",
            metadata={"kernel_id": kernel_id, "key_id": verdict.key_id[:64]},
        )
    return Proof(verdict, statement)


def check_evaluator(by: Identity) -> None:
    """Refuse a verdict from anyone but an evaluation engine.

    Raises:
        Forbidden: NOT_THE_EVALUATOR.
    """
    if by.role is not Role.URABRASK:
        raise Forbidden(
            "only the evaluation engine gives verdicts",
            reason="NOT_THE_EVALUATOR",
            private=f"caller is {by.role}/{by.subject}",
        )


def _doubts(statement: Statement, claimed: Statement | None, kernel_id: str) -> Iterable[str]:
    if statement.kernel_id != kernel_id:
        yield f"it is about kernel {str(statement.kernel_id)[:80]}"
    if claimed is not None and statement != claimed:
        yield "the fields beside the signed statement say something else"
    if statement.issued_at.tzinfo is None:
        yield "its time of issue has no time zone"
    if statement.passed and not (statement.checks and all(check.passed for check in statement.checks)):
        yield "it passes the kernel although a check failed or none was run"
    if len(statement.checks) > MAX_CHECKS or len(statement.measurements) > MAX_MEASUREMENTS:
        yield f"it has more than {MAX_CHECKS} checks or {MAX_MEASUREMENTS} measurements"
    if len(statement.tags) > MAX_TAGS or not all(_is_tag(tag) for tag in statement.tags):
        yield f"it has more than {MAX_TAGS} tags or one that is no text of at most {MAX_TAG} characters"


def _is_tag(tag: object) -> bool:
    return isinstance(tag, str) and len(tag) <= MAX_TAG


def figure(statement: Statement, name: str) -> float | None:
    """A measurement in the unit that queries use (microseconds, bytes); None when absent or in an unknown unit."""
    for measured in statement.measurements:
        scale = _UNITS[name].get(measured.unit)
        if measured.name == name and scale is not None:
            return float(measured.value) * scale
    return None


def check_key(key_id: str, public_key: bytes) -> None:
    """Refuse a key under a name that is not its own.

    Raises:
        InvalidInput: KEY_ID_MISMATCH.
    """
    own = key_id_of(public_key)
    if key_id != own:
        raise InvalidInput(
            f"signing key: expected key_id {own} (from its public key), found {key_id[:64]!r}",
            reason="KEY_ID_MISMATCH",
            metadata={"key_id": key_id[:64]},
        )
