"""How a command reaches the mesh: a named address, the one that runs on the home directory, or one of its own.

Typical use::

    with connect(state) as mesh:
        run = mesh.tolaria.GetRun(request, timeout=mesh.timeout).run
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esper.cli.lock import find_running
from esper.cli.state import State
from esper.mesh.errors import Unavailable
from esper.v1.oona_service_pb2_grpc import OonaServiceStub
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from esper.v1.tezzeret_service_pb2_grpc import TezzeretServiceStub
from esper.v1.tolaria_service_pb2_grpc import TolariaServiceStub
from esper.v1.urabrask_service_pb2_grpc import UrabraskServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

if TYPE_CHECKING:
    from esper.cli.command_settings import CommandSettings

__all__ = ["Mesh", "connect"]

_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 30.0


@dataclass
class Mesh:
    """Stubs of every service at one address."""

    address: str
    channel: grpc.Channel
    timeout: float = 30.0
    """Deadline of a unary call of a command, in seconds."""
    own: bool = False
    """Whether the command started it, and takes it along when it ends."""

    @cached_property
    def oona(self) -> OonaServiceStub:
        """Message bus."""
        return OonaServiceStub(self.channel)

    @cached_property
    def urza(self) -> UrzaServiceStub:
        """Library."""
        return UrzaServiceStub(self.channel)

    @cached_property
    def tezzeret(self) -> TezzeretServiceStub:
        """Forge."""
        return TezzeretServiceStub(self.channel)

    @cached_property
    def urabrask(self) -> UrabraskServiceStub:
        """Evaluation engine."""
        return UrabraskServiceStub(self.channel)

    @cached_property
    def tamiyo(self) -> TamiyoServiceStub:
        """Controller."""
        return TamiyoServiceStub(self.channel)

    @cached_property
    def tolaria(self) -> TolariaServiceStub:
        """Training orchestrator."""
        return TolariaServiceStub(self.channel)


@contextmanager
def connect(state: State, *, start: bool = False) -> Iterator[Mesh]:
    """Reach a mesh for the time of a command.

    Args:
        state: the command's context.
        start: whether to start an embedded mesh for as long as the command lasts when none runs.

    Raises:
        Unavailable: MESH_UNREACHABLE, nothing answers at the address named, or none runs and `start` is false.
    """
    settings = state.settings
    if settings.mesh:
        with _channel(settings.mesh, settings, ours=False) as channel:
            _check(channel, settings.mesh)
            yield Mesh(settings.mesh, channel)
        return
    running = find_running(settings.home)
    if running is not None:
        with _channel(running.address, settings) as channel:
            _check(channel, running.address)
            yield Mesh(running.address, channel)
        return
    if not start:
        raise Unavailable(
            f"no mesh runs on {settings.home}: start one with 'esper up', or name one with --mesh host:port",
            reason="MESH_UNREACHABLE",
        )
    with embedded(state) as address, _channel(address, settings) as channel:
        yield Mesh(address, channel, own=True)


@contextmanager
def _channel(address: str, settings: "CommandSettings", *, ours: bool = True) -> Iterator[grpc.Channel]:
    """A channel to the mesh; `ours` is one that works on the home directory."""
    # Late: the chassis takes longer to import than `esper --help` should take to answer.
    from esper.mesh.channel import open_sync_channel

    channel = open_sync_channel(address, options=settings.channel, token=_token(settings, ours=ours))
    try:
        yield channel
    finally:
        channel.close()


def _token(settings: "CommandSettings", *, ours: bool) -> "Callable[[], str] | None":
    """Who this command is to the mesh: a client, where it has the secret that the mesh knows clients by; else nobody.

    That is the configured one, or what a mesh without one keeps on its home directory.
    """
    from esper.mesh.identity import Identity, Role, TokenIssuer, load_or_create_secret

    secret = settings.auth.secret
    if secret is None and ours and settings.auth.anonymous_role == "none" and (settings.home / "auth.key").exists():
        secret = load_or_create_secret(settings.home)
    if secret is None:
        return None
    return TokenIssuer(secret, ttl_s=settings.auth.token_ttl_s).source(Identity("esper-cli", Role.CLIENT))


def _check(channel: grpc.Channel, address: str) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)  # the published stubs leave its methods out
    try:
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
    except grpc.RpcError as error:
        raise Unavailable(
            f"no mesh answers at {address}: expected one that 'esper up' started", reason="MESH_UNREACHABLE"
        ) from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"the mesh at {address} is starting or stopping: try again", reason="MESH_NOT_READY")


@contextmanager
def embedded(state: State) -> Iterator[str]:
    """Run `esper up` on the home directory as a child process; yields its address once it is ready."""
    home = state.settings.home
    home.mkdir(parents=True, exist_ok=True)
    log = home / "mesh.log"
    options = ["--config", str(state.config)] if state.config is not None else []
    arguments = [sys.executable, "-m", "esper.cli", *options, "--home", str(home)]
    arguments += ["up", "--host", "127.0.0.1", "--port", "0", "--attached"]
    with log.open("ab") as sink:
        child = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            arguments,
            # Held open and never written to: its end tells the mesh that this command is gone, however it went.
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            env={**(os.environ if state.environ is None else state.environ), "ESPER_LOGGING__FORMAT": "json"},
            # Ctrl-C in the terminal must reach the command first, which then stops its mesh in good order.
            start_new_session=True,
        )
    try:
        yield _wait_until_ready(child, home, log)
    finally:
        _stop(child)


def _wait_until_ready(child: subprocess.Popen[bytes], home: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        running = find_running(home)
        if running is not None and running.pid == child.pid:
            return running.address
        if child.poll() is not None:
            raise Unavailable(
                f"the embedded mesh ended with status {child.returncode} while starting: {_last_line(log)}",
                reason="MESH_START_FAILED",
            )
        time.sleep(0.02)
    raise Unavailable(
        f"the embedded mesh was not ready after {_START_LIMIT_S:.0f} s: see {log}", reason="MESH_START_FAILED"
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    spoken = [line for line in lines if line.startswith("error")]
    return (spoken or lines or ["it said nothing"])[-1].removeprefix("error ")


def _stop(child: subprocess.Popen[bytes]) -> None:
    try:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            child.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    finally:
        if child.stdin is not None:
            child.stdin.close()
