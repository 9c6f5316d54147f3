"""`esper up` and `esper serve`: the mesh as a process."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from esper.cli.roster import SERVICES
from esper.cli.state import State, command, state_of
from esper.mesh.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from esper.cli.settings import Settings

__all__ = ["serve", "up"]

PortOption = Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 lets the system choose.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Say where it listens as JSON, once it is ready.")]
HostOption = Annotated[str | None, typer.Option(help="Address to bind.")]


def _placed(state: State, host: str | None, port: int | None) -> "Settings":
    changes: dict[str, object] = {}
    if host is not None:
        changes["host"] = host
    if port is not None:
        changes["port"] = port
    settings = state.loaded.value
    if not changes:
        return settings
    # Validated again as a whole: a host beyond this machine asks for other rules of identity.
    values = {**settings.model_dump(), "server": {**settings.server.model_dump(), **changes}}
    try:
        return type(settings).model_validate(values)
    except ValueError as error:
        raise InvalidInput(f"--host/--port: {error}", reason="CONFIG_INVALID") from error


def _run(state: State, names: tuple[str, ...], host: str | None, port: int | None, *, attached: bool = False) -> None:
    from esper.cli.assembly import run

    settings = _placed(state, host, port)
    home = settings.home.absolute()

    def ready(address: str) -> None:
        if state.json:
            state.emit({"address": address, "home": str(home), "pid": os.getpid(), "services": list(names)})
            return
        named = escape(", ".join(names))
        state.console.print(f"[bold]{named}[/] ready at [bold]{address}[/], home {escape(str(home))}", soft_wrap=True)

    try:
        run(replace(state.loaded, value=settings), names, ready=ready, attached=attached)
    except OSError as error:
        raise Unavailable(f"{', '.join(names)} cannot start on {home}: {error}", reason="MESH_START_FAILED") from error


@command
def up(
    context: typer.Context,
    host: HostOption = None,
    port: PortOption = None,
    attached: Annotated[
        bool, typer.Option("--attached", hidden=True, help="Stop when standard input ends too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run every service in one process on one port, until Ctrl-C or SIGTERM."""
    _run(state_of(context).with_json(as_json), SERVICES, host, port, attached=attached)


@command
def serve(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SERVICES)}.")],
    host: HostOption = None,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one service alone; it finds the others through `addresses` or `mesh` in the configuration."""
    if name not in SERVICES:
        raise InvalidInput(f"service: expected one of {', '.join(SERVICES)}, found {name!r}")
    _run(state_of(context).with_json(as_json), (name,), host, port)
