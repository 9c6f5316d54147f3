"""The `esper` command.

Every command takes `--help` with examples; those whose output a script would read take `--json`. Exit codes: 0 done,
1 failed, 2 usage or configuration, 3 not found, 4 mesh unreachable, 5 refused, 130 interrupted.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from esper.cli import config, export, library, runs, serve, topics, train
from esper.cli.state import State

__all__ = ["app"]

app = typer.Typer(
    name="esper",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Neural networks that grow while they train.",
    epilog="Start with: esper train digits --compare",
)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("up", epilog="Example: esper up --port 7600")(serve.up)
app.command("serve", epilog="Example: esper serve oona --port 7601")(serve.serve)
app.command("export", epilog="Example: esper export digits-20261123-201500-k3f9 --to exported")(export.export)
app.add_typer(runs.app, name="runs")
app.add_typer(library.kernels, name="kernels")
app.add_typer(library.blueprints, name="blueprints")
app.add_typer(topics.app, name="topics")
app.add_typer(config.app, name="config")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"esper {version('esper')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="Configuration file; else $ESPER_CONFIG, else esper.toml here.", dir_okay=False),
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Directory of everything kept on this machine; .esper here by default.")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="Address of a running mesh, host:port; else the one on --home, else a new one.")
    ] = None,
    _show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Keep what was said before the command's name, for whichever command follows."""
    context.obj = State(config=config_file, home=home, mesh=mesh)
