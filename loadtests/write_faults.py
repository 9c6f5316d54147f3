"""Injects every fault and writes docs/faults.md from the lines that are printed.

python -m loadtests.write_faults
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "faults.md"
HEAD = (ROOT / "loadtests" / "faults_head.md").read_text(encoding="utf-8")
ANSWERS = {
    "portable": "portable graph",
    "identity": "taken out, site closed",
    "cancelled": "never attached",
    "": "-",
}


def inject() -> list[dict[str, Any]]:
    """Run the program; its JSON lines as objects."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "loadtests.faults"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(json.loads(line))
    if process.returncode:
        sys.exit(f"faults: expected the program to end with 0, found {process.returncode}")
    return lines


def page(lines: list[dict[str, Any]]) -> str:
    """The page."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["group"], []).append(line)
    differ = sum(line["host_differs_from_step"] > 0 for line in lines)
    total = f"**{len(lines)} faults; in {differ} of them the host differs from one without growth in any bit.**\n"
    tables = [
        _section("Kernels", groups["kernel"], _kernel, ("where", "fault", "host", "seed", "answer", "log")),
        _section("The control plane", groups["control plane"], _around, ("where", "fault", "host", "seed", "log")),
        _section("The wire", groups["wire"], _around, ("where", "fault", "host", "seed", "log")),
        _section("The cache", groups["cache"], _around, ("where", "fault", "host", "seed", "log")),
        _parts(groups["part"]),
    ]
    return HEAD + total + "".join(tables)


def _section(title: str, lines: Iterable[dict[str, Any]], row: Any, heads: tuple[str, ...]) -> str:
    head = f"\n## {title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    return head + "".join(f"| {' | '.join(row(line))} |\n" for line in lines)


def _host(line: dict[str, Any]) -> str:
    if line["reached_the_loop"]:
        return "the exception reaches the loop"
    return f"from step {line['host_differs_from_step']}" if line["host_differs_from_step"] else "0"


def _kernel(line: dict[str, Any]) -> list[str]:
    missed = line["seed_steps_missed"]
    seed = str(missed) if missed is not None else "all" if line["answer"] else "-"
    return [line["where"], line["fault"], _host(line), seed, ANSWERS[line["answer"]], _log(line)]


def _around(line: dict[str, Any]) -> list[str]:
    return [f"`{line['where']}`", line["fault"], _host(line), line["stage"], _log(line)]


def _log(line: dict[str, Any]) -> str:
    if not line["log"]:
        return "nothing"
    first = line["log"][0].replace("|", "/")
    more = len(line["log"]) - 1
    return f"`{first[:150]}`" + (f" and {more} more" if more else "")


def _parts(lines: Iterable[dict[str, Any]]) -> str:
    classes: dict[str, list[str]] = {}
    differ: dict[str, int] = {}
    for line in lines:
        name, _, method = line["where"].partition(".")
        classes.setdefault(name, []).append(f"`{method}`")
        differ[name] = differ.get(name, 0) + (line["host_differs_from_step"] > 0)
    rows = [f"| `{name}` | {', '.join(methods)} | {differ[name]} |\n" for name, methods in classes.items()]
    return (
        "\n## Growth's own parts\n\nEach of these methods raises, one at a time, from the second boundary on.\n\n"
        + ("| part | methods | host |\n|---|---|---|\n" + "".join(rows))
    )


if __name__ == "__main__":
    PAGE.write_text(page(inject()), encoding="utf-8")
