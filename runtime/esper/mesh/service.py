"""The floor plan that every service follows, and what a service is given to stand on.

`services/esper/<name>/service.py` holds `class Config(Section)` and
`async def build(config: Config, context: ServiceContext) -> Service`. A policy is written with `allow`::

    policy = allow("esper.v1.UrzaService", {
        "GetKernel": ANYONE_KNOWN,
        "CompleteWork": {Role.TEZZERET, Role.URABRASK},
    })

A method that no policy lists is refused, whoever calls.
"""

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio

from esper.mesh.errors import InternalError
from esper.mesh.identity import Role, TokenIssuer

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

__all__ = ["ANYONE_KNOWN", "Service", "ServiceContext", "allow", "is_long_stream", "utc_now"]

ANYONE_KNOWN: frozenset[Role] = frozenset(Role) - {Role.ANONYMOUS}
"""Every role that stands for an authenticated caller."""

_LONG_STREAM = re.compile(r"/(?:Publish|Subscribe|Advise|Watch\w*|Tail\w*|ServerReflectionInfo)$")


def is_long_stream(method: str) -> bool:
    """Whether a full method name says that its stream has no natural end, and so needs no deadline.

    These are `Publish`, `Subscribe`, `Advise`, `Watch*`, `Tail*` and reflection. Servers (deadline required or not)
    and channels (default deadline or not) share this one rule; a service adds exceptions in `Service.long_streams`.
    """
    return _LONG_STREAM.search(method) is not None


def utc_now() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.now(UTC)


def _no_address(name: str) -> str:
    raise InternalError(f"the address of {name} is not known in this context", reason="ADDRESS_UNKNOWN")


@dataclass(frozen=True, kw_only=True)
class ServiceContext:
    """What `build()` receives besides its configuration: run-time objects only."""

    name: str
    """Name of the service being built: `urza`."""

    data_dir: Path
    """Directory of this service's own files; exists and is private to it."""

    channel: Callable[[str], grpc.aio.Channel]
    """Service name -> shared channel that carries this service's own identity. The mesh closes it."""

    address: Callable[[str], str] = _no_address
    """Service name -> `host:port` where other processes (a training process, say) reach it; known once the server
    listens, so ask in `start` or later."""

    issuer: TokenIssuer | None = None
    """Signs tokens for processes that a service starts; None where they call as clients of this machine."""

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once, when the server drains: every long stream and background loop then ends by itself."""

    clock: Callable[[], datetime] = utc_now
    """Aware UTC time; tests replace it."""


class Service(ABC):
    """One service of the mesh: its RPCs, who may call them, and its life.

    Order of life: `register` (before the server listens), `start` (the server listens, but calls are answered with
    UNAVAILABLE until it returns), `drain` (the drain event is set; long streams are ending), `close` (no call is left).
    """

    name: str
    """Short name: `urza`."""

    grpc_service_names: tuple[str, ...]
    """Full names of the gRPC services that it answers: `("esper.v1.UrzaService",)`."""

    policy: Mapping[str, frozenset[Role]]
    """Full method name -> roles that may call it. A method that is missing here is refused."""

    collectors: "Sequence[Collector]" = ()
    """What the server adds to its metrics page: numbers of this service's own, read when Prometheus asks."""

    long_streams: frozenset[str] = frozenset()
    """Full names of further methods that may be called without a deadline, beside those of `is_long_stream`."""

    @abstractmethod
    def register(self, server: grpc.aio.Server) -> None:
        """Add the generated handlers to a server that does not listen yet."""

    async def start(self) -> None:  # noqa: B027  # optional step: the default has nothing to start
        """Open stores and start background tasks. Other services may not be ready yet: loops retry by themselves."""

    async def drain(self) -> None:  # noqa: B027  # optional step: the default has nothing to hand back
        """Stop taking on work, hand back what can be handed back. The drain event is set already."""

    async def close(self) -> None:  # noqa: B027  # optional step: the default holds nothing
        """Release everything; after it the process may exit. Must not fail when `start` did not finish."""


def allow(service_name: str, methods: Mapping[str, Collection[Role]]) -> dict[str, frozenset[Role]]:
    """Write a policy: short method names of one gRPC service -> roles.

    Raises:
        ValueError: a method without any role; leave it out to refuse it.
    """
    for method, roles in methods.items():
        if not roles:
            raise ValueError(
                f"policy of {service_name}/{method} names no role: leave the method out to refuse everyone"
            )
    return {f"/{service_name}/{method}": frozenset(roles) for method, roles in methods.items()}
