"""What a process can take from itself before it runs a stranger's code: life after its parent, network, files, memory.

Linux only, without privileges and without helpers: `prctl`, `capset`, a seccomp filter, Landlock, `setrlimit`. Each
function answers whether its limit holds now; the caller says so to people instead of believing it. Call them while the
process has one thread: all but the last bind the calling thread and those that it starts afterwards.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["die_with_parent", "drop_privileges", "forbid_calls", "limit_address_space", "restrict_files"]

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2

# Instructions of classic BPF over struct seccomp_data: load a word, jump if equal, jump if greater or equal, return.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | errno.EACCES

_X32_BIT = 0x40000000
"""x86-64 answers to a second numbering of its calls, which would walk past the filter."""

_NETWORK = ("socket", "io_uring_setup")
"""Sockets of every family, and the ring that can open them."""
_FORBIDDEN = (
    # Reaching into other processes.
    *("ptrace", "process_vm_readv", "process_vm_writev"),
    # Leaving the process group, as whose members all descendants are found and killed.
    *("setsid", "setpgid"),
    # Memory that belongs to no address space and to no directory, where nobody would count it.
    *("memfd_create", "memfd_secret", "shmget", "msgget", "mq_open"),
)

# call -> its number on x86-64, on AArch64
_NUMBERS: Mapping[str, tuple[int, int]] = {
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "shmget": (29, 194),
    "socket": (41, 198),
}
# machine -> AUDIT_ARCH, place of its numbers in the table
_ARCHITECTURES: Mapping[str, tuple[int, int]] = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_CAPABILITY_VERSION = 0x20080522
_CAPABILITIES = 64
"""More than any kernel has; dropping one that does not exist fails without harm."""

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_CHANGE_DIR = sum(1 << bit for bit in range(4, 13))  # remove and make entries of every kind
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_ON_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> bool:
    """Have the kernel kill this process when the thread that started it ends, be it by SIGKILL.

    Exits at once when the parent is gone already.
    """
    if not sys.platform.startswith("linux"):
        return False
    held = _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent:
        os._exit(1)  # it died before the call above: nobody is left to answer to
    return bool(held)


def _filter(arch: int, numbers: tuple[int, ...]) -> bytes:
    """A filter that refuses the numbered calls with EACCES, and every call of a foreign numbering."""

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    count = len(numbers)
    program = [
        instruction(_LOAD, 4),  # seccomp_data.arch
        instruction(_EQUAL, arch, 0, count + 3),
        instruction(_LOAD, 0),  # seccomp_data.nr
        instruction(_AT_LEAST, _X32_BIT, count + 1, 0),
    ]
    program += [instruction(_EQUAL, number, count - at, 0) for at, number in enumerate(numbers)]
    program += [instruction(_RETURN, _ALLOW), instruction(_RETURN, _REFUSE)]
    return b"".join(program)


def forbid_calls(*, network: bool) -> bool:
    """Refuse reaching into other processes, leaving the process group and uncounted memory; the network if not wanted.

    Args:
        network: True leaves the process its sockets.
    """
    known = _ARCHITECTURES.get(platform.machine())
    if known is None or not sys.platform.startswith("linux"):
        return False
    arch, place = known
    code = _filter(arch, tuple(_NUMBERS[name][place] for name in (*_FORBIDDEN, *(() if network else _NETWORK))))
    memory = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(code) // 8, ctypes.addressof(memory))
    libc = _libc()
    # Without it a set-uid program could be run under a filter of ours; the kernel insists for unprivileged callers.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def drop_privileges() -> bool:
    """Give up every capability for good: what is left to root is what its user number owns."""
    if not sys.platform.startswith("linux"):
        return False
    libc = _libc()
    # Otherwise each program that root starts would have them all again.
    for capability in range(_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    return bool(libc.capset(struct.pack("Ii", _CAPABILITY_VERSION, 0), bytes(24)) == 0)


def restrict_files(*, readable: Iterable[Path], writable: Iterable[Path]) -> bool:
    """Leave reading to what lies under `readable` and `writable`, writing to `writable`, signals to own descendants.

    Paths that do not exist are passed over. Executing is not restricted, reading a program is.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = _libc()
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        return False
    reading = _READ_FILE | _READ_DIR
    everything = reading | _WRITE_FILE | _CHANGE_DIR | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)
    # struct landlock_ruleset_attr grew with its versions: files, network, scopes.
    attributes = struct.pack("QQQ", everything, 0, _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS)
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, 24 if abi >= 6 else 8, 0)
    if ruleset < 0:
        return False
    try:
        for paths, rights in ((readable, reading), (writable, everything)):
            for path in paths:
                _allow(libc, ruleset, path, rights)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            return False
        return bool(libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what does not exist cannot be read either
    try:
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & _ON_FILES, handle)
        libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(handle)


def limit_address_space(extra_bytes: int) -> bool:
    """Refuse memory beyond what is mapped now plus `extra_bytes`: allocations fail before the machine suffers."""
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + extra_bytes,) * 2)
    except (OSError, ValueError):
        return False
    return True
