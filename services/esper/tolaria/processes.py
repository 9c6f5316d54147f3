"""Training processes: started in sessions of their own, found again after a restart, told apart from strangers.

A process is known by its number and its start time, because numbers are used again. Those that we started are our
children and must be reaped; those that an earlier service started are not, and are only looked at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil

from esper.tolaria.core import ProcessMark

if TYPE_CHECKING:
    from esper.tolaria.rundir import RunDir
    from esper.tolaria.worker import Launch

__all__ = ["Processes"]

_START_SLACK_S = 1.0
"""Clocks of process start times tick in hundredths of a second, and move when the clock is set."""


class Processes:
    """Every training process that this service answers for."""

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, run_dir: RunDir, launch: Launch) -> ProcessMark:
        """Start a process on a run. It outlives us; its output goes to ``log.txt``.

        Raises:
            OSError: the system starts no more processes.
        """
        with (run_dir.path / "log.txt").open("ab") as log:
            child = subprocess.Popen(  # noqa: S603  # our own module, no shell
                [sys.executable, "-m", "esper.tolaria.worker", str(run_dir.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert child.stdin is not None
        # A child that died at once is found by the next look, not by this write.
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(launch.line().encode())
            child.stdin.close()
        self._children[child.pid] = child
        try:
            started = psutil.Process(child.pid).create_time()
        except psutil.NoSuchProcess:
            started = 0.0
        return ProcessMark(pid=child.pid, started=started)

    def alive(self, mark: ProcessMark) -> bool:
        """Whether the process still runs; reaps it when it was our child and has ended."""
        child = self._children.get(mark.pid)
        if child is not None:
            if child.poll() is None:
                return True
            del self._children[mark.pid]
            return False
        try:
            process = psutil.Process(mark.pid)
            same = abs(process.create_time() - mark.started) <= _START_SLACK_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def kill(self, mark: ProcessMark) -> None:
        """End a process and everything that it started, at once; nothing when it is gone or is not the one meant."""
        if not self.alive(mark):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(mark.pid, signal.SIGKILL)

    def release(self) -> None:
        """Let go of the children without ending them: the next service finds them by their marks."""
        for child in self._children.values():
            # Popen warns about children that are still running when it is collected; these are meant to.
            child.returncode = child.returncode if child.returncode is not None else 0
        self._children.clear()
