"""Makes a trace of kernel requests from the logs of finished runs, for `bench_cache` and for tests of cache policies.

    esper --home runs-home train digits
    python -m loadtests.record_kernels runs-home > loadtests/traces/digits.jsonl

The runtime of a run logs what it asks of its kernel cache, and at the end what the cache counted; nothing has to be
switched on. The trace holds for each run, in order, which kernels were asked for, whether ahead (Tamiyo named them as
likely) or for a seed, and the size of each bundle.
"""

import json
import sys
from pathlib import Path
from typing import Any


def record(home: Path) -> dict[str, Any]:
    """The trace of all runs of a home directory that asked for kernels."""
    sizes: dict[str, int] = {}
    order: dict[str, int] = {}
    for path in (home / "tolaria" / "kernels").glob("*/*.kernel"):
        sizes["sha256:" + path.stem] = path.stat().st_size
    runs = []
    for log in sorted((home / "tolaria" / "runs").glob("*/log.txt")):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        asks = [
            {"ahead": line["ahead"], "kernels": [order.setdefault(k, len(order)) for k in line["kernel_ids"]]}
            for line in lines
            if line["event"] == "kernels_asked"
        ]
        closed = [line for line in lines if line["event"] == "kernel_cache_closed"]
        if asks:
            names = ("hits", "misses", "memory_hits", "disk_hits", "fetches")
            counted = {name: sum(line[name] for line in closed) for name in names}
            runs.append({"run": log.parent.name, "counted": counted, "asks": asks})
    return {"bundle_bytes": [sizes[kernel_id] for kernel_id in order], "runs": runs}


def main() -> None:
    """Print the trace as JSON lines: the sizes of all bundles, then one run a line."""
    trace = record(Path(sys.argv[1]))
    print(json.dumps({"bundle_bytes": trace["bundle_bytes"]}))
    for run in trace["runs"]:
        print(json.dumps(run))


if __name__ == "__main__":
    main()
