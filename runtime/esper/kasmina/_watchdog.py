"""Notices a kernel that does not come back.

A call into native code cannot be interrupted by anybody in the same process. What can be done is done: the stacks of
all threads go to standard error, the call is reported, and where the session is told to, the process ends, so that
whoever started it can resume without the kernel. Compiled kernels are called with the interpreter's lock held: then no
Python runs at all, and a timer of the interpreter's own, which needs no lock, writes the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from esper.kasmina._flight import FLIGHT
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from esper.kasmina._flight import Call

__all__ = ["EXIT_STATUS", "Watchdog"]

_log = get_logger("esper.kasmina.growth")
EXIT_STATUS = 70
"""Of a process that the watchdog ended; EX_SOFTWARE."""


class Watchdog:
    """A thread that looks a few times per `timeout_s`.

    Args:
        timeout_s: from which a call counts as hung; 0 never looks.
        abort: end the process then.
        told: called on the watchdog's thread, once for each call that hangs.
    """

    def __init__(self, timeout_s: float, *, abort: bool, told: Callable[[Call, float], None]) -> None:
        self._timeout_s = timeout_s
        self._abort = abort
        self._told = told
        self.stream: TextIO | None = sys.__stderr__
        """Where stacks go: a file of the system's own."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look; again does nothing."""
        if self._thread is None and self._timeout_s > 0:
            self._thread = threading.Thread(target=self._run, name="esper-watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join(1.0)

    def _run(self) -> None:
        reported: Call | None = None
        while True:
            if self._abort:
                # Set anew at every look: it fires only where this thread cannot run any more.
                faulthandler.dump_traceback_later(2 * self._timeout_s, exit=True, file=self.stream or 2)
            if self._stop.wait(self._timeout_s / 4):
                break
            call = FLIGHT.longest()
            if call is None or call is reported:
                continue
            seconds = time.monotonic() - call.began
            if seconds > self._timeout_s:
                reported = call
                self._bark(call, seconds)
        if self._abort:
            faulthandler.cancel_dump_traceback_later()

    def _bark(self, call: Call, seconds: float) -> None:
        _log.error("kernel hangs", kernel_id=call.kernel_id, phase=call.phase, seconds=round(seconds, 1))
        if self.stream is not None:
            faulthandler.dump_traceback(file=self.stream, all_threads=True)
        self._told(call, seconds)
        if self._abort:
            _log.error("process ends: a kernel hangs, and cannot be interrupted", exit_status=EXIT_STATUS)
            os._exit(EXIT_STATUS)
