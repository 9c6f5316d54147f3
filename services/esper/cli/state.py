"""What every command shares: settings, where to write, and how errors become exit codes."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from esper.mesh.errors import Code, EsperError, InternalError, InvalidInput, from_rpc_error

if TYPE_CHECKING:
    from esper.cli.command_settings import CommandSettings
    from esper.cli.settings import Settings
    from esper.mesh.settings import Loaded

__all__ = ["ExitCode", "State", "as_document", "command", "report", "short", "state_of"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound="CommandSettings")


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


_PIPE_WIDTH = 240
_EXIT_CODES = {
    Code.NOT_FOUND: ExitCode.NOT_FOUND,
    Code.UNAVAILABLE: ExitCode.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED: ExitCode.UNAVAILABLE,
    Code.INTERNAL: ExitCode.FAILED,
    Code.DATA_LOSS: ExitCode.FAILED,
}


def make_console(*, stderr: bool = False) -> Console:
    """A console for people; where its output goes to a file or pipe, tables are as wide as they need to be."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


@dataclass(frozen=True)
class State:
    """Context of one command."""

    config: Path | None = None
    """Configuration file named on the command line."""
    home: Path | None = None
    """Home directory named on the command line."""
    mesh: str | None = None
    """Address named on the command line."""
    environ: Mapping[str, str] | None = None
    """The environment; the process's own by default."""
    console: Console = field(default_factory=make_console)
    """For people: standard output."""
    errors: Console = field(default_factory=lambda: make_console(stderr=True))
    """For people: standard error."""
    json: bool = False
    """Write one JSON document to standard output instead of tables."""

    @cached_property
    def settings(self) -> "CommandSettings":
        """What a command needs to reach a mesh; read when it is first needed, so that help needs none of it.

        Raises:
            esper.mesh.settings.ConfigError: with every fault of the whole configuration at once.
        """
        from esper.cli.command_settings import CommandSettings
        from esper.mesh.settings import ConfigError

        try:
            return self._load(CommandSettings).value
        except ConfigError:
            # Sections of services are there, or something is wrong: only the whole root can tell.
            return self.loaded.value

    @cached_property
    def loaded(self) -> "Loaded[Settings]":
        """The whole configuration, and where it came from.

        Raises:
            esper.mesh.settings.ConfigError: with every fault at once.
        """
        # Late: the root of the configuration imports every service.
        from esper.cli.settings import Settings

        return self._load(Settings)

    def _load(self, kind: "type[T]") -> "Loaded[T]":
        from esper.mesh.settings import load, locate

        environ = os.environ if self.environ is None else self.environ
        loaded = load(kind, file=self.config or locate(environ, Path.cwd()), environ=environ)
        said: dict[str, Any] = {"home": self.home, "mesh": self.mesh}
        changes = {key: value for key, value in said.items() if value is not None}
        origins = {**loaded.origins, **dict.fromkeys(changes, "command line")}
        return replace(loaded, value=loaded.value.model_copy(update=changes), origins=origins)

    def with_json(self, wanted: bool) -> "State":
        """The same, for a command whose own `--json` was given."""
        return replace(self, json=self.json or wanted)

    def emit(self, document: Message | Mapping[str, Any] | Sequence[Any]) -> None:
        """Write a document for a script: JSON with the contract's own field names."""
        if isinstance(document, Message):
            document = as_document(document)
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=_to_json) + "\n")
        sys.stdout.flush()

    def table(self, columns: Iterable[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
        """Write a table for people, or one line when there is nothing to show."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(columns):
            # The first column names the thing: cut short it would be of no use in the next command.
            table.add_column(column, no_wrap=index == 0, overflow="fold")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        if table.row_count:
            self.console.print(table)
        else:
            self.console.print(empty)


def _to_json(value: object) -> object:
    return as_document(value) if isinstance(value, Message) else str(value)


def as_document(message: Message) -> dict[str, Any]:
    """A message as plain data with the contract's own field names; what is not set is left out."""
    return MessageToDict(message, preserving_proto_field_name=True)


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
            # What we find wrong before anyone is asked is a matter of usage; the mesh's own refusals are RpcErrors.
            code = ExitCode.USAGE if isinstance(error, InvalidInput) else None
            raise typer.Exit(report(error, code)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # whoever read our output has read enough; click ends quietly
            where = f"{error.filename}: " if error.filename else ""
            fault = InternalError(f"{where}{error.strerror or error}", reason="FILE_ERROR")
            raise typer.Exit(report(fault, ExitCode.FAILED)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(ExitCode.INTERRUPTED) from error

    return guarded


def report(error: EsperError, code: int | None = None) -> int:
    """Write an error for people to standard error; return the exit code, by default the one that goes with it."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]error[/]", end=" ")
    console.print(f"{error.public} ({error.reason})", markup=False)
    for violation in error.violations:
        if violation.field not in error.public:  # a fault of the configuration stands in the sentence already
            console.print(f"  {violation.field}: {violation.description}", markup=False)
    if error.retry_after_s is not None:
        console.print(f"  try again in {error.retry_after_s:g} s")
    return _EXIT_CODES.get(error.code, ExitCode.REFUSED) if code is None else code
