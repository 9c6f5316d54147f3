"""One mesh per home directory: a lock held for the life of the process, and a note of where it listens.

`esper up` takes the lock and writes the note once it is ready; every other command on the same home directory reads the
note and talks to that mesh. The lock is the kernel's (flock), so a killed mesh leaves nothing behind to be removed.
"""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from esper.mesh.errors import Conflict

__all__ = ["Endpoint", "HomeLock", "find_running"]

_LOCK = "mesh.lock"
_NOTE = "mesh.json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the mesh of a home directory listens."""

    address: str
    """`host:port`."""
    pid: int
    """Process that serves it."""
    config_digest: str = ""
    """Digest of the configuration file that it was started with; empty when there was none."""


class HomeLock:
    """The right to write to a home directory, for as long as the object is held.

    Raises:
        Conflict: HOME_IN_USE, another process has it.
    """

    def __init__(self, home: Path, name: str = "") -> None:
        home.mkdir(parents=True, exist_ok=True)
        prefix = f"{name}." if name else ""
        self._note = home / f"{prefix}{_NOTE}"
        self._file: IO[str] = (home / f"{prefix}{_LOCK}").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            running = _read(self._note)
            where = f" by process {running.pid}, listening at {running.address}" if running else ""
            raise Conflict(
                f"the home directory {home} is in use{where}: expected a free one; "
                "stop that process or choose another with --home",
                reason="HOME_IN_USE",
            ) from error
        self._note.unlink(missing_ok=True)

    def announce(self, address: str, config_digest: str = "") -> None:
        """Tell other commands where this mesh listens and what it was configured with; call it once it is ready."""
        staged = self._note.with_suffix(".tmp")
        staged.write_text(
            json.dumps({"address": address, "pid": os.getpid(), "config_digest": config_digest}), encoding="utf-8"
        )
        staged.replace(self._note)

    def release(self) -> None:
        """Give the directory back; idempotent."""
        if not self._file.closed:
            self._note.unlink(missing_ok=True)
            self._file.close()


def find_running(home: Path) -> Endpoint | None:
    """The mesh that runs on a home directory now, or None."""
    lock = home / _LOCK
    if not lock.exists():
        return None
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(home / _NOTE)
    return None


def _read(note: Path) -> Endpoint | None:
    try:
        fields = json.loads(note.read_text(encoding="utf-8"))
        return Endpoint(str(fields["address"]), int(fields["pid"]), str(fields["config_digest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
