"""Puts services together into one process: all of them (`esper up`) or one alone (`esper serve NAME`).

A service never knows where the others run: it asks its context for a channel by name, and this module decides whether
that leads back into the same process or to another address.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from esper.cli.drift import snapshot
from esper.cli.lock import HomeLock
from esper.cli.roster import SERVICES
from esper.cli.settings import Settings, build_service
from esper.mesh.channel import ChannelPool
from esper.mesh.errors import Unavailable
from esper.mesh.identity import Identity, Role, TokenIssuer, load_or_create_secret
from esper.mesh.logging import configure, get_logger, shutdown
from esper.mesh.server import MeshServer
from esper.mesh.service import Service, ServiceContext
from esper.mesh.settings import Loaded

__all__ = ["EmbeddedMesh", "run"]

_log = get_logger(__name__)


class EmbeddedMesh:
    """Some services behind one server over one home directory.

    Args:
        settings: configuration of the process.
        names: services to run here.
        registry: where metrics are registered; a new registry by default.
    """

    def __init__(
        self, settings: Settings, names: Sequence[str] = SERVICES, *, registry: CollectorRegistry | None = None
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._names = tuple(names)
        self._pools: list[ChannelPool] = []
        self._server: MeshServer | None = None

    @property
    def address(self) -> str:
        """`host:port` for clients on this machine, once started."""
        if self._server is None or self._server.port == 0:
            raise Unavailable("the mesh does not listen yet", reason="MESH_NOT_READY")
        return self._server.target

    def _resolve(self, name: str) -> str:
        if name in self._names:
            return self.address
        target = self._settings.addresses.get(name) or self._settings.mesh
        if not target:
            raise Unavailable(
                f"no address of {name}: expected addresses.{name} or mesh in the configuration",
                reason="ADDRESS_UNKNOWN",
            )
        return target

    async def start(self) -> str:
        """Build and start everything; returns the address."""
        settings = self._settings
        home = settings.home.absolute()
        secret = settings.auth.secret or load_or_create_secret(home)
        issuer = TokenIssuer(secret, ttl_s=settings.auth.token_ttl_s)
        drain = asyncio.Event()
        services = [await self._build(name, home, issuer, drain) for name in self._names]
        self._server = MeshServer(
            settings.server, services, auth=settings.auth, issuer=issuer, drain=drain, registry=self._registry
        )
        await self._server.start()
        return self.address

    async def _build(self, name: str, home: Path, issuer: TokenIssuer, drain: asyncio.Event) -> Service:
        token = issuer.source(Identity(name, Role(name)))
        pool = ChannelPool(self._resolve, token=token, options=self._settings.channel)
        self._pools.append(pool)
        folder = home / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        context = ServiceContext(
            name=name, data_dir=folder, channel=pool.get, address=self._resolve, issuer=issuer, drain=drain
        )
        return await build_service(name, self._settings, context)

    async def stop(self) -> None:
        """Drain and close everything; idempotent."""
        if self._server is not None:
            await self._server.stop()
        for pool in self._pools:
            await pool.close()
        self._pools.clear()


def run(
    loaded: Loaded[Settings],
    names: Sequence[str] = SERVICES,
    *,
    ready: Callable[[str], None],
    attached: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Args:
        loaded: configuration of the process, and where it came from.
        names: services to run here.
        ready: called once with the address when every service answers.
        attached: stop also when standard input ends, as it does when the process that started this one is gone.

    Raises:
        Conflict: HOME_IN_USE.
        OSError: the address cannot be bound.
    """
    settings = loaded.value
    lock = HomeLock(settings.home.absolute(), "" if tuple(names) == SERVICES else "-".join(names))
    configure(settings.logging)

    def announce(address: str) -> None:
        lock.announce(address, loaded.digest or "", snapshot(loaded))
        ready(address)

    try:
        with _runner() as runner:
            runner.run(_serve(settings, names, announce, attached=attached))
    finally:
        lock.release()
        shutdown()


def _runner() -> asyncio.Runner:
    if os.name == "nt":  # pragma: no cover  # uvloop is not offered there
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def _process_metrics() -> CollectorRegistry:
    """A registry with what prometheus_client knows of this process: memory, file descriptors, garbage collection."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


async def _serve(
    settings: Settings, names: Sequence[str], ready: Callable[[str], None], *, attached: bool = False
) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    if attached:
        loop.add_reader(sys.stdin.fileno(), stopping.set)  # nobody writes there: readable means ended
    mesh = EmbeddedMesh(settings, names, registry=_process_metrics())
    try:
        starting = asyncio.ensure_future(mesh.start())
        interrupted = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({starting, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        address = await starting
        ready(address)
        await interrupted
        _log.info("stopping", address=address)
    finally:
        await mesh.stop()
