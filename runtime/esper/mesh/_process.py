"""One worker process as its pool sees it: start, talk, watch, kill."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import stat
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from esper.mesh._frames import HEADER, decode, encode, lengths

__all__ = ["Child", "Launch", "mib"]

_PASSED_ON = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "CC",
    "CXX",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TZ",
)
"""Variables that a worker inherits. Everything else, keys and tokens above all, stays with the parent."""

_TAIL_BYTES = 4096
_READ_BYTES = 1 << 16
_KILL_WAIT_S = 10.0
_LAST_WORDS_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start a worker; fields are those of `WorkerPool`."""

    entry: str
    warm: str
    directory: Path
    network: bool
    files: bool
    """True confines reading and writing."""
    writable: tuple[Path, ...]
    python_path: tuple[Path, ...]
    environ: Mapping[str, str]
    memory: int
    file_limit_bytes: int
    max_message_bytes: int
    max_result_bytes: int

    def environment(self) -> dict[str, str]:
        """The worker's whole environment."""
        # The one place where a process hands its own environment on: by name, never as a whole.
        inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        here = str(Path.cwd())
        # The directory that somebody happened to start us in may hold anything, the data directory among it.
        path = [*map(str, self.python_path), *(entry for entry in sys.path if entry and entry != here)]
        directory = str(self.directory)
        return {
            **inherited,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": directory,
            "TMPDIR": directory,
            **self.environ,
        }

    def specification(self) -> str:
        """What the process is told to be."""
        return json.dumps(
            {
                "parent": os.getpid(),
                "entry": self.entry,
                "warm": self.warm,
                "directory": str(self.directory),
                "network": self.network,
                "files": self.files,
                "writable": [str(path) for path in self.writable],
                "memory": self.memory,
                "file_bytes": self.file_limit_bytes,
                "limit": self.max_message_bytes,
            }
        )


