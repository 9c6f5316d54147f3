"""What happens around every RPC: context, metrics (metrics.py), errors, identity, limits, validation, in this order."""

import asyncio
import re
import secrets
from collections.abc import Collection, Mapping
from typing import Any

import grpc
import protovalidate
from google.protobuf.message import Message

from esper.mesh import context as ambient
from esper.mesh.errors import (
    DeadlineMissed,
    EsperError,
    FieldViolation,
    Forbidden,
    InternalError,
    InvalidInput,
    LimitExceeded,
    Unauthenticated,
    Unavailable,
    from_rpc_error,
)
from esper.mesh.identity import ANONYMOUS, Identity, Role, TokenIssuer
from esper.mesh.interceptor import Hook, RpcCall, is_cancellation
from esper.mesh.logging import get_logger
from esper.mesh.service import is_long_stream

__all__ = ["AuthHook", "ContextHook", "ErrorsHook", "LimitsHook", "ValidationHook"]

_log = get_logger("esper.mesh.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_NO_DEADLINE_S = 10 * 365 * 86400.0
"""grpc reports "no deadline" as None or, through some proxies, as an absurdly distant one."""


class ContextHook(Hook):
    """Sets request id and deadline for everything below; a request id of the caller is kept when it is well-formed."""

    def start(self, call: RpcCall) -> None:
        """Enter the context of the call."""
        given = call.metadata.get("x-request-id", "")
        call.request_id = given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        remaining = call.context.time_remaining()
        if remaining is not None and remaining > _NO_DEADLINE_S:
            remaining = None
        call.notes["remaining_s"] = remaining
        ambient.enter(method=call.method, request_id=call.request_id, remaining_s=remaining)


class ErrorsHook(Hook):
    """Turns whatever ended the call into an `EsperError`, logs what an operator must see, and leaks nothing.

    Args:
        drain: set when the server drains.
    """

    def __init__(self, drain: asyncio.Event) -> None:
        self._drain = drain

    def end(self, call: RpcCall, error: BaseException | None) -> BaseException | None:  # noqa: PLR0911  # one return per kind
        """Map the error; the call's cancellation and gRPC's own abort pass untouched."""
        if error is None or _is_of_the_call(error):
            return error
        if isinstance(error, asyncio.CancelledError):
            # Of something that the handler waited for. gRPC would send no status, and the client would wait for ever.
            _log.error("call failed", exc_info=error)
            if self._drain.is_set():
                return Unavailable("the server is draining", reason="DRAINING")
            return self._internal(call)
        if isinstance(error, grpc.RpcError):
            return self._downstream(call, error)
        if isinstance(error, EsperError):
            if isinstance(error, InternalError):
                _log.error("call failed", exc_info=error)
                return self._internal(call, reason=error.reason)
            if error.private:
                _log.info("call refused", code=error.code.name, reason=error.reason, private=error.private)
            else:
                _log.debug("call refused", code=error.code.name, reason=error.reason, public=error.public)
            return error
        if isinstance(error, TimeoutError) and _is_overdue():
            return DeadlineMissed("the deadline passed before the work was done")
        _log.error("call failed", exc_info=error)
        if not isinstance(error, Exception):
            return error  # KeyboardInterrupt and the like end the process, not the call
        return self._internal(call)

    def _downstream(self, call: RpcCall, error: grpc.RpcError) -> EsperError:
        """What the failure of a call to another service means for ours, when the handler did not answer it itself."""
        failure = from_rpc_error(error)
        _log.error("call to another service failed", code=failure.code.name, exc_info=error)
        if isinstance(failure, DeadlineMissed):
            return DeadlineMissed("the deadline passed before the work was done")
        if isinstance(failure, Unavailable):
            return Unavailable("a service that this one needs is not available", reason="DEPENDENCY_UNAVAILABLE")
        # A refusal that nobody handled is a defect here, whatever the other service meant by it.
        return self._internal(call)

    @staticmethod
    def _internal(call: RpcCall, reason: str = "INTERNAL") -> InternalError:
        # The request id is all that a client needs to show to an operator, who finds the traceback under it.
        return InternalError("internal error", reason=reason, metadata={"request_id": call.request_id})


def _is_of_the_call(error: BaseException) -> bool:
    """Whether gRPC itself ended the call and needs no answer: it cancels the handler's task, or a handler aborted."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return is_cancellation(error) or isinstance(error, grpc.aio.AbortError)


def _is_overdue() -> bool:
    remaining = ambient.time_remaining()
    return remaining is not None and remaining <= 0


class AuthHook(Hook):
    """Finds out who calls, and whether the method's policy admits that role. Unlisted methods are refused.

    Args:
        policy: full method name -> roles.
        public: methods that need no identity at all (health, reflection).
        issuer: verifies tokens.
        anonymous_client: whether callers from this machine without a token count as clients; calls that came through
            a proxy never do, wherever the proxy runs.
    """

    def __init__(
        self,
        policy: Mapping[str, frozenset[Role]],
        *,
        public: Collection[str],
        issuer: TokenIssuer,
        anonymous_client: bool,
    ) -> None:
        self._policy = dict(policy)
        self._public = frozenset(public)
        self._issuer = issuer
        self._anonymous_client = anonymous_client

    def start(self, call: RpcCall) -> None:
        """Set the caller's identity, or refuse."""
        if call.method in self._public:
            return
        identity = self._identify(call)
        ambient.set_identity(identity)
        if not call.known:
            return  # the handler of unknown methods answers, with nothing but that
        roles = self._policy.get(call.method)
        if roles is not None and identity.role in roles:
            return
        if identity.role is Role.ANONYMOUS:
            raise Unauthenticated("a valid identity token is required")
        finding = "is in no policy" if roles is None else f"admits {sorted(roles)}"
        raise Forbidden("not allowed", private=f"{call.method} {finding}, caller is {identity.role}/{identity.subject}")

    def _identify(self, call: RpcCall) -> Identity:
        header = call.metadata.get("authorization")
        if header is not None:
            scheme, _, token = str(header).partition(" ")
            if scheme.lower() != "bearer" or not token:
                raise Unauthenticated("a valid identity token is required", private="authorization is no bearer token")
            return self._issuer.verify(token.strip())
        if self._anonymous_client and _is_local(call.context.peer()) and not _is_forwarded(call.metadata):
            return _LOCAL_CLIENT
        return ANONYMOUS


_LOCAL_CLIENT = Identity("local", Role.CLIENT)


def _is_local(peer: str) -> bool:
    return peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "ipv6:[::ffff:127.", "unix:"))


