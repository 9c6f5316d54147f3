"""What every benchmark prints: one JSON object a line, a median over repeated runs, and where it was measured.

`{"metric", "value", "unit", "target", "met", "context"}`; `docs/performance.md` is made from these lines. What this
machine cannot measure has the value null, and its context says why.

    report = Report("mesh")
    report.measure("unary latency", lambda: seconds_of_one_run(), unit="us", target=Target.below(1000), scale=1e6)
"""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Report", "Target", "median_of"]


@dataclass(frozen=True, slots=True)
class Target:
    """The value to reach, and from which side."""

    value: float
    """The bound itself, in the unit of the metric."""

    at_most: bool
    """Whether smaller is better."""

    @classmethod
    def below(cls, value: float) -> "Target":
        """At most `value`: latencies, sizes, overheads."""
        return cls(value, at_most=True)

    @classmethod
    def above(cls, value: float) -> "Target":
        """At least `value`: throughputs, ratios of success."""
        return cls(value, at_most=False)

    def met_by(self, value: float) -> bool:
        """Whether a measured value reaches it."""
        return value <= self.value if self.at_most else value >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


def median_of(run: Callable[[], float], repeats: int) -> tuple[float, list[float]]:
    """Median of repeated runs, and all of them; the first run beforehand warms up and is not counted."""
    run()
    values = [run() for _ in range(repeats)]
    return statistics.median(values), values


class Report:
    """Prints the metrics of one area.

    Args:
        area: name of the benchmark: `mesh`, `contracts`, ...
        packages: distributions whose versions matter here.
        stream: where lines go.
    """

    def __init__(self, area: str, packages: Sequence[str] = (), stream: TextIO | None = None) -> None:
        self.area = area
        self.missed: list[str] = []
        """Names of the metrics that did not reach their target."""
        self._stream = stream
        self._machine = _machine()
        self._versions = _versions(packages)

    def add(
        self,
        metric: str,
        value: float,
        *,
        unit: str,
        target: Target | None = None,
        runs: Sequence[float] = (),
        **sizes: Any,
    ) -> None:
        """Print one metric.

        Args:
            metric: short name, unique within the area.
            value: the median.
            unit: `us`, `ms`, `bytes`, `ratio`, `1/s`, ...
            target: what it should reach; None where there is nothing to reach.
            runs: the single values, of which smallest and largest are printed.
            sizes: what was measured: payload sizes, counts, concurrency.
        """
        met = None if target is None else target.met_by(value)
        if met is False:
            self.missed.append(metric)
        context: dict[str, Any] = {**sizes, "machine": self._machine, "versions": self._versions}
        if runs:
            context["runs"] = len(runs)
            context["range"] = [_short(min(runs)), _short(max(runs))]
        self._print(metric, _short(value), unit, target, met=met, context=context)

    def not_measured(self, metric: str, why: str, *, unit: str, target: Target | None = None) -> None:
        """Print a metric that this machine cannot give: missing is missing."""
        context = {"not measured": why, "machine": self._machine, "versions": self._versions}
        self._print(metric, None, unit, target, met=None, context=context)

    def _print(
        self, metric: str, value: float | None, unit: str, target: Target | None, *, met: bool | None, context: object
    ) -> None:
        line = {
            "metric": f"{self.area}: {metric}",
            "value": value,
            "unit": unit,
            "target": None if target is None else str(target),
            "met": met,
            "context": context,
        }
        print(json.dumps(line), file=self._stream or sys.stdout, flush=True)

    def measure(
        self,
        metric: str,
        run: Callable[[], float],
        *,
        unit: str,
        target: Target | None = None,
        repeats: int = 5,
        scale: float = 1.0,
        **sizes: Any,
    ) -> float:
        """Run something repeatedly, print the median of what it returns times `scale`, and return that."""
        value, runs = median_of(run, repeats)
        self.add(metric, value * scale, unit=unit, target=target, runs=[r * scale for r in runs], **sizes)
        return value * scale


def _short(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{usable} cores of {cpu}{load}, {platform.system()}"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
