"""Judges every architecture of the zoo and writes docs/compatibility.md from the lines that are printed.

python -m loadtests.write_compatibility
"""

import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
HEAD = """\
# Compatibility

Made by `make docs-compatibility` from what `python -m loadtests.compatibility` prints; do not edit. The architectures
are those of [loadtests/zoo](../loadtests/zoo): random weights, small configurations, nothing downloaded. {versions}.

* *Dormant*: outputs, gradients, `state_dict` (keys and values), types of modules and random state of the wrapped
  network are those of the network alone, bit for bit, over three optimizer steps, all sampled, and in evaluation.
* *Sites*: places where a seed can stand; all of them held one at the same time, and computed with it.
* *Grown*: up to three seeds (a layer in series, one in parallel, a span) were grafted without changing the output,
  learnt, were saved and loaded into a fresh network that went on in the same bits, and were culled without a trace.
* *Exported*: `torch.export` of the grown network computes what the network computes; "host neither" where the network
  alone cannot be exported.

**{supported} of {total} are supported ({share:.0%}).**

"""


def judge() -> list[dict[str, Any]]:
    """Run the suite; its JSON lines as objects."""
    command = [sys.executable, "-m", "loadtests.compatibility"]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(json.loads(line))
    if process.returncode:
        sys.exit(f"compatibility: expected the suite to end with 0, found {process.returncode}")
    return lines


def page(lines: list[dict[str, Any]]) -> str:
    """The page."""
    supported = sum(not line["problems"] for line in lines)
    packages = ("torch", "transformers", "torch-geometric", "lightning")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    head = HEAD.format(versions=versions, supported=supported, total=len(lines), share=supported / len(lines))
    rows = [_row(line) for line in sorted(lines, key=lambda line: (line["family"], line["name"]))]
    titles = ("architecture", "family", "library", "parameters", "sites", "dormant", "grown", "exported")
    table = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n"
    return head + table + "".join(rows) + _reasons(lines)


def _row(line: dict[str, Any]) -> str:
    refused = bool(line["refused"])
    dormant = "refused" if refused else "differs" if line["differs"] else "identical"
    grown = "no" if line["failed"] or line["unable"] or not line["grown"] else "yes"
    exported = "yes" if not line["export"] else "host neither" if line["bare_export"] else "no"
    if grown == "no":
        exported = "-"
    cells = (
        line["name"],
        line["family"],
        line["library"],
        f"{line['parameters']:,}",
        line["sites"],
        dormant,
        grown,
        exported,
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def _reasons(lines: list[dict[str, Any]]) -> str:
    out = ["\n## Not supported, and why\n"]
    out += [f"* {line['name']}: {'; '.join(line['problems'])}" for line in lines if line["problems"]]
    out.append("\n## Hosts that `torch.export` does not take, grown or alone\n")
    out += [f"* {line['name']}: `{line['bare_export']}`" for line in lines if line["bare_export"]]
    out.append("\n## Modules that were refused as sites\n")
    out.append("A network is supported all the same where others of its modules can grow.\n")
    modules, hosts = Counter[str](), Counter[str]()
    for line in lines:
        # Shapes and counts differ from host to host; the kind of reason is what is counted.
        for reason, count in line["refusals"].items():
            kind = reason.partition(" (")[0]
            modules[kind] += count
            hosts[kind] += 1
    out += ["| reason | modules | architectures |", "|---|---|---|"]
    out += [f"| {kind} | {count} | {hosts[kind]} |" for kind, count in modules.most_common()]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(judge()), encoding="utf-8")
