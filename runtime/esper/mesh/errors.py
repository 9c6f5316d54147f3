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

from typing import TYPE_CHECKING

from esper.mesh._errors import (
    CATALOGUE,
    DOMAIN,
    REASON,
    AlreadyExists,
    Cancelled,
    Code,
    Conflict,
    Corrupt,
    DeadlineMissed,
    EsperError,
    FieldViolation,
    Forbidden,
    InternalError,
    InvalidInput,
    LimitExceeded,
    NotFound,
    OutOfRange,
    Stale,
    Unauthenticated,
    Unavailable,
    Unsupported,
    error_class,
)

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

INTERNAL_PUBLIC = "internal error"
"""The only text that a client sees of a defect of ours."""

# Budgets in bytes of UTF-8. gRPC takes 8 KiB of trailing metadata by default, and a status stands there twice: as text
# and, in base64, as details. One that does not fit arrives as a bare RESOURCE_EXHAUSTED, so prose and lists are cut.
_MAX_PUBLIC = 1024
_MAX_VALUE = 256
_MAX_METADATA = 1024
_MAX_VIOLATIONS = 2048


def _cut(text: str, limit: int) -> str:
    """Shorten a text to at most `limit` bytes of UTF-8, marking the cut."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return raw.decode()
    return raw[: limit - 3].decode("utf-8", "ignore") + "…"


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
    metadata = dict(error.metadata)
    if internal:
        # The one value that helps the caller's operator: the log holds the traceback under it.
        metadata = {key: value for key, value in metadata.items() if key == "request_id"}
    info = ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in metadata.items():
        text = _cut(str(value), _MAX_VALUE)
        if info.ByteSize() > _MAX_METADATA:
            break
        info.metadata[_cut(str(key), 64)] = text
    status = Status(code=int(Code.INTERNAL if internal else error.code), message=public)

    def attach(detail: "ErrorInfo | BadRequest | RetryInfo") -> None:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)

    attach(info)
    if error.violations and not internal:
        bad = BadRequest()
        for violation in error.violations:
            bad.field_violations.add(
                field=_cut(violation.field, _MAX_VALUE),
                description=_cut(violation.description, _MAX_VALUE),
                reason=_cut(violation.rule, _MAX_VALUE),
            )
            if bad.ByteSize() > _MAX_VIOLATIONS:
                break
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
            if info.domain == DOMAIN and REASON.fullmatch(info.reason):
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
