"""Which kernel is being called at this moment: for a watchdog, and for whoever asks after the process is gone.

Compiled code is called with the interpreter's lock held, so that a call which does not come back stops every thread
of the process, this module's readers included. What survives is a note in a memory-mapped file: writing it costs a
fraction of a microsecond and no system call, and the system keeps it when the process is killed.
"""

from __future__ import annotations

import mmap
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FLIGHT", "Call", "FlightRecorder", "last_call"]

_SIZE = 256
_NOTHING = bytes(_SIZE)


class Call(NamedTuple):
    """A kernel's function that was called and has not come back."""

    kernel_id: str
    phase: str
    """``forward``, ``backward`` or ``isolation``, inside which the others may be."""
    began: float
    """By ``time.monotonic``."""


class FlightRecorder:
    """The calls of one process, by thread."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}
        self._note: mmap.mmap | None = None

    def enter(self, kernel_id: str, phase: str) -> Call | None:
        """A call begins on this thread; gives the one inside which it does, for `leave`."""
        thread = threading.get_ident()
        outer = self._calls.get(thread)
        self._calls[thread] = Call(kernel_id, phase, time.monotonic())
        self._write(kernel_id, phase)
        return outer

    def leave(self, outer: Call | None = None) -> None:
        """It came back, or raised; the one around it, where there is one, goes on."""
        if outer is not None:
            self._calls[threading.get_ident()] = outer
            self._write(outer.kernel_id, outer.phase)
            return
        self._calls.pop(threading.get_ident(), None)
        if self._note is not None:
            self._note[:1] = b"\0"

    def _write(self, kernel_id: str, phase: str) -> None:
        if self._note is not None:
            text = f"{kernel_id} {phase}\n".encode()[:_SIZE]
            self._note[: len(text)] = text

    def longest(self) -> Call | None:
        """The call that has been running for the longest; None where there is none."""
        return min(tuple(self._calls.values()), key=lambda call: call.began, default=None)

    def write_to(self, path: Path) -> None:
        """Note calls in a file from now on, which is made or emptied."""
        path.write_bytes(_NOTHING)
        with path.open("r+b") as file:
            self._note = mmap.mmap(file.fileno(), _SIZE)

    def stop_writing(self) -> None:
        """Let go of the file."""
        note, self._note = self._note, None
        if note is not None:
            note.close()


FLIGHT = FlightRecorder()
"""That of this process."""


def last_call(path: Path) -> tuple[str, str] | None:
    """Kernel id and phase of the call during which the process that wrote `path` ended; None where there was none."""
    try:
        line = path.read_bytes().partition(b"\n")[0].decode()
    except (OSError, ValueError):
        return None
    kernel_id, _, phase = line.partition(" ")
    return (kernel_id, phase) if kernel_id.startswith("sha256:") and phase else None
