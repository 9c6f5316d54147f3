"""The folder of one run: who writes which file, and how, so that a reader never sees half of one.

::

    run.json            service   what was asked for, process, verdict
    config.json         service   the full configuration
    command.json        service   "pause" or "stop" for one attempt
    status.json         process   state, progress, result
    events.jsonl        process   one line per thing that happened; appended, resumes included
    log.txt             process   its standard output and error
    checkpoints/        process   see `esper.tolaria.checkpoints`
    history.json        process   curves: one entry per boundary
    lineage.json        process   every adaptation, kernel and decision
    report.json, report.html, export/    process, at the end

Files are replaced whole (`write_atomic`); only events and log grow.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper.mesh.errors import Corrupt
from esper.tolaria.config import RunConfig
from esper.tolaria.core import RunRecord, Status, from_json, to_json
from esper.tolaria.overrides import decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["PUBLIC_FILES", "Command", "RunDir", "fsync_folder", "read_json", "write_atomic", "write_json"]

PUBLIC_FILES = (
    "config.json",
    "events.jsonl",
    "history.json",
    "lineage.json",
    "log.txt",
    "report.html",
    "report.json",
)
"""Files of a run that clients may list and download, beside everything below ``export/``."""


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace a file as a whole: readers see the old bytes or the new ones.

    Args:
        path: file to replace; its folder exists.
        data: new contents.
        durable: also survive a power cut; costs a disk flush.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with staged.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def write_json(path: Path, value: object, *, durable: bool = False) -> None:
    """Replace a file by the JSON of plain data."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode(), durable=durable)


def read_json(path: Path) -> Any:
    """Plain data of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        Corrupt: RUN_FILE_CORRUPT, it is no JSON.
    """
    raw = path.read_bytes()
    try:
        return json.loads(raw)
    except ValueError as error:
        raise Corrupt(f"{path.name}: expected JSON, found {raw[:40]!r}", reason="RUN_FILE_CORRUPT") from error


@dataclass(frozen=True, slots=True)
class Command:
    """A word from the service to the process of one attempt."""

    attempt: int
    word: str
    """``pause`` or ``stop``."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths and files of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder of the exported model."""
        return self.path / "export"

    def record(self) -> RunRecord:
        """What the service wrote."""
        return from_json(RunRecord, read_json(self.path / "run.json"), name="run.json")

    def write_record(self, record: RunRecord) -> None:
        """Replace what the service knows; durable: a run that was promised must not be forgotten."""
        write_json(self.path / "run.json", to_json(record), durable=True)

    def config(self) -> RunConfig:
        """The full configuration."""
        return decode(RunConfig, read_json(self.path / "config.json"))

    def write_config(self, config: RunConfig) -> None:
        """Write the full configuration, once."""
        write_json(self.path / "config.json", encode(config), durable=True)

    def status(self) -> Status | None:
        """What the process last said; None before its first word."""
        try:
            return from_json(Status, read_json(self.path / "status.json"), name="status.json")
        except FileNotFoundError:
            return None

    def write_status(self, status: Status, *, durable: bool = False) -> None:
        """Replace what the process says of itself."""
        write_json(self.path / "status.json", to_json(status), durable=durable)

    def command(self) -> Command | None:
        """The service's last word; None without one."""
        try:
            data = read_json(self.path / "command.json")
            return Command(int(data["attempt"]), str(data["word"]))
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt("command.json: expected attempt and word", reason="RUN_FILE_CORRUPT") from error

    def write_command(self, command: Command) -> None:
        """Say a word to the process."""
        write_json(self.path / "command.json", {"attempt": command.attempt, "word": command.word})

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        """Be the only process that works on the run; false where another one does. Ends with the process."""
        descriptor = os.open(self.path / "process.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def artifacts(self) -> list[tuple[str, int]]:
        """Names (paths below the folder, with ``/``) and sizes in bytes of what clients may have, by name."""
        found = [self.path / name for name in PUBLIC_FILES]
        if self.export.is_dir():
            found += [path for path in self.export.rglob("*") if not path.name.startswith(".")]
        sized = [(p.relative_to(self.path).as_posix(), p.stat().st_size) for p in found if p.is_file()]
        return sorted(sized)
