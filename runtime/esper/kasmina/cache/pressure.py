"""How much memory this process may still take, and what the cache gives up when it becomes scarce.

| available | compressed bundles | loaded kernels |
|---|---|---|
| 20 % or more | all that was configured | all that was configured |
| down to 12.5 % | less and less, to nothing | all that was configured |
| down to 5 % | nothing | less and less, to those in use |
| less | nothing | those in use, and nothing is fetched ahead |

Available is the least of what the machine and each memory control group around this process has left, as a share of its
whole; page cache that the kernel would drop counts as available. The table has no memory of its own: what is given up
becomes available, so the cache settles where both agree, and grows again, load by load, when others let go.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

__all__ = ["Allowance", "allowance", "available_share"]

_CALM, _SCARCE, _TIGHT = 0.20, 0.125, 0.05


class Allowance(NamedTuple):
    """Shares of the configured bytes that may be used now."""

    compressed: float
    loaded: float
    ahead: bool
    """Whether kernels may be fetched that nobody needs yet."""


def allowance(available: float) -> Allowance:
    """The table above.

    Args:
        available: share of memory, 0 to 1.
    """
    compressed = (available - _SCARCE) / (_CALM - _SCARCE)
    loaded = (available - _TIGHT) / (_SCARCE - _TIGHT)
    return Allowance(min(1.0, max(0.0, compressed)), min(1.0, max(0.0, loaded)), available >= _TIGHT)


def available_share(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Share of memory that is available to this process, 0 to 1.

    Args:
        groups: where control groups are mounted.
        own: the file that names the groups of this process.
    """
    machine = psutil.virtual_memory()
    return min([machine.available / machine.total, *_group_shares(groups, own, machine.total)])


def _group_shares(groups: Path, own: Path, machine_bytes: int) -> list[float]:
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # not Linux, or no control groups
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = Path(path.lstrip("/"))
        # A limit binds all groups below it. In a container the outer ones are not to be seen, and need not be.
        found += [_share(root / folder, names, machine_bytes) for folder in (inside, *inside.parents)]
    return [share for share in found if share is not None]


def _share(folder: Path, names: tuple[str, str, str], machine_bytes: int) -> float | None:
    """What is left of one group's limit; None where it has none."""
    try:
        limit = int((folder / names[0]).read_text())
        used = int((folder / names[1]).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or the word "max"
        return None
    if not 0 < limit < machine_bytes:
        return None
    return max(0.0, 1 - (used - int(statistics.get(names[2], 0))) / limit)
