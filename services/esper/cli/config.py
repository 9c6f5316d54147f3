"""`esper config`: what is configured, where it comes from, and whether it is right."""

from typing import Annotated, Any

import typer

from esper.cli.state import ExitCode, command, state_of
from esper.mesh.settings import secret_keys

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Settings: environment over esper.toml over defaults.")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@app.command("show", epilog="Example: ESPER_SERVER__PORT=7700 esper config show")
@command
def show(
    context: typer.Context,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from the defaults.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON for scripts.")] = False,
) -> None:
    """Show every setting with its value and its origin; secrets are masked."""
    state = state_of(context).with_json(as_json)
    loaded = state.loaded
    flat = _flatten(loaded.value.model_dump(mode="json"))
    secrets = secret_keys(type(loaded.value))
    rows = []
    for key, value in flat.items():
        origin = loaded.origins.get(key, "default")
        if changed and origin == "default":
            continue
        rows.append((key, "**********" if key in secrets and value is not None else value, origin))
    if state.json:
        state.emit([{"key": key, "value": value, "origin": origin} for key, value, origin in rows])
        return
    if loaded.file is not None:
        state.console.print(f"file {loaded.file}", markup=False)
    state.table(("KEY", "VALUE", "ORIGIN"), rows, empty="every setting has its default")


@app.command("check", epilog="Example: esper --config /etc/esper/esper.toml config check")
@command
def check(context: typer.Context) -> None:
    """Check the configuration and say whether a running mesh still has what the file says now."""
    state = state_of(context)
    loaded = state.loaded
    source = str(loaded.file) if loaded.file is not None else "no file, defaults and environment"
    state.console.print(f"configuration is valid ({source})", markup=False)
    from esper.cli.lock import find_running

    running = find_running(state.settings.home)
    if running is None:
        return
    if running.config_digest != (loaded.digest or ""):
        state.console.print(
            f"drift: the mesh at {running.address} was started with another version of the file; restart it"
        )
        raise typer.Exit(ExitCode.FAILED)
    state.console.print(f"the mesh at {running.address} runs with this file")
