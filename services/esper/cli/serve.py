"""`esper up` and `esper serve`: the mesh as a process."""

from dataclasses import replace
from typing import Annotated

import typer

from esper.cli.settings import SERVICES, Settings
from esper.cli.state import State, command, state_of
from esper.mesh.errors import InvalidInput, Unavailable

__all__ = ["serve", "up"]

PortOption = Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 lets the system choose.")]
HostOption = Annotated[str | None, typer.Option(help="Address to bind.")]


def _placed(state: State, host: str | None, port: int | None) -> Settings:
    changes: dict[str, object] = {}
    if host is not None:
        changes["host"] = host
    if port is not None:
        changes["port"] = port
    settings = state.settings
    if not changes:
        return settings
    # Validated again as a whole: a host beyond this machine asks for other rules of identity.
    values = {**settings.model_dump(), "server": {**settings.server.model_dump(), **changes}}
    try:
        return type(settings).model_validate(values)
    except ValueError as error:
        raise InvalidInput(f"--host/--port: {error}", reason="CONFIG_INVALID") from error


def _run(state: State, names: tuple[str, ...], host: str | None, port: int | None) -> None:
    from esper.cli.assembly import run

    settings = _placed(state, host, port)

    def ready(address: str) -> None:
        state.console.print(f"[bold]{', '.join(names)}[/] ready at [bold]{address}[/], home {settings.home.absolute()}")

    try:
        run(replace(state.loaded, value=settings), names, ready=ready)
    except OSError as error:
        raise Unavailable(str(error), reason="ADDRESS_IN_USE") from error


@command
def up(context: typer.Context, host: HostOption = None, port: PortOption = None) -> None:
    """Run every service in one process on one port, until Ctrl-C or SIGTERM."""
    _run(state_of(context), SERVICES, host, port)


@command
def serve(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SERVICES)}.")],
    host: HostOption = None,
    port: PortOption = None,
) -> None:
    """Run one service alone; it finds the others through `addresses` or `mesh` in the configuration."""
    if name not in SERVICES:
        raise InvalidInput(f"service: expected one of {', '.join(SERVICES)}, found {name!r}")
    _run(state_of(context), (name,), host, port)
