"""The classes of the exception tree; `errors.py` draws it, and converts it to and from the wire."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import ClassVar

DOMAIN = "esper"
"""`ErrorInfo.domain` of every error that an Esper server raises."""

REASON = re.compile(r"[A-Z][A-Z0-9_]{1,62}")


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
        if not REASON.fullmatch(self.reason):
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
