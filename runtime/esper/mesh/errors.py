"""The one exception tree of Esper, and its one catalogue to gRPC status codes.

::

    EsperError                     (abstract: raise one of its children)
    ├── InvalidInput               INVALID_ARGUMENT     the request can never succeed as it stands
    ├── OutOfRange                 OUT_OF_RANGE         past the end of what exists now
    ├── NotFound                   NOT_FOUND            the named thing does not exist (or not for this caller)
    ├── AlreadyExists              ALREADY_EXISTS       another thing has this name
    ├── Conflict                   FAILED_PRECONDITION  the thing exists, but its state forbids the request
    ├── Stale                      ABORTED              lost a race: read again and retry the whole step
    ├── Forbidden                  PERMISSION_DENIED    known caller, not entitled
    ├── Unauthenticated            UNAUTHENTICATED      unknown caller
    ├── LimitExceeded              RESOURCE_EXHAUSTED   a quota, a queue or a disk is full
    ├── Unavailable                UNAVAILABLE          not now: the same call may be retried
    ├── DeadlineMissed             DEADLINE_EXCEEDED    the caller's time was up
    ├── Corrupt                    DATA_LOSS            stored or received bytes are not what was promised
    ├── Unsupported                UNIMPLEMENTED        this server cannot do that at all
    ├── Cancelled                  CANCELLED            the caller went away
    └── InternalError              INTERNAL             a defect of ours; its text never reaches a client

Raise a child with one public sentence that names the thing, the expectation and the finding::

    raise NotFound(
        f"no kernel {kernel_id}: expected one that ListKernels shows",
        reason="KERNEL_NOT_FOUND",
        metadata={"kernel_id": kernel_id},
    )

The server turns it into a `google.rpc.Status` with exactly one `ErrorInfo` (`to_status`); a client turns the
status back into the same class (`from_rpc_error`). This module imports neither grpc nor protobuf until one of these two
functions is called, so the pure core of a service may use it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import grpc
    from google.rpc.status_pb2 import Status

__all__ = [
    "CATALOGUE",
    "DOMAIN",
    "AlreadyExists",
    "Cancelled",
    "Code",
    "Conflict",
    "Corrupt",
    "DeadlineMissed",
    "EsperError",
    "FieldViolation",
    "Forbidden",
    "InternalError",
    "InvalidInput",
    "LimitExceeded",
    "NotFound",
    "OutOfRange",
    "Stale",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "error_class",
    "from_rpc_error",
    "from_status",
    "to_status",
]

DOMAIN = "esper"
"""`ErrorInfo.domain` of every error that an Esper server raises."""

INTERNAL_PUBLIC = "internal error"
"""The only text that a client sees of a defect of ours."""

# Limits of AIP-193, and of the 8 KiB that gRPC allows for trailing metadata by default: an error that does not fit
# there arrives as a bare RESOURCE_EXHAUSTED, so prose and lists are cut before they get that far.
_REASON = re.compile(r"[A-Z][A-Z0-9_]{1,62}")
_MAX_PUBLIC = 1024
_MAX_METADATA_VALUE = 256
_MAX_METADATA = 16
_MAX_VIOLATIONS = 12
_MAX_VIOLATION_TEXT = 160


class Code(IntEnum):
    """The canonical status codes (google.rpc.Code), numbered as on the wire."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that breaks one rule."""

    field: str
    """Path of the field in the request, for example `kernel.shape[2]`; empty for the message as a whole."""

    description: str
    """The expectation and the finding, as one sentence."""

    rule: str = ""
    """Identifier of the broken rule, for example `string.max_len`; may be empty."""


class EsperError(Exception):
    """Base of every error that Esper raises on purpose; raise one of its children.

    Args:
        public: one sentence for the caller. Never put a secret, a path of this machine or a traceback in it.
        reason: stable UPPER_SNAKE identifier that programs branch on; the class has a default.
        metadata: the dynamic values of the sentence, for programs. Keys are snake_case, values short.
        violations: fields of the request that break a rule (becomes `BadRequest`).
        retry_after_s: seconds after which the same call may succeed (becomes `RetryInfo`).
        private: text for the log only.

    Raises:
        ValueError: the reason is not UPPER_SNAKE of 2 to 63 characters.
    """

    code: ClassVar[Code] = Code.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        public: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] = MappingProxyType({}),
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
        private: str | None = None,
    ) -> None:
        super().__init__(public)
        self.public = public
        self.reason = self.default_reason if reason is None else reason
        if not _REASON.fullmatch(self.reason):
            raise ValueError(f"error reason must be UPPER_SNAKE of 2 to 63 characters, found {self.reason!r}")
        self.metadata: Mapping[str, str] = dict(metadata)
        self.violations: tuple[FieldViolation, ...] = tuple(violations)
        self.retry_after_s = retry_after_s
        self.private = private

    def __reduce__(self) -> "tuple[object, ...]":
        # Exceptions pickle by `args` alone; ours cross the border of worker processes with all they carry.
        keywords = {
            "reason": self.reason,
            "metadata": dict(self.metadata),
            "violations": self.violations,
            "retry_after_s": self.retry_after_s,
            "private": self.private,
        }
        return _rebuild, (type(self), self.public, keywords)


def _rebuild(kind: type[EsperError], public: str, keywords: dict[str, object]) -> EsperError:
    return kind(public, **keywords)  # type: ignore[arg-type]  # written by __reduce__ above


class InvalidInput(EsperError):
    """The request can never succeed as it stands."""

    code = Code.INVALID_ARGUMENT
    default_reason = "INVALID_INPUT"


class OutOfRange(EsperError):
    """A position past the end of what exists now."""

    code = Code.OUT_OF_RANGE
    default_reason = "OUT_OF_RANGE"


