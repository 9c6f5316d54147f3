"""One process per service and home directory: locks held for the life of the process, and a note of where it listens.

`esper up` takes the locks and writes the note once it is ready; every other command on the same home directory reads
the note and talks to that mesh. The locks are the kernel's (flock): a killed mesh leaves nothing behind to remove.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from esper.cli.roster import SERVICES
from esper.mesh.errors import Conflict

__all__ = ["Endpoint", "HomeLock", "find_running"]

_MESH = "mesh"
_QUESTIONS_S = 2.0
"""How long one who wants the lock waits for those who only ask about it."""
_AGAIN_S = 0.003


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the mesh of a home directory listens."""

    address: str
    """`host:port`."""
    pid: int
    """Process that serves it."""
    config_digest: str = ""
    """Digest of the configuration file that it was started with; empty when there was none."""
    from_file: Mapping[str, Any] = field(default_factory=dict)
    """Keys and values of that file, as `drift.snapshot` has them."""


class HomeLock:
    """The right to write to a home directory, for as long as the object is held.

    Args:
        home: made when missing.
        name: the one service that runs; empty for a whole mesh, which shares its home with no service.

    Raises:
        Conflict: HOME_IN_USE, another process has it.
    """

    def __init__(self, home: Path, name: str = "") -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._note = home / f"{name or _MESH}.json"
        self._files: list[IO[str]] = []
        for part in (name,) if name else (_MESH, *SERVICES):
            self._take(home, part)
        self._note.unlink(missing_ok=True)

    def _take(self, home: Path, part: str) -> None:
        file = (home / f"{part}.lock").open("a+")
        self._files.append(file)
        deadline = time.monotonic() + _QUESTIONS_S
        while not _flock(file, fcntl.LOCK_EX):
            # Whoever asks whether a mesh runs shares the lock for an instant: that is no owner, and soon over.
            if _flock(file, fcntl.LOCK_SH) and time.monotonic() < deadline:
                fcntl.flock(file, fcntl.LOCK_UN)
                time.sleep(_AGAIN_S)
                continue
            self._close()
            running = _read(home / f"{part}.json") or _read(home / f"{_MESH}.json")
            where = f" by process {running.pid}, listening at {running.address}" if running else ""
            raise Conflict(
                f"the home directory {home} is in use{where}: expected a free one; "
                "stop that process or choose another with --home",
                reason="HOME_IN_USE",
            )

    def announce(self, address: str, config_digest: str = "", from_file: Mapping[str, Any] | None = None) -> None:
        """Tell other commands where this mesh listens and what it was configured with; call it once it is ready."""
        note = {
            "address": address,
            "pid": os.getpid(),
            "config_digest": config_digest,
            "from_file": dict(from_file or {}),
        }
        staged = self._note.with_suffix(".tmp")
        staged.touch(mode=0o600)
        staged.write_text(json.dumps(note), encoding="utf-8")
        staged.replace(self._note)

    def release(self) -> None:
        """Give the directory back; idempotent."""
        if self._files:
            self._note.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()


def find_running(home: Path) -> Endpoint | None:
    """The mesh that runs on a home directory now, or None."""
    lock = home / f"{_MESH}.lock"
    if not lock.exists():
        return None
    with lock.open("a+") as file:
        return None if _flock(file, fcntl.LOCK_SH) else _read(home / f"{_MESH}.json")


def _flock(file: IO[str], kind: int) -> bool:
    """Take a lock if it is free now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(note: Path) -> Endpoint | None:
    try:
        fields = json.loads(note.read_text(encoding="utf-8"))
        return Endpoint(
            str(fields["address"]), int(fields["pid"]), str(fields["config_digest"]), dict(fields["from_file"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
