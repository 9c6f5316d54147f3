"""Jobs that the tests of the worker pool run in real worker processes."""
# ruff: noqa: D103  # each job is named for what it does

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

WARM = []


def warm():
    WARM.append(os.getpid())


def broken_warm():
    raise RuntimeError("no such library: libnothing.so")


def slow_warm():
    time.sleep(600)


def do(job, report):
    return globals()[job["do"]](job, report)


def echo(job, report):
    return {"pid": os.getpid(), "warm": WARM == [os.getpid()], **job}


def progress(job, report):
    for step in range(3):
        report({"step": step})
    return {}


def fail(job, report):
    raise LookupError("no kernel in there")


def die(job, report):
    sys.stderr.write("about to fall")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(job, report):
    os._exit(7)


def hang(job, report):
    if "mark" in job:
        Path(job["mark"]).write_text(str(os.getpid()))
    while True:
        pass


def hang_with_child(job, report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report({"child": child.pid, "pid": os.getpid()})
    time.sleep(600)


def allocate(job, report):
    return {"length": len(bytearray(job["bytes"]))}


def allocate_in_children(job, report):
    for _ in range(4):
        subprocess.Popen([sys.executable, "-c", "import time; x = b'x' * (90 << 20); time.sleep(600)"])
    time.sleep(600)


def swallow(job, report):
    held = []
    while True:
        block = bytearray(8 << 20)
        held.append(block)


def babble(job, report):
    sys.stdout.write("this is no message")
    sys.stdout.flush()
    os.write(1, b"nor is this")
    return {"told": True}


def lie(job, report):
    # A hostile job can find the pipe that its results leave by.
    for handle in range(3, 32):
        try:
            if os.path.sameopenfile(handle, 0) or not str(Path(f"/proc/self/fd/{handle}").readlink()).startswith(
                "pipe:"
            ):
                continue
            os.write(handle, b"\xff" * 64)
        except OSError:
            continue
    time.sleep(600)


def look(job, report):
    seen = {}
    for name in ("environ", "cwd"):
        seen[name] = dict(os.environ) if name == "environ" else str(Path.cwd())
    try:
        socket.socket().close()
        seen["network"] = True
    except OSError:
        seen["network"] = False
    for key in ("read", "write"):
        if key in job:
            try:
                Path(job[key]).open("rb" if key == "read" else "wb").close()
                seen[key] = True
            except OSError:
                seen[key] = False
    Path("own").write_text("private")
    return seen


def crash_in_native_code(job, report):
    ctypes.string_at(0)


def peek(job, report):
    seen = {}
    for name in job["paths"]:
        try:
            seen[name] = Path(name).read_bytes()[:200].decode(errors="replace")
        except OSError:
            seen[name] = None
    return {"seen": seen, "capabilities": [line for line in status() if line.startswith("Cap")]}


def status():
    return Path("/proc/self/status").read_text().splitlines()


def escape(job, report):
    # Twice forked and, where it may, in a session of its own: nobody's child and in nobody's group.
    with contextlib.suppress(OSError):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        report({"session": True})
    code = "import os, time\nif os.fork(): os._exit(0)\n{}\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    for attempt in ("os.setsid()", "os.setpgid(0, 0)"):
        trying = code.format(f"try:\n    {attempt}\nexcept OSError:\n    pass")
        orphan = subprocess.Popen([sys.executable, "-c", trying], stdout=subprocess.PIPE, text=True)
        report({"orphan": int(orphan.stdout.readline())})
    time.sleep(600)


def hoard(job, report):
    size = job["bytes"]
    told = {}
    try:
        Path("big").write_bytes(bytes(size + 1))
        told["file"] = True
    except OSError:
        told["file"] = False
    for name, path in (("memfd", ""), ("shm", "/dev/shm/esper-big")):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR) if path else os.memfd_create("m"))
            told[name] = True
        except OSError:
            told[name] = False
    Path("big").unlink(missing_ok=True)
    return told


def hoard_many(job, report):
    for number in range(1000):
        handle = os.open(f"part-{number}", os.O_CREAT | os.O_WRONLY)
        os.write(handle, bytes(job["bytes"]))
        if job["nameless"]:
            Path(f"part-{number}").unlink()
        else:
            os.close(handle)
    time.sleep(600)