class NotFound(EsperError):
    """The named thing does not exist, or not for this caller."""

    code = Code.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(EsperError):
    """Another thing has this name."""

    code = Code.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class Conflict(EsperError):
    """The thing exists, but its state forbids the request."""

    code = Code.FAILED_PRECONDITION
    default_reason = "CONFLICT"


class Stale(EsperError):
    """The caller lost a race: read again and retry the whole step."""

    code = Code.ABORTED
    default_reason = "STALE"


class Forbidden(EsperError):
    """A known caller who is not entitled."""

    code = Code.PERMISSION_DENIED
    default_reason = "FORBIDDEN"


class Unauthenticated(EsperError):
    """An unknown caller."""

    code = Code.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class LimitExceeded(EsperError):
    """A quota, a queue or a disk is full."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = "LIMIT_EXCEEDED"


class Unavailable(EsperError):
    """Not now: the same call may be retried."""

    code = Code.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineMissed(EsperError):
    """The caller's time was up before the work was done."""

    code = Code.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_MISSED"


class Corrupt(EsperError):
    """Stored or received bytes are not what was promised."""

    code = Code.DATA_LOSS
    default_reason = "CORRUPT"


class Unsupported(EsperError):
    """This server cannot do that at all."""

    code = Code.UNIMPLEMENTED
    default_reason = "UNSUPPORTED"


class Cancelled(EsperError):
    """The caller went away, or asked for the work to end."""

    code = Code.CANCELLED
    default_reason = "CANCELLED"


class InternalError(EsperError):
    """A defect of ours. On the wire its text is "internal error"; what happened stands in the server's log."""

    code = Code.INTERNAL
    default_reason = "INTERNAL"


CATALOGUE: Mapping[Code, type[EsperError]] = MappingProxyType(
    {
        kind.code: kind
        for kind in (
            InvalidInput,
            OutOfRange,
            NotFound,
            AlreadyExists,
            Conflict,
            Stale,
            Forbidden,
            Unauthenticated,
            LimitExceeded,
            Unavailable,
            DeadlineMissed,
            Corrupt,
            Unsupported,
            Cancelled,
            InternalError,
        )
    }
)
"""Status code -> class, one to one. UNKNOWN is absent on purpose: no Esper server sends it."""


def error_class(code: int) -> type[EsperError]:
    """The class for a canonical status code; `InternalError` for UNKNOWN and for numbers that nobody defined."""
    try:
        return CATALOGUE.get(Code(code), InternalError)
    except ValueError:
        return InternalError


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def to_status(error: EsperError) -> "Status":
    """Render an error for the wire.

    Gives code, public sentence, exactly one `ErrorInfo`, and `BadRequest` and `RetryInfo` as fits. The text, metadata
    and private note of an `InternalError` stay here; long texts are cut to fit trailing metadata.
    """
    # Late: the pure core of a service imports this module and must not pull protobuf in.
    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
    from google.rpc.status_pb2 import Status

    internal = error.code in {Code.INTERNAL, Code.UNKNOWN}
    public = INTERNAL_PUBLIC if internal else _cut(error.public, _MAX_PUBLIC)
    metadata = dict(list(error.metadata.items())[:_MAX_METADATA])
    if internal:
        # The one value that helps the caller's operator: the log holds the traceback under it.
        metadata = {key: value for key, value in metadata.items() if key == "request_id"}
    info = ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata.update({key: _cut(str(value), _MAX_METADATA_VALUE) for key, value in metadata.items()})
    status = Status(code=int(Code.INTERNAL if internal else error.code), message=public)

    def attach(detail: "ErrorInfo | BadRequest | RetryInfo") -> None:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)

    attach(info)
    if error.violations and not internal:
        bad = BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad.field_violations.add(
                field=_cut(violation.field, _MAX_VIOLATION_TEXT),
                description=_cut(violation.description, _MAX_VIOLATION_TEXT),
                reason=_cut(violation.rule, _MAX_VIOLATION_TEXT),
            )
        attach(bad)
    if error.retry_after_s is not None:
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, int(error.retry_after_s * 1e9)))
        attach(retry)
    return status


def from_status(status: "Status") -> EsperError:
    """Read a `google.rpc.Status` back into the error that it was made of."""
    from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

    kind = error_class(status.code)
    reason = kind.default_reason
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            # Another domain's reasons (a proxy's, say) must not be taken for ours.
            if info.domain == DOMAIN and _REASON.fullmatch(info.reason):
                reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations = [FieldViolation(v.field, v.description, v.reason) for v in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return kind(status.message, reason=reason, metadata=metadata, violations=violations, retry_after_s=retry_after_s)


def from_rpc_error(error: "grpc.RpcError") -> EsperError:
    """Turn what a stub raised, sync or aio, into the same tree that servers raise.

    An error without our details (connection refused, a deadline that the client itself measured, a foreign server)
    keeps its code and text and gets the default reason of its class.
    """
    from google.rpc.status_pb2 import Status
    from grpc import Call
    from grpc.aio import AioRpcError

    if not isinstance(error, (Call, AioRpcError)):
        return InternalError(f"the call failed without a status: {error!r}")
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            raw = value if isinstance(value, bytes) else value.encode("latin-1")
            return from_status(Status.FromString(raw))
    kind = error_class(error.code().value[0])
    details = error.details() or f"the call failed with {error.code().name} and no text"
    if kind is LimitExceeded and "message larger than max" in details:
        # Beyond the hard limit gRPC itself answers, before our hooks see the call.
        return kind(details, reason="MESSAGE_TOO_LARGE")
    return kind(details)
