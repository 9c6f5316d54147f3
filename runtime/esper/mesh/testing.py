"""Real servers for tests: port 0, everything that production has, up in milliseconds.

::

    async with serve(await build(Config(), service_context("urza", tmp_path))) as (server, channel):
        stub = UrzaServiceStub(channel)

The channel calls as a client of this machine; `channel_as(server, Role.TEZZERET)` calls as somebody else.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import grpc.aio

from esper.mesh.channel import open_channel
from esper.mesh.identity import Identity, Role, TokenIssuer
from esper.mesh.server import MeshServer
from esper.mesh.service import Service, ServiceContext, utc_now
from esper.mesh.settings import AuthSettings, ServerSettings

__all__ = ["TEST_SETTINGS", "channel_as", "issuer", "serve", "service_context", "settings_with", "token_for"]

TEST_SETTINGS = ServerSettings(port=0, health_interval_s=0.0, drain_grace_s=2.0)
"""Loopback, any port, no wait for balancers that do not exist."""

issuer = TokenIssuer("a secret of tests, known to everybody: 0123456789")
"""Signs the tokens of `token_for`; the servers of `serve` trust it."""


def token_for(role: Role, subject: str = "test") -> str:
    """A valid identity token for a role."""
    return issuer.issue(Identity(subject, role))


def service_context(
    name: str,
    data_dir: Path,
    *,
    channel: Callable[[str], grpc.aio.Channel] | None = None,
    address: Callable[[str], str] | None = None,
    drain: asyncio.Event | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> ServiceContext:
    """A context to build a service with. Without `channel` the service must not call others; doing so is an error."""

    def refuse(other: str) -> grpc.aio.Channel:
        raise AssertionError(f"{name} opened a channel to {other}, but its test gave it none")

    def no_address(other: str) -> str:
        raise AssertionError(f"{name} asked for the address of {other}, but its test gave it none")

    data_dir.mkdir(parents=True, exist_ok=True)
    return ServiceContext(
        name=name,
        data_dir=data_dir,
        channel=refuse if channel is None else channel,
        address=no_address if address is None else address,
        drain=asyncio.Event() if drain is None else drain,
        clock=clock,
    )


@asynccontextmanager
async def serve(
    *services: Service,
    settings: ServerSettings = TEST_SETTINGS,
    auth: AuthSettings | None = None,
    drain: asyncio.Event | None = None,
    role: Role | None = None,
) -> AsyncIterator[tuple[MeshServer, grpc.aio.Channel]]:
    """Serve services on a port of the system's choice; give the started server and a channel to it.

    Args:
        services: built services, started here and closed at the end.
        settings: server settings; keep port 0.
        auth: identity settings; callers of this machine are clients by default.
        drain: the event that was given to the services' contexts, so that their long streams end.
        role: role that the channel calls as; without one it sends no token.
    """
    server = MeshServer(settings, services, auth=auth, issuer=issuer, drain=drain)
    await server.start()
    channel = open_channel(server.target, token=None if role is None else token_for(role))
    try:
        yield server, channel
    finally:
        await channel.close()
        await server.stop()


@asynccontextmanager
async def channel_as(server: MeshServer, role: Role, subject: str = "test") -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a test server that calls as a role."""
    channel = open_channel(server.target, token=token_for(role, subject))
    try:
        yield channel
    finally:
        await channel.close()


def settings_with(**changes: object) -> ServerSettings:
    """`TEST_SETTINGS` with some values changed and checked."""
    return ServerSettings.model_validate({**TEST_SETTINGS.model_dump(), **changes})
