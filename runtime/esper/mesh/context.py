"""What a handler knows about the call it serves: caller, request id, time left. All of it travels in contextvars.

The server sets these at the start of every RPC; channels read them to propagate deadline and request id; the logger
adds them to every record. Outside an RPC the caller is anonymous, the request id empty and the time unlimited.

Work that outlives the RPC that started it must not inherit its deadline: start it with `spawn`.
"""

import asyncio
import contextvars
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from structlog.contextvars import bound_contextvars

from esper.mesh.identity import ANONYMOUS, Identity

__all__ = [
    "bind",
    "current_identity",
    "current_method",
    "enter",
    "log_fields",
    "request_id",
    "scope",
    "set_identity",
    "spawn",
    "time_remaining",
]

_T = TypeVar("_T")

_identity: contextvars.ContextVar[Identity] = contextvars.ContextVar("esper_identity", default=ANONYMOUS)
_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("esper_request_id", default="")
_method: contextvars.ContextVar[str] = contextvars.ContextVar("esper_method", default="")
_deadline: contextvars.ContextVar[float | None] = contextvars.ContextVar("esper_deadline", default=None)

bind = bound_contextvars
"""Context manager that adds fields to every log record inside it: `with bind(run="digits-1"): ...`."""


def current_identity() -> Identity:
    """The caller of the RPC being served; `ANONYMOUS` outside one."""
    return _identity.get()


def request_id() -> str:
    """Identifier of the RPC being served, the same in every service that it passes through; empty outside one."""
    return _request_id.get()


def current_method() -> str:
    """Full name of the RPC being served (`/esper.v1.UrzaService/GetKernel`); empty outside one."""
    return _method.get()


def time_remaining() -> float | None:
    """Seconds until the caller's deadline, negative when it has passed; None without one (long streams, no RPC)."""
    deadline = _deadline.get()
    return None if deadline is None else deadline - time.monotonic()


def enter(*, method: str, request_id: str, remaining_s: float | None) -> None:
    """Set the context of the RPC whose task this is. For the server; everybody else uses `scope`.

    Nothing is reset afterwards: gRPC runs every RPC in a task, hence in a context, of its own.
    """
    _method.set(method)
    _request_id.set(request_id)
    _deadline.set(None if remaining_s is None else time.monotonic() + remaining_s)
    _identity.set(ANONYMOUS)


def set_identity(identity: Identity) -> None:
    """Record the authenticated caller of the RPC whose task this is. For the server."""
    _identity.set(identity)


@contextmanager
def scope(
    *, identity: Identity | None = None, request_id: str | None = None, timeout_s: float | None = None
) -> Iterator[None]:
    """Act as a caller, under a request id, with a time budget: for background work, scripts and tests.

    Values left out stay as they are. A budget can only shorten the one that is already running.
    """
    resets: list[tuple[contextvars.ContextVar[Any], contextvars.Token[Any]]] = []
    if identity is not None:
        resets.append((_identity, _identity.set(identity)))
    if request_id is not None:
        resets.append((_request_id, _request_id.set(request_id)))
    if timeout_s is not None:
        remaining = time_remaining()
        budget = timeout_s if remaining is None else min(timeout_s, remaining)
        resets.append((_deadline, _deadline.set(time.monotonic() + budget)))
    try:
        yield
    finally:
        for variable, token in reversed(resets):
            variable.reset(token)


def spawn(work: Coroutine[Any, Any, _T], *, name: str) -> asyncio.Task[_T]:
    """Start a background task in a fresh context: no caller, no deadline, no request id inherited.

    The caller of this function must keep the task and await or cancel it; asyncio holds tasks weakly.
    """
    return asyncio.create_task(work, name=name, context=contextvars.Context())


def log_fields() -> dict[str, str]:
    """The fields that every log record of an RPC carries; empty outside one."""
    identifier = _request_id.get()
    if not identifier:
        return {}
    fields = {"request_id": identifier}
    if method := _method.get():
        fields["rpc"] = method
    if (identity := _identity.get()) is not ANONYMOUS:
        fields["caller"] = f"{identity.role.value}/{identity.subject}"
    return fields
