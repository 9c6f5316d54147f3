"""The life of one worker process: confine itself, warm up, then one job after the other until its input ends.

Started by `esper.mesh.workers` as `python -m esper.mesh._worker SPECIFICATION`; not for people.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from esper.mesh._confine import die_with_parent, drop_privileges, forbid_calls, limit_address_space, restrict_files
from esper.mesh._frames import encode, read_frame

__all__ = ["confine", "main", "serve"]

Entry = Callable[[dict[str, Any], Callable[[Mapping[str, Any]], None]], dict[str, Any]]

_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt", "/sys", "/nix/store"),
    # Of /etc what linkers, time and names of users take; services keep keys there.
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime"),
    *("/etc/nsswitch.conf", "/etc/passwd", "/etc/group"),
    # Of /proc what is said of this process and of the machine: the directories of other processes hold their secrets.
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/filesystems"),
    *("/proc/version", "/proc/loadavg", "/proc/uptime", "/proc/devices", "/proc/driver"),
)
"""Read by every program; none of it is ours. Home directories, /tmp, /var and /run stay closed."""

_DEVICES = ("null", "zero", "full", "random", "urandom", "nvidia*")
"""Of /dev; not /dev/shm, whose files are memory."""

_MAX_TEXT = 8000
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory", "std::bad_array_new")


def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def confine(specification: Mapping[str, Any]) -> list[str]:
    """Give up what the specification does not leave to this process; tell what holds, in words."""
    held = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if die_with_parent(specification["parent"]):
        held.append("parent death: SIGKILL")
    resource.setrlimit(resource.RLIMIT_FSIZE, (specification["file_bytes"],) * 2)
    writable = [Path(path) for path in (specification["directory"], *specification["writable"])]
    writable += [path for pattern in _DEVICES for path in Path("/dev").glob(pattern)]
    readable = [Path(path) for path in (*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path)]
    if specification["files"] and restrict_files(readable=readable, writable=writable):
        held.append("files: Landlock")
    if forbid_calls(network=specification["network"]):
        held += ["processes: seccomp"] if specification["network"] else ["processes: seccomp", "network: seccomp"]
    if drop_privileges():
        held.append("privileges: none")
    return held


def serve(source: BinaryIO, sink: BinaryIO, entry: Entry, limit: int) -> None:
    """Run jobs from `source` until it ends; write progress and results to `sink`."""

    def send(message: Mapping[str, Any]) -> None:
        sink.writelines(encode(message))
        sink.flush()

    while True:
        try:
            job = read_frame(source.read, limit)
        except EOFError:
            return
        home = Path.cwd()
        scratch = Path(tempfile.mkdtemp(prefix="job-", dir=home))
        os.chdir(scratch)
        try:
            result = entry(job, lambda progress: send({"type": "progress", "value": dict(progress)}))
            send({"type": "result", **{f"value.{key}": value for key, value in result.items()}})
        except Exception as error:  # noqa: BLE001  # whatever the job raised is its result
            send({"type": "error", **describe(error)})
        finally:
            os.chdir(home)
            shutil.rmtree(scratch, ignore_errors=True)


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as data: its class, its text, its traceback, and whether memory was what it lacked."""
    text = _unicode(str(error))
    lack = isinstance(error, MemoryError) or any(word in text.lower() for word in _NO_MEMORY)
    return {
        "kind": type(error).__name__,
        "text": text[:_MAX_TEXT],
        "traceback": _unicode("".join(traceback.format_exception(error)))[-_MAX_TEXT:],
        "memory": lack,
    }


def _unicode(text: str) -> str:
    """The text without halves of surrogate pairs, which stand for odd bytes in names of files."""
    return text.encode(errors="replace").decode()


def main(argument: str) -> None:
    """Become a worker; the argument is the specification as JSON."""
    specification = json.loads(argument)
    # Output of the job must not get between our messages: whatever prints goes to standard error from here on.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns us
    faulthandler.enable()
    held = confine(specification)
    if specification["warm"]:
        _resolve(specification["warm"])()
    entry = _resolve(specification["entry"])
    if specification["memory"] and limit_address_space(specification["memory"]):
        held.append("memory: address space")
    sink.writelines(encode({"type": "ready", "held": held}))
    sink.flush()
    with contextlib.suppress(BrokenPipeError):  # the owner has closed its end: the work is over
        serve(source, sink, entry, specification["limit"])


if __name__ == "__main__":
    main(sys.argv[1])
    # Threads of a job must not hold the process, nor finalizers of native libraries crash it.
    os._exit(0)
