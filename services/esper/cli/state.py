"""What every command shares: settings, where to write, and how errors become exit codes."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from esper.cli.settings import Settings, load_settings
from esper.mesh.errors import Code, EsperError, from_rpc_error
from esper.mesh.settings import Loaded

__all__ = ["ExitCode", "State", "command", "short", "state_of"]

P = ParamSpec("P")
R = TypeVar("R")


class ExitCode:
    """What the command's exit status tells a script."""

    OK = 0
    """Done."""
    FAILED = 1
    """The work itself failed: a run ended with an error, a check found a problem."""
    USAGE = 2
    """Wrong options or configuration."""
    NOT_FOUND = 3
    """The thing named does not exist."""
    UNAVAILABLE = 4
    """The mesh cannot be reached, or did not answer in time."""
    REFUSED = 5
    """The mesh refused: wrong input, wrong state, no permission, over a limit."""
    INTERRUPTED = 130
    """Ended by Ctrl-C."""


_EXIT_CODES = {
    Code.NOT_FOUND: ExitCode.NOT_FOUND,
    Code.UNAVAILABLE: ExitCode.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED: ExitCode.UNAVAILABLE,
    Code.INTERNAL: ExitCode.FAILED,
    Code.DATA_LOSS: ExitCode.FAILED,
}


@dataclass(frozen=True)
class State:
    """Context of one command."""

    loaded: Loaded[Settings]
    """The configuration, and where it came from."""
    console: Console
    """For people: standard output."""
    errors: Console
    """For people: standard error."""
    json: bool = False
    """Write one JSON document to standard output instead of tables."""

    @property
    def settings(self) -> Settings:
        """The configuration."""
        return self.loaded.value

    def with_json(self, wanted: bool) -> "State":
        """The same, for a command whose own `--json` was given."""
        return replace(self, json=self.json or wanted)

    def emit(self, document: Message | Mapping[str, Any] | Sequence[Any]) -> None:
        """Write a document for a script: JSON with the contract's own field names."""
        if isinstance(document, Message):
            document = MessageToDict(document, preserving_proto_field_name=True)
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=_to_json) + "\n")

    def table(self, columns: Iterable[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
        """Write a table for people, or one line when there is nothing to show."""
        table = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        if table.row_count:
            self.console.print(table)
        else:
            self.console.print(empty)


def _to_json(value: object) -> object:
    if isinstance(value, Message):
        return MessageToDict(value, preserving_proto_field_name=True)
    return str(value)


def make_state(
    *, config: Path | None, home: Path | None, mesh: str | None, as_json: bool, environ: Mapping[str, str] | None = None
) -> State:
    """Read the configuration and put what was said on the command line over it."""
    loaded = load_settings(environ=environ, file=config)
    changes: dict[str, Any] = {}
    if home is not None:
        changes["home"] = home
    if mesh is not None:
        changes["mesh"] = mesh
    if changes:
        loaded = replace(loaded, value=loaded.value.model_copy(update=changes))
    return State(loaded, Console(highlight=False), Console(stderr=True, highlight=False), as_json)


def state_of(context: typer.Context) -> State:
    """The state that the root command made."""
    state = context.find_root().obj
    if not isinstance(state, State):
        raise TypeError(f"the root command leaves a State in the context, found {type(state).__name__}")
    return state


def short(digest: str) -> str:
    """The first twelve digits of an id: enough to name it in a table and in the next command."""
    return digest.removeprefix("sha256:")[:12] if digest else "-"


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Make a command end with a sentence and an exit code instead of a traceback."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except grpc.RpcError as error:
            raise typer.Exit(report(from_rpc_error(error))) from error
        except EsperError as error:
            raise typer.Exit(report(error)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(ExitCode.INTERRUPTED) from error

    return guarded


def report(error: EsperError) -> int:
    """Write an error for people to standard error; return the exit code that goes with it."""
    console = Console(stderr=True, highlight=False)
    console.print("[bold red]error[/]", end=" ")
    console.print(f"{error.public} ({error.reason})", markup=False)
    for violation in error.violations:
        console.print(f"  {violation.field}: {violation.description}", markup=False)
    if error.retry_after_s is not None:
        console.print(f"  try again in {error.retry_after_s:g} s")
    return _EXIT_CODES.get(error.code, ExitCode.REFUSED)
