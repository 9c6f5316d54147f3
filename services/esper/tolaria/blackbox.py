"""What of a run outlives its process when a kernel takes that down, in files of the run's folder.

::

    circuits.json   circuit breakers of kernels and sites; not in the checkpoints, which may be older than a failure
    flight          memory map: the kernel that is being called
    stacks.txt      stacks of all threads: a fatal signal, or a kernel that did not come back
    hung            mark: the watchdog saw it, and has told the circuits already

A kernel hangs or crashes in native code, where nothing can be caught. The process ends, the service sees by these
files that a kernel ended it (`ended_by_kernel`) and resumes the run, and the next process opens that kernel's circuit
for good before it builds anything (`BlackBox.open`). A process that was killed from outside leaves no stacks: nobody is
blamed, whatever was being called.
"""

from __future__ import annotations

import faulthandler
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from esper.kasmina._flight import FLIGHT, last_call
from esper.kasmina.breaker import Breakers, Scope
from esper.mesh.errors import Corrupt
from esper.mesh.logging import get_logger
from esper.tolaria.rundir import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TextIO

__all__ = ["BlackBox", "ended_by_kernel"]

_log = get_logger(__name__)
_CIRCUITS, _FLIGHT, _STACKS, _HUNG = "circuits.json", "flight", "stacks.txt", "hung"


def ended_by_kernel(folder: Path) -> str:
    """Which kernel took the last process of a run down, in one sentence; empty where none did."""
    try:
        crashed = (folder / _STACKS).stat().st_size > 0
    except OSError:
        return ""
    call = last_call(folder / _FLIGHT)
    if not crashed or (call is None and not (folder / _HUNG).exists()):
        return ""
    return "a kernel did not come back" if call is None else f"kernel {call[0]} ended it in its {call[1]}"


class BlackBox:
    """The files of one process.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: ThreadPoolExecutor | None = None
        self._kept: dict[str, Any] = {}
        self._others = faulthandler.is_enabled()
        self.stacks: TextIO | None = None
        """Where stacks go."""

    def open(self) -> dict[str, Any]:
        """Read what earlier processes left, judge how the last one ended, and begin to record; gives the circuits."""
        self._kept = self._read()
        if ended_by_kernel(self._folder):
            self._blame()
        (self._folder / _HUNG).unlink(missing_ok=True)
        FLIGHT.write_to(self._folder / _FLIGHT)
        self.stacks = (self._folder / _STACKS).open("w", encoding="utf-8")
        faulthandler.enable(self.stacks)
        return self._kept

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self._folder / _CIRCUITS)
            Breakers(dict.fromkeys(Scope, 1), 1).replace(found)
        except FileNotFoundError:
            return {}
        except (AttributeError, Corrupt, TypeError, ValueError) as error:
            _log.warning("circuits of earlier attempts not known", error=f"{type(error).__name__}: {error}")
            return {}
        return dict(found)

    def _blame(self) -> None:
        call = last_call(self._folder / _FLIGHT)
        stacks = (self._folder / _STACKS).read_text(encoding="utf-8", errors="replace").strip()
        head = stacks.partition("\n")[0]
        _log.error("a kernel ended the process before", call=call, stacks=stacks[:4000])
        if call is None:  # a watchdog saw it, and has kept the circuits
            return
        kernel_id, phase = call
        breakers = Breakers(dict.fromkeys(Scope, 1), 1)
        breakers.replace(self._kept)
        # Compiled code first; when its circuit is open for good already, it was the portable graph.
        scope = Scope.KERNEL if "for good" in breakers.refusal(Scope.CODE, kernel_id) else Scope.CODE
        breakers.trip(scope, kernel_id, f"hang or crash in its {phase}: {head:.200}", for_good=True)
        self._kept = breakers.document()
        write_json(self._folder / _CIRCUITS, self._kept, durable=True)

    def keep(self, circuits: dict[str, Any], *, ending: bool) -> None:
        """Write circuits where they have changed; on a thread of its own, unless the process is about to end.

        Args:
            circuits: as `Breakers.document` gives them.
            ending: because a kernel hangs.
        """
        if ending:
            write_json(self._folder / _CIRCUITS, circuits, durable=True)
            (self._folder / _HUNG).touch()
            FLIGHT.stop_writing()
            (self._folder / _FLIGHT).write_bytes(b"")
        elif circuits != self._kept:
            self._kept = circuits
            self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="circuits")
            self._writer.submit(self._write, circuits)

    def _write(self, circuits: dict[str, Any]) -> None:
        try:
            write_json(self._folder / _CIRCUITS, circuits)
        except OSError as error:
            _log.warning("circuits not kept", error=str(error))

    def close(self) -> None:
        """Finish writing; the process goes on, or ends in peace."""
        if self._writer is not None:
            self._writer.shutdown()
        if self.stacks is None:
            return
        FLIGHT.stop_writing()
        faulthandler.disable()
        if self._others and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)
        self.stacks.close()
        self.stacks = None
