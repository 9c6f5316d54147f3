"""The one factory of servers: health, reflection, hooks around every RPC, a drain that loses nothing.

Typical use::

    server = MeshServer(settings, [oona, urza], auth=auth, issuer=issuer, drain=drain)
    port = await server.start()
    ...
    await server.stop()          # drain, then close

The drain (`stop`): health says NOT_SERVING; one health interval, so that balancers look elsewhere; the drain event, on
which every long stream ends by itself; the services' own `drain`; running calls get the grace; then the services close.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any, Self, cast

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer
from prometheus_client import CollectorRegistry

from esper.mesh.hooks import AuthHook, ContextHook, ErrorsHook, LimitsHook, ValidationHook
from esper.mesh.identity import TokenIssuer
from esper.mesh.interceptor import Adapter, Hook
from esper.mesh.logging import get_logger
from esper.mesh.metrics import MetricsHook, MetricsPage
from esper.mesh.service import Service
from esper.mesh.settings import AuthSettings, ServerSettings, check_exposure
from esper.mesh.streams import race_drain, until_drain

__all__ = ["MeshServer"]

_log = get_logger(__name__)

_HEALTH = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch")
_REFLECTION = (
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
)


class MeshServer:
    """One gRPC server for one or more services.

    Args:
        settings: where to listen, limits, drain.
        services: registered, started and closed by this server, started in this order and closed in reverse.
        auth: identity settings; they must not admit strangers where other machines can reach the server.
        issuer: verifies the callers' tokens.
        drain: the event that the services' contexts hold; a new one when no service needs it.
        registry: metrics are registered here; a new registry by default.
        extra_hooks: run innermost, after validation was set up; for tests and embedding.

    Raises:
        ValueError: non-loopback bind with anonymous access; two services of one name or one gRPC service name.
    """

    def __init__(
        self,
        settings: ServerSettings,
        services: Sequence[Service],
        *,
        issuer: TokenIssuer,
        auth: AuthSettings | None = None,
        drain: asyncio.Event | None = None,
        registry: CollectorRegistry | None = None,
        extra_hooks: Sequence[Hook] = (),
    ) -> None:
        auth = AuthSettings() if auth is None else auth
        check_exposure(settings, auth)
        _check_names(services)
        self._settings = settings
        self._services = tuple(services)
        self.drain_event = asyncio.Event() if drain is None else drain
        self.registry = CollectorRegistry() if registry is None else registry
        self.port = 0
        self.metrics_port: int | None = None
        for collector in (collector for service in services for collector in service.collectors):
            self.registry.register(collector)
        self._limits = LimitsHook(
            max_calls=settings.max_concurrent_calls,
            max_streams=settings.max_long_streams,
            require_deadline=settings.require_deadline,
            long_streams=frozenset().union(*(s.long_streams for s in services)),
            exempt=_HEALTH,
        )
        self._hooks: tuple[Hook, ...] = (
            ContextHook(),
            MetricsHook(self.registry),
            ErrorsHook(self.drain_event),
            AuthHook(
                {method: roles for service in services for method, roles in service.policy.items()},
                public=(*_HEALTH, *_REFLECTION),
                issuer=issuer,
                anonymous_client=auth.anonymous_role == "client",
            ),
            self._limits,
            ValidationHook(),
            *extra_hooks,
        )
        self._health = _Health(self.drain_event)
        self._server: grpc.aio.Server | None = None
        self._page: MetricsPage | None = None
        self._started: list[Service] = []
        self._stopping: asyncio.Task[None] | None = None

    @property
    def target(self) -> str:
        """Address for clients on this machine, once started: `127.0.0.1:7600`."""
        host = self._settings.host
        if host.startswith("unix:"):
            return host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}.get(host, host)  # noqa: S104  # not a bind
        return f"[{host}]:{self.port}" if ":" in host and not host.startswith("[") else f"{host}:{self.port}"

    async def start(self) -> int:
        """Listen, start the services in order, report SERVING; return the bound port.

        Raises:
            OSError: the address cannot be bound.
        """
        if self._server is not None:
            raise RuntimeError("a MeshServer starts once: make a new one")
        options = self._settings.options
        adapter = Adapter(self._hooks, max_message_bytes=options.max_message_bytes)
        server = grpc.aio.server(interceptors=[adapter], options=options.render())
        self._server = server
        names = [name for service in self._services for name in service.grpc_service_names]
        try:
            for service in self._services:
                service.register(server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            if self._settings.reflection:
                self._add_reflection(server, names)
            self._limits.hold(names)
            await self._report(["", *names], health_pb2.HealthCheckResponse.NOT_SERVING)
            self.port = self._bind(server)
            if self._settings.metrics_port is not None:
                self._page = MetricsPage(self.registry, self._settings.host, self._settings.metrics_port)
                self.metrics_port = self._page.port
            await server.start()
            for service in self._services:
                self._started.append(service)
                await service.start()
                self._limits.release(service.grpc_service_names)
                await self._report(service.grpc_service_names, health_pb2.HealthCheckResponse.SERVING)
            await self._report([""], health_pb2.HealthCheckResponse.SERVING)
        except BaseException:
            self.drain_event.set()
            await self._close(grace_s=0)
            raise
        _log.info("server ready", address=f"{self._settings.host}:{self.port}", services=names)
        return self.port

    async def stop(self, *, grace_s: float | None = None) -> None:
        """Drain, then close everything. May be called more than once; every caller waits for the one drain.

        Args:
            grace_s: seconds for running calls; default `settings.drain_grace_s`.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace_s))
        # A caller that gives up must not leave a half-drained server behind.
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float | None) -> None:
        if self._server is None:
            return
        _log.info("server draining", address=f"{self._settings.host}:{self.port}")
        await self._health.enter_graceful_shutdown()
        if not self.drain_event.is_set():
            await asyncio.sleep(self._settings.health_interval_s)
        self.drain_event.set()
        await asyncio.gather(*(_guarded(service, "drain") for service in self._started))
        await self._close(self._settings.drain_grace_s if grace_s is None else grace_s)
        _log.info("server stopped", address=f"{self._settings.host}:{self.port}")

    async def wait(self) -> None:
        """Return when the server has stopped."""
        if self._server is not None:
            await self._server.wait_for_termination()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    async def _close(self, grace_s: float) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)
        for service in reversed(self._started):
            await _guarded(service, "close")
        self._started.clear()
        if self._page is not None:
            page, self._page = self._page, None
            await asyncio.to_thread(page.close)

    def _bind(self, server: grpc.aio.Server) -> int:
        host = self._settings.host
        address = f"[{host}]" if ":" in host and not host.startswith(("[", "unix:")) else host
        if not host.startswith("unix:"):
            address = f"{address}:{self._settings.port}"
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: expected a free, local address ({error})") from error
        if port == 0:
            raise OSError(f"cannot listen on {address}: expected a free, local address")
        return port

    def _add_reflection(self, server: grpc.aio.Server, names: Sequence[str]) -> None:
        shown = [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        servicer = _Reflection(shown, drain=self.drain_event)
        cast("Any", reflection_pb2_grpc).add_ServerReflectionServicer_to_server(servicer, server)

    async def _report(self, names: Sequence[str], status: Any) -> None:
        for name in names:
            await self._health.set(name, status)


class _Health(health_aio.HealthServicer):
    """grpc's own health service, whose Watch otherwise holds a stopping server for the whole grace."""

    def __init__(self, drain: asyncio.Event) -> None:
        super().__init__()
        self._drain = drain

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802  # the contract's name
        await until_drain(cast("Any", super()).Watch(request, context), self._drain)


class _Reflection(ReflectionServicer):
    """grpc's own reflection, ending open streams at the drain."""

    def __init__(self, names: Sequence[str], *, drain: asyncio.Event) -> None:
        super().__init__(names)
        self._drain = drain

    async def ServerReflectionInfo(  # type: ignore[override]  # noqa: N802  # the stub takes the generator for a coroutine
        self, request_iterator: AsyncIterable[Any], context: Any
    ) -> AsyncIterator[Any]:
        requests = race_drain(request_iterator, self._drain)
        async with contextlib.aclosing(requests):
            async for answer in cast("Any", super()).ServerReflectionInfo(requests, context):
                yield answer


async def _guarded(service: Service, step: str) -> None:
    """One service that fails to let go must not keep the others from it."""
    try:
        await getattr(service, step)()
    except Exception:  # noqa: BLE001  # logged with its traceback; the process is on its way out
        _log.exception("service did not end cleanly", service=service.name, step=step)


def _check_names(services: Sequence[Service]) -> None:
    seen: dict[str, str] = {}
    for service in services:
        for name in (service.name, *service.grpc_service_names):
            if name in seen:
                raise ValueError(f"{name} is offered by both {seen[name]} and {service.name}: names must be unique")
            seen[name] = service.name
        for method in service.policy:
            if method[1:].rpartition("/")[0] not in service.grpc_service_names:
                raise ValueError(
                    f"policy of service {service.name} lists {method}, which is no method of "
                    f"{list(service.grpc_service_names)}"
                )
