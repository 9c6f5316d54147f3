"""Signed verdicts over kernels: who says that a kernel may run, and how the runtime believes it. Torch-free.

The gauntlet states what it found and signs the exact bytes of that statement with Ed25519; the runtime verifies those
bytes against the public keys that it trusts, and then reads them::

    key = SigningKey.generate()
    verdict = key.sign(Statement(kernel_id=..., passed=True, ...))
    TrustStore([key.public]).verify(verdict, kernel_id)   # -> the statement, or KernelUntrusted with every reason
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from esper.kasmina.kernels.rejection import KernelUntrusted
from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CheckResult", "Figure", "PublicKey", "SignedVerdict", "SigningKey", "Statement", "TrustStore", "key_id_of"]

_TYPE = "esper.v1.Verdict"
MAX_STATEMENT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of one test of the gauntlet."""

    name: str
    """Like ``numerics.gradients``."""
    passed: bool
    finding: str
    """What was found and what was expected, one sentence."""
    elapsed_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """Something measured on the machine of the gauntlet."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What is signed: the judgement over one kernel, with what it rests on."""

    kernel_id: str
    passed: bool
    """True: VALIDATED, the kernel may run. False: REJECTED."""
    checks: tuple[CheckResult, ...] = ()
    measurements: tuple[Figure, ...] = ()
    tags: tuple[str, ...] = ()
    target: str
    """Machine of the evaluation."""
    gauntlet_version: str
    issued_at: datetime
    """UTC."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII; the bytes that are signed."""
        document = asdict(self) | {"type": _TYPE, "issued_at": self.issued_at.astimezone(UTC).isoformat()}
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Statement:
        """Read what `to_bytes` wrote.

        Raises:
            InvalidInput: the bytes are no statement.
        """
        try:
            document: dict[str, Any] = json.loads(data) if len(data) <= MAX_STATEMENT_BYTES else {}
            if document.pop("type", None) != _TYPE or not isinstance(document["passed"], bool):
                raise InvalidInput(f"verdict statement: expected one of type {_TYPE} of at most 256 KiB")
            return cls(
                kernel_id=str(document.pop("kernel_id")),
                passed=document.pop("passed"),
                checks=tuple(CheckResult(**entry) for entry in document.pop("checks")),
                measurements=tuple(Figure(**entry) for entry in document.pop("measurements")),
                tags=tuple(document.pop("tags")),
                issued_at=datetime.fromisoformat(document.pop("issued_at")),
                **document,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(
                f"verdict statement: expected canonical JSON of a verdict, found {error!r:.120}"
            ) from error


@dataclass(frozen=True, slots=True)
class SignedVerdict:
    """A statement's exact bytes, the signature over them, and which key made it."""

    statement: bytes
    signature: bytes
    """Ed25519, 64 bytes."""
    key_id: str


def key_id_of(public_key: bytes) -> str:
    """Name of a key: the first 16 hexadecimal digits of the SHA-256 of its 32 raw bytes."""
    return hashlib.sha256(public_key).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that may be trusted."""

    raw: bytes
    """32 bytes."""
    revoked: bool = False
    """True: nothing that it ever signed may be loaded any more."""

    @property
    def key_id(self) -> str:
        """See `key_id_of`."""
        return key_id_of(self.raw)


@dataclass(frozen=True)
class SigningKey:
    """The gauntlet's private key; never printed."""

    _key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> SigningKey:
        """A fresh key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> SigningKey:
        """Read the 32 bytes that `to_bytes` wrote.

        Raises:
            InvalidInput: not 32 bytes.
        """
        if len(raw) != 32:
            raise InvalidInput(f"signing key: expected 32 bytes, found {len(raw)}")
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    def to_bytes(self) -> bytes:
        """The 32 raw bytes of the private key, for a file that only its owner can read."""
        return self._key.private_bytes_raw()

    @property
    def public(self) -> PublicKey:
        """What verifies its signatures."""
        return PublicKey(self._key.public_key().public_bytes_raw())

    def sign(self, statement: Statement) -> SignedVerdict:
        """Sign the canonical bytes of a statement."""
        data = statement.to_bytes()
        return SignedVerdict(data, self._key.sign(data), self.public.key_id)


class TrustStore:
    """The public keys whose verdicts this process believes. Immutable, so it may be shared between threads.

    Args:
        keys: trusted and revoked ones; a key given twice counts as revoked when either says so.
    """

    def __init__(self, keys: Iterable[PublicKey] = ()) -> None:
        self._keys: dict[str, PublicKey] = {}
        for key in keys:
            before = self._keys.get(key.key_id)
            self._keys[key.key_id] = key if before is None else PublicKey(key.raw, key.revoked or before.revoked)

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """Every key known, the revoked ones included."""
        return tuple(self._keys.values())

    def reasons_against(self, verdict: SignedVerdict) -> list[str]:
        """Why the signature of a verdict cannot be believed; empty when it can."""
        key = self._keys.get(verdict.key_id)
        if key is None:
            return [f"the verdict is signed by key {verdict.key_id!r:.40}, which is not trusted here"]
        if key.revoked:
            return [f"the verdict is signed by key {verdict.key_id}, which was revoked"]
        try:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(verdict.signature, verdict.statement)
        except (InvalidSignature, ValueError):
            return [f"the signature by key {verdict.key_id} does not fit the statement"]
        return []

    def verify(self, verdict: SignedVerdict | None, kernel_id: str) -> Statement:
        """The statement of a verdict that validates a kernel.

        Raises:
            KernelUntrusted: there is no verdict, it is not believed, is about another kernel, or rejects this one.
        """
        if verdict is None:
            raise KernelUntrusted(kernel_id, ["it carries no signed verdict"])
        if reasons := self.reasons_against(verdict):
            raise KernelUntrusted(kernel_id, reasons)
        try:
            statement = Statement.from_bytes(verdict.statement)
        except InvalidInput as error:
            raise KernelUntrusted(kernel_id, [error.public]) from error
        if statement.kernel_id != kernel_id:
            reasons.append(f"the verdict is about kernel {statement.kernel_id:.80}")
        if not statement.passed:
            failed = ", ".join(check.name for check in statement.checks if not check.passed) or "no check named"
            reasons.append(f"the verdict rejects it ({failed})")
        if reasons:
            raise KernelUntrusted(kernel_id, reasons)
        return statement
