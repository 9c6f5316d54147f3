"""Runs every check over one bundle and says what was found; the entry of the sandbox.

The order is that of `esper.urabrask.checks.CHECKS`. A bundle that is not sound is not loaded; a kernel that breaks its
contract of shapes is not examined further; costs are measured only of kernels that passed everything before.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina.kernels.target import Target
from esper.urabrask.checks import CHECKS
from esper.urabrask.gauntlet import behaviour, birth, bundle, correctness, cost
from esper.urabrask.gauntlet.subject import Refuted, Subject
from esper.urabrask.tags import tags_of

if TYPE_CHECKING:
    from esper.kasmina.kernels.bundle import Bundle

__all__ = ["EXAMINATIONS", "evaluate", "warm"]

Report = Callable[[Mapping[str, Any]], None]

EXAMINATIONS: Mapping[str, Callable[[Subject], str]] = {
    "contract.shape": correctness.shapes_hold,
    "numerics.outputs": correctness.outputs_agree,
    "numerics.gradients": correctness.gradients_agree,
    "birth.parameters": birth.born_by_the_rules,
    "birth.output": birth.born_silent,
    "birth.gradient": birth.born_living,
    "behaviour.causality": behaviour.causal_as_claimed,
    "behaviour.determinism": behaviour.deterministic,
    "behaviour.purity": behaviour.pure,
    "behaviour.extremes": behaviour.extremes_as_eager,
}
_MAX_FINDING = 1000


def warm() -> None:
    """Import torch and pay for what is slow once. One thread: a verdict must not depend on how many cores are free."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    cost.warm_profiler()
    import_module("torch._export.serde.serialize")  # otherwise the first kernel waits for it
    Target.here()


class _Record:
    """What was found so far."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.checks: list[dict[str, Any]] = []
        self.figures: cost.Figures = {}

    @property
    def passed(self) -> bool:
        return all(check["passed"] for check in self.checks)

    def run(self, name: str, check: Callable[[], str]) -> bool:
        """Run one check; whatever the kernel raises refutes it."""
        self._report({"running": name})
        began = time.perf_counter()
        try:
            passed, finding = True, check()
        except bundle.Elsewhere:
            raise
        except MemoryError:
            raise
        except Refuted as error:
            passed, finding = False, str(error)
        except Exception as error:  # code of strangers may raise anything; it is what was found
            if "can't allocate memory" in str(error):
                raise
            passed, finding = False, f"expected no exception, found {type(error).__name__}: {error!s:.400}"
        result = {
            "name": name,
            "passed": passed,
            "finding": finding[:_MAX_FINDING],
            "elapsed_ms": round((time.perf_counter() - began) * 1e3, 3),
        }
        self.checks.append(result)
        self._report({"done": result})
        return passed

    def result(self, target: str, tags: tuple[str, ...] = ()) -> dict[str, Any]:
        figures = [{"name": name, "value": value, "unit": unit} for name, (value, unit) in self.figures.items()]
        return {"target": target, "checks": self.checks, "measurements": figures, "tags": list(tags)}


def evaluate(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Judge one bundle.

    Args:
        job: `bundle` (bytes), `kernel_id`, and `told`: what the library was told of it. Without a bundle: only the
            target of this machine is asked for.
        report: is told `running` (name of a check) and `done` (its result).

    Returns:
        `target`, `checks`, `measurements`, `tags`; or `elsewhere`, a sentence, when only another machine can judge it.
    """
    here = Target.here()
    if "bundle" not in job:
        return {"target": str(here)}
    record = _Record(report)
    try:
        return _examine(job, record, here)
    except bundle.Elsewhere as error:
        return {"elsewhere": str(error)}


def _examine(job: dict[str, Any], record: _Record, here: Target) -> dict[str, Any]:
    data, kernel_id = job["bundle"], job["kernel_id"]
    opened: list[Bundle] = []
    subjects: list[Subject] = []

    def integrity() -> str:
        opened.append(bundle.integrity(data, kernel_id))
        return f"{len(opened[0].members)} members of {len(data)} bytes as listed"

    def load() -> str:
        subjects.append(bundle.load(data, kernel_id, here))
        return f"{len(subjects[0].plan.parameter_specs)} parameter tensors"

    sound = (
        record.run("bundle.integrity", integrity)
        and record.run("bundle.manifest", lambda: bundle.manifest(opened[0], job["told"], here))
        and record.run("bundle.load", load)
    )
    if not sound:
        return record.result(str(here))
    subject = subjects[0]
    for name, examine in EXAMINATIONS.items():
        if not record.run(name, partial(examine, subject)) and name == "contract.shape":
            return record.result(str(here))
    if record.passed:
        record.run("cost.memory", lambda: cost.memory(subject, record.figures))
        record.run("cost.latency", lambda: cost.latency(subject, record.figures))
    record.figures["size.parameters"] = (float(subject.plan.parameters), "count")
    record.figures["size.bundle"] = (float(len(data)), "bytes")
    values = {name: value for name, (value, _) in record.figures.items()}
    return record.result(str(here), tags_of(opened[0].manifest, values))


assert (*list(EXAMINATIONS),) == tuple(spec.name for spec in CHECKS)[
    3:-2
]  # the order of the verdicts is that of the list
