"""The training process's desk: words from the service come in, status and events go out, all on a thread of its own.

The training thread sets and reads plain attributes; files are touched by the desk's thread only. Status is coalesced
(the newest counts), events are kept until written, up to a bound; the oldest go first.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from esper.mesh.errors import EsperError
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from esper.tolaria.core import Status
    from esper.tolaria.rundir import RunDir

__all__ = ["Desk"]

_log = get_logger(__name__)
_PERIOD_S = 0.1
_MAX_EVENTS = 10_000


class Desk:
    """Files of a running process.

    Args:
        run_dir: the run.
        attempt: commands for other attempts are not ours.
    """

    def __init__(self, run_dir: RunDir, attempt: int) -> None:
        self._run_dir = run_dir
        self._attempt = attempt
        self._status: Status | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._command = ""
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)

    def start(self) -> None:
        """Begin; a command that was given before is seen at once."""
        self._read_command()
        self._thread.start()

    @property
    def command(self) -> str:
        """``pause``, ``stop`` or nothing."""
        return self._command

    def ask(self, word: str) -> None:
        """Give a command from inside the process; for signal handlers."""
        self._command = self._command or word

    def say(self, status: Status) -> None:
        """Replace the status, within a tenth of a second."""
        with self._guard:
            self._status = status

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to ``events.jsonl``; fields are plain data."""
        line = {"time": datetime.now(UTC).isoformat(), "attempt": self._attempt, "kind": kind, **fields}
        with self._guard:
            self._events.append(line)

    def close(self, last: Status | None = None) -> None:
        """Write everything, the last status durably, and end the thread.

        Raises:
            OSError: the last status could not be written; what else could not be is logged.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self._write()
        except OSError as error:  # the last word counts, not those before it
            _log.warning("events lost", count=len(self._events), error=str(error))
        if last is not None:
            self._run_dir.write_status(last, durable=True)

    def _work(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                self._read_command()
                self._write()
            except (OSError, EsperError) as error:  # a full disk must not end the training
                _log.warning("desk cannot reach the run's folder", error=str(error))

    def _read_command(self) -> None:
        command = self._run_dir.command()
        if command is not None and command.attempt == self._attempt:
            self._command = command.word

    def _write(self) -> None:
        """Write what is new; what could not be written stays for the next time."""
        try:
            self._write_events()
        finally:
            self._write_status()

    def _write_events(self) -> None:
        with self._guard:
            events, self._events = list(self._events), deque(maxlen=_MAX_EVENTS)
        if not events:
            return
        try:
            _append(self._run_dir.path / "events.jsonl", events)
        except OSError:
            with self._guard:
                self._events = deque([*events, *self._events], maxlen=_MAX_EVENTS)
            raise

    def _write_status(self) -> None:
        with self._guard:
            status, self._status = self._status, None
        if status is None:
            return
        try:
            self._run_dir.write_status(status)
        except OSError:
            with self._guard:
                if self._status is None:  # nothing newer was said meanwhile
                    self._status = status
            raise


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to a file, all of them or none: half a line would damage the one that follows it."""
    data = "".join(json.dumps(line, default=str) + "\n" for line in lines).encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) != len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
