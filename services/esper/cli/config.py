"""`esper config`: what is configured, where it comes from, and whether it is right."""

from typing import Annotated

import typer

from esper.cli.lock import find_running
from esper.cli.state import ExitCode, command, state_of

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Settings: environment over esper.toml over defaults.")


@app.command("show", epilog="Example: ESPER_SERVER__PORT=7700 esper config show --changed")
@command
def show(
    context: typer.Context,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from the defaults.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON for scripts.")] = False,
) -> None:
    """Show every setting with its value and its origin; secrets are masked."""
    # Late: it imports what every process of a mesh needs, and `esper --help` does not.
    from esper.cli.drift import masked

    state = state_of(context).with_json(as_json)
    loaded = state.loaded
    rows = [(key, value, loaded.origins.get(key, "default")) for key, value in masked(loaded).items()]
    if changed:
        rows = [row for row in rows if row[2] != "default"]
    if state.json:
        state.emit([{"key": key, "value": value, "origin": origin} for key, value, origin in rows])
        return
    if loaded.file is not None:
        state.console.print(f"file {loaded.file}", markup=False, soft_wrap=True)
    state.table(("KEY", "VALUE", "ORIGIN"), rows, empty="every setting has its default")


@app.command("check", epilog="Example: esper --config /etc/esper/esper.toml config check")
@command
def check(context: typer.Context) -> None:
    """Check the configuration and say whether a running mesh still has what the file says now."""
    from esper.cli.drift import differences

    state = state_of(context)
    loaded, out = state.loaded, state.console
    source = str(loaded.file) if loaded.file is not None else "no file, defaults and environment"
    out.print(f"configuration is valid ({source})", markup=False, soft_wrap=True)
    running = find_running(state.settings.home)
    if running is None:
        return
    if running.config_digest == (loaded.digest or ""):
        out.print(f"the mesh at {running.address} runs with it")
        return
    changes = differences(running.from_file, loaded)
    if not changes:
        out.print(f"the mesh at {running.address} runs with it (only comments or layout of the file changed)")
        return
    out.print(f"drift: the mesh at {running.address} was started with other settings; restart it for:")
    for line in changes:
        out.print(f"  {line}", markup=False, soft_wrap=True)
    raise typer.Exit(ExitCode.FAILED)