class Child:
    """A started process with its three pipes. Made by `start`; ends by `kill`."""

    def __init__(self, process: asyncio.subprocess.Process, launch: Launch) -> None:
        self._process = process
        self._limit = launch.max_result_bytes
        self._directory = launch.directory
        self._files = launch.file_limit_bytes
        self._words: deque[bytes] = deque()
        self._words_length = 0
        self._listener = asyncio.create_task(self._listen(), name=f"worker-{process.pid}-stderr")
        self._killed = False
        self.held: tuple[str, ...] = ()
        """Limits that the process says it is under."""
        self.warm_bytes = 0
        """Resident memory when it was ready, in bytes."""
        self.overrun = ""
        """What it held too much of when it was killed for it, in words; empty otherwise."""

    @classmethod
    async def start(cls, launch: Launch) -> "Child":
        """Start the process; it is not ready yet.

        Raises:
            OSError: the system refuses another process.
        """
        launch.directory.mkdir(mode=0o700, parents=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "esper.mesh._worker",
            launch.specification(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=launch.environment(),
            cwd=launch.directory,
            start_new_session=True,  # a group of its own: killed as a whole, and deaf to the terminal's Ctrl-C
        )
        return cls(process, launch)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it may take a job."""
        if self._killed or self._process.returncode is not None:
            return False
        try:
            # The event loop learns of a death a moment later than the system does.
            return bool(psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    async def ending(self) -> str:
        """How it ended, in words, given a moment to do so by itself: a kill of ours would hide the reason."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _LAST_WORDS_S)
        await asyncio.wait({self._listener}, timeout=_LAST_WORDS_S)
        code = self._process.returncode
        if code is None:
            return "closed its end of the pipe"
        if code >= 0:
            return f"exited with status {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was killed by {name}"

    def tail(self) -> str:
        """The last of what it wrote to standard error, at most 4 KiB."""
        return b"".join(self._words)[-_TAIL_BYTES:].decode(errors="replace").strip()

    async def become_ready(self) -> None:
        """Wait for its first message.

        Raises:
            EOFError: it ended before.
            ValueError: it said something else.
        """
        message = await self.receive()
        if message.get("type") != "ready":
            raise ValueError(f"expected the message ready first, found {message.get('type')!r}")
        self.held = tuple(map(str, message.get("held", ())))
        self.warm_bytes = _resident(self.pid)

    async def send(self, message: Mapping[str, Any]) -> None:
        """Write a message.

        Raises:
            OSError: the process has ended.
        """
        assert self._process.stdin is not None
        for part in encode(message):
            self._process.stdin.write(part)
            await self._process.stdin.drain()

    async def receive(self) -> dict[str, Any]:
        """Read a message.

        Raises:
            EOFError: the process has ended (`asyncio.IncompleteReadError` is one).
            ValueError: it does not keep to the format.
        """
        assert self._process.stdout is not None
        read = self._process.stdout.readexactly
        text, blobs = lengths(await read(HEADER.size), self._limit)
        return decode(await read(text), await read(blobs))

    async def kill_above(self, ceiling: int, every_s: float) -> None:
        """Kill the process as soon as it holds too much, its children included; return then.

        Args:
            ceiling: resident bytes that they may hold; bytes of files are limited by the launch.
            every_s: time between looks at the process itself.
        """
        turns = 0
        children = 0
        while self.alive:
            # A walk through all processes and files: ten times rarer than the look at the worker itself.
            if turns % 10 == 0:
                children, overfull = await asyncio.to_thread(self._look_around)
                if overfull:
                    self.overrun = f"more than {mib(self._files)} of files"
            turns += 1
            held = _resident(self.pid) + children
            if held > ceiling:
                self.overrun = f"{mib(held)} of memory, limit {mib(ceiling)}"
            if self.overrun:
                await self.kill()
                return
            await asyncio.sleep(every_s)

    def _look_around(self) -> tuple[int, bool]:
        """Resident bytes of the other processes of its group, and whether files hold more than they may."""
        members = _group(self.pid)
        return sum(_resident(pid) for pid in members if pid != self.pid), _overfull(
            self._directory, members, self._files
        )

    async def kill(self) -> None:
        """End the process and everything that it started; returns when it is gone. Safe to call twice."""
        # Also when the process itself is gone: what it started may still run and hold the pipes. But only once, because
        # the number of a group that has ended may be given to a stranger.
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ended()), _KILL_WAIT_S)

    async def _ended(self) -> None:
        await self._process.wait()
        await asyncio.wait({self._listener}, timeout=1.0)
        self._listener.cancel()
        # What a flood left unread keeps its pipe open for ever, and asyncio offers no other way to all three of them.
        self._process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while part := await self._process.stderr.read(_READ_BYTES):
            self._words.append(part)
            self._words_length += len(part)
            while self._words_length - len(self._words[0]) >= _TAIL_BYTES:
                self._words_length -= len(self._words.popleft())


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def _group(group: int) -> list[int]:
    """Members of a process group, whoever their parents are by now: a worker's descendants cannot leave its."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == group:
                members.append(pid)
    return members


def _overfull(directory: Path, pids: list[int], limit: int) -> bool:
    """Whether files under a directory, and files without a name that these processes hold open, are above a limit."""
    total = 0
    counted = set()
    for state in (*_files(directory), *(state for pid in pids for state in _nameless(pid))):
        if (state.st_dev, state.st_ino) not in counted:
            counted.add((state.st_dev, state.st_ino))
            # Empty files cost something too.
            total += max(state.st_blocks * 512, 4096)
        if total > limit:
            return True
    return False


def _files(directory: Path) -> Iterator[os.stat_result]:
    pending = [str(directory)]
    while pending:
        # What ends meanwhile is no matter; what a job made unreadable does not end the count of the rest.
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)


def _nameless(pid: int) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as handles:
        for handle in handles:
            with contextlib.suppress(OSError):
                state = handle.stat()
                if state.st_nlink == 0 and stat.S_ISREG(state.st_mode):
                    yield state


def mib(count: int) -> str:
    """Bytes in words."""
    return f"{count / (1 << 20):.0f} MiB"
