"""What everything that can fail around a seed costs a training run; prints a JSON line for each fault.

    python -m loadtests.faults                      # all of them: half a minute
    python -m loadtests.faults compiled isolation   # those whose name has one of these words

Each fault is injected in the middle of a short run, which is compared, bit for bit and step by step, with the same run
without growth. The status is 1 where a fault does not cost what its row says.
"""

import json
import re
import sys
import warnings
from typing import Any

import torch

from loadtests._fault_kernels import kernel_rows
from loadtests._fault_planes import cache_rows, part_rows, plane_rows, wire_rows
from loadtests._fault_rows import Row
from loadtests._faults import Found, portable, young_objects

__all__ = ["GROUPS", "line"]

GROUPS = {
    "kernel": kernel_rows,
    "control plane": plane_rows,
    "wire": wire_rows,
    "cache": cache_rows,
    "part": part_rows,
}
"""Where faults come from, and what makes the rows."""


def line(group: str, row: Row, found: Found) -> dict[str, Any]:
    """One fault and what came of it, as JSON types."""
    return {
        "group": group,
        "where": row.where,
        "fault": row.fault,
        "host_differs_from_step": found.differs,
        "reached_the_loop": found.escaped,
        "answer": row.answer,
        "seed_steps_missed": found.missed if row.answer == "portable" else None,
        "stage": found.stage,
        "circuits": sorted(found.circuits),
        "log": [_short(said) for said in dict.fromkeys(found.log)],
        "lines": len(found.log),
        "problems": row.problems(found),
    }


def _short(said: str) -> str:
    """Without what differs from run to run: numbers of kernels, times, addresses."""
    said = re.sub(r"sha256:([0-9a-f]{6})[0-9a-f]{58}", r"sha256:\1", said)
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", re.sub(r"\d+\.\d+ ms", "... ms", said))


def main() -> int:
    """Inject what was asked for."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    words = sys.argv[1:]
    portable()
    wrong = 0
    with young_objects():
        for group, rows in GROUPS.items():
            for row in rows():
                if words and not any(word in row.name for word in words):
                    continue
                said = line(group, row, row.run())
                wrong += bool(said["problems"])
                print(json.dumps(said), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
