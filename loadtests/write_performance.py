"""Runs every benchmark and writes docs/performance.md from the lines that they print.

    python -m loadtests.write_performance            # all of them: some minutes
    python -m loadtests.write_performance contracts  # some of them; the sections of the others stay as they are

Each section of the page is what one program printed, on the machine that the section names.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
HEAD = """\
# Performance

Made by `make docs-performance` from what the programs under [loadtests/](../loadtests) print; do not edit. Values are
medians of repeated runs; ratios carry over to other machines, absolute times do not.
"""


def areas() -> list[str]:
    """Names of all benchmarks: loadtests/bench_NAME.py."""
    return sorted(path.stem.removeprefix("bench_") for path in (ROOT / "loadtests").glob("bench_*.py"))


def run(area: str) -> list[dict[str, Any]]:
    """Run one benchmark; its JSON lines as objects."""
    command = [sys.executable, "-m", f"loadtests.bench_{area}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = []
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            lines.append(json.loads(line))
            print(line, flush=True)
    return lines


def section(area: str, lines: list[dict[str, Any]]) -> str:
    """One section of the page as Markdown."""
    context = lines[0]["context"]
    versions = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
    machine = re.sub(r", load [\d.]+", "", context["machine"])
    out = [
        f"\n## {area}\n",
        f"`make bench-{area}` on {machine}; {versions}.\n",
        "| metric | value | target | met | sizes |",
    ]
    out.append("|---|---|---|---|---|")
    for line in lines:
        name = line["metric"].partition(": ")[2]
        met = {None: "", True: "yes", False: "**no**"}[line["met"]]
        hidden = {"machine", "versions", "runs", "range"}
        why = line["context"].pop("not measured", "")
        sizes = why or ", ".join(f"{key} {size}" for key, size in line["context"].items() if key not in hidden)
        value = "not measured" if line["value"] is None else f"{line['value']:g} {line['unit']}"
        out.append(f"| {name} | {value} | {line['target'] or ''} | {met} | {sizes} |")
    return "\n".join(out) + "\n"


def split(page: str) -> dict[str, str]:
    """The sections that a page has, by area."""
    parts = re.split(r"(?m)^(?=\n## )|(?<=\n)(?=## )", page)
    found = {}
    for part in parts:
        match = re.match(r"\s*## (\S+)\n", part)
        if match:
            found[match[1]] = "\n" + part.strip() + "\n"
    return found


def main() -> None:
    """Run what was asked for and write the page."""
    wanted = sys.argv[1:] or areas()
    if unknown := sorted(set(wanted) - set(areas())):
        sys.exit(f"benchmarks: expected some of {', '.join(areas())}, found {', '.join(unknown)}")
    sections = split(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    for area in wanted:
        sections[area] = section(area, run(area))
    PAGE.write_text(HEAD + "".join(sections[name] for name in sorted(sections)), encoding="utf-8")


if __name__ == "__main__":
    main()