def _is_forwarded(metadata: Mapping[str, Any]) -> bool:
    """Whether a proxy says that it stands between: then the peer is the proxy, and the caller may be anybody."""
    return any(key in _PROXY_KEYS or key.startswith(_PROXY_PREFIXES) for key in metadata)


_PROXY_KEYS = frozenset({"forwarded", "via", "x-real-ip"})
_PROXY_PREFIXES = ("x-forwarded-", "x-envoy-")


class LimitsHook(Hook):
    """Bounds what runs at once, demands deadlines, and holds calls back from services that are not ready.

    Args:
        max_calls: calls with a natural end that run at once.
        max_streams: long streams open at once.
        require_deadline: refuse calls without a deadline, long streams and `exempt` excepted.
        long_streams: further methods that count as long streams.
        exempt: methods without a limit or a deadline (health: it must answer when nothing else does).
    """

    RETRY_AFTER_S = 0.25

    def __init__(
        self,
        *,
        max_calls: int,
        max_streams: int,
        require_deadline: bool,
        long_streams: Collection[str] = (),
        exempt: Collection[str] = (),
    ) -> None:
        self._limits = {False: max_calls, True: max_streams}
        self._open = {False: 0, True: 0}
        self._require_deadline = require_deadline
        self._long = frozenset(long_streams)
        self._exempt = frozenset(exempt)
        self._starting: set[str] = set()

    def hold(self, services: Collection[str]) -> None:
        """Answer calls to these gRPC services with UNAVAILABLE until `release`."""
        self._starting.update(services)

    def release(self, services: Collection[str]) -> None:
        """Let calls to these gRPC services through."""
        self._starting.difference_update(services)

    def start(self, call: RpcCall) -> None:
        """Admit the call, or refuse it."""
        if call.method in self._exempt or not call.known:
            return
        if self._starting and call.service in self._starting:
            raise Unavailable(
                f"{call.service} is starting", reason="SERVICE_STARTING", retry_after_s=self.RETRY_AFTER_S
            )
        long = call.shape != "unary_unary" and (is_long_stream(call.method) or call.method in self._long)
        remaining = call.notes.get("remaining_s")
        if remaining is None and self._require_deadline and not long:
            raise InvalidInput(
                f"{call.method} was called without a deadline: expected every call that has an end to set one",
                reason="DEADLINE_MISSING",
                metadata={"method": call.method},
            )
        if self._open[long] >= self._limits[long]:
            kind = "long streams" if long else "calls"
            raise LimitExceeded(
                f"the server is at its limit of {self._limits[long]} concurrent {kind}",
                reason="TOO_MANY_STREAMS" if long else "TOO_MANY_CALLS",
                metadata={"limit": str(self._limits[long])},
                retry_after_s=self.RETRY_AFTER_S,
            )
        self._open[long] += 1
        call.notes["limits"] = long

    def end(self, call: RpcCall, error: BaseException | None) -> BaseException | None:
        """Give the place back."""
        long = call.notes.get("limits")
        if long is not None:
            self._open[long] -= 1
        return error


class ValidationHook(Hook):
    """Checks each request message against the bounds written in its contract (protovalidate)."""

    def received(self, call: RpcCall, message: Any) -> None:
        """Refuse a message that breaks a rule.

        Raises:
            InvalidInput: with one violation per broken rule.
        """
        if not isinstance(message, Message):
            return
        violations = [_violation(v) for v in protovalidate.collect_violations(message)]
        if violations:
            first = violations[0]
            more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
            raise InvalidInput(
                f"{message.DESCRIPTOR.name}: {first.field or 'message'}: {first.description}{more}",
                reason="VALIDATION_FAILED",
                metadata={"method": call.method, "message": message.DESCRIPTOR.full_name},
                violations=violations,
            )


def _violation(violation: protovalidate.Violation) -> FieldViolation:
    proto = violation.proto
    return FieldViolation(_path(proto.field), proto.message or proto.rule_id, proto.rule_id)


def _path(field: Any) -> str:
    """Spell a field path as people write it: `kernel.shape[2]`, `labels["a"]`."""
    text = ""
    for element in () if field is None else field.elements:
        text += ("." if text else "") + element.field_name
        if element.subscript is not None:
            value = element.subscript.value
            text += f'["{value}"]' if isinstance(value, str) else f"[{value}]"
    return text
