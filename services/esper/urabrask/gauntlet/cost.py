"""cost.*: memory and time of forward and backward beside eager on this machine.

The figures are of what the runtime would run; whatever is judged is refused where it is far too costly.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from esper.kasmina.kernels.kernel import Kernel, KernelModule
from esper.kasmina.kernels.pace import shape_classes
from esper.kasmina.kernels.timing import Step, interleaved, paired
from esper.urabrask.checks import LATENCY_CEILING, LATENCY_FLOOR_US, MEMORY_CEILING, MEMORY_FLOOR_BYTES
from esper.urabrask.gauntlet.subject import Refuted, Subject

__all__ = ["Figures", "latency", "memory", "warm_profiler"]

_BUDGET_S = {"small": 0.1, "nominal": 0.35, "large": 0.35}
"""Time that the measurement of latency may take at each shape class."""
_MIN_REPEATS, _MAX_REPEATS = 7, 41

Figures = dict[str, tuple[float, str]]
"""Name -> value and unit."""


def _steps(subject: Subject, kernel: Kernel, extents: Sequence[int]) -> tuple[Step, Step]:
    """A kernel and eager."""
    x, cotangent = subject.input(extents, seed=31), subject.cotangent(extents, seed=32)
    values = subject.generic_parameters()
    module, eager = KernelModule(kernel, values), subject.eager(values)
    return Step(module, x.clone().requires_grad_(), cotangent), Step(eager, x.requires_grad_(), cotangent)


def warm_profiler() -> None:
    """Pay for the profiler's first start (about a second) before a kernel waits for it."""
    _peak(lambda: torch.zeros(1))


def _peak(work: Callable[[], object]) -> int:
    """Most bytes held at once of what `work` allocates through torch."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    held = peak = 0
    for size in _allocations(watched):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(watched: profile) -> Iterator[int]:
    inner = watched.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    for event in inner.kineto_results.events():
        if event.name() == "[memory]":
            yield event.nbytes()  # type: ignore[attr-defined]  # in torch, not in its stubs


def memory(subject: Subject, figures: Figures) -> str:
    """cost.memory: peak of one forward and backward, beyond input and parameters."""
    if subject.kernel is not subject.running:
        _peaks(subject, subject.kernel)
    found, usual = _peaks(subject, subject.running)
    ratio = found / max(usual, 1)
    figures["memory.peak"] = (float(found), "bytes")
    figures["memory.eager.peak"] = (float(usual), "bytes")
    figures["memory.ratio"] = (round(ratio, 4), "ratio")
    shape = subject.shape(subject.nominal_extents, subject.signature.in_features)
    return f"peak {found} bytes, {ratio:.2f} times eager's, at input {shape}"


def _peaks(subject: Subject, kernel: Kernel) -> tuple[int, int]:
    ours, eager = _steps(subject, kernel, subject.nominal_extents)
    ours()
    eager()
    found, usual = _peak(ours), _peak(eager)
    ratio = found / max(usual, 1)
    if found > MEMORY_FLOOR_BYTES and ratio > MEMORY_CEILING:
        raise Refuted(
            f"expected a peak of at most {MEMORY_CEILING:g} times eager's, found {ratio:.1f} times ({found} bytes)"
        )
    return found, usual


def latency(subject: Subject, figures: Figures) -> str:
    """cost.latency: medians of interleaved repeats, at each shape class for a kernel that was compiled."""
    running = subject.running
    if subject.kernel is not running:
        _times(subject, subject.kernel, subject.nominal_extents, 0.0)
    # What runs of a portable kernel is eager itself: there is nothing to be told apart by shape.
    classes = shape_classes(subject.plan) if running.compiled else {"nominal": subject.nominal_extents}
    said = []
    for name, extents in classes.items():
        times = _times(subject, running, extents, _BUDGET_S[name])
        forward, step = (paired(times[what], times[f"eager.{what}"]) for what in ("forward", "step"))
        figures[f"latency.{name}.positions"] = (float(math.prod(extents)), "count")
        figures[f"latency.{name}.forward.ratio"] = (round(forward.ratio, 4), "ratio")
        figures[f"latency.{name}.step.ratio"] = (round(step.ratio, 4), "ratio")
        figures[f"latency.{name}.noise"] = (round(step.noise, 4), "ratio")
        said.append(f"{step.ratio:.2f} times eager's at {math.prod(extents)} positions (noise {step.noise:.2f})")
        if name == "nominal":
            _note(times, figures)
    return f"forward and backward {figures['latency.step.p50'][0]:.0f} us, {', '.join(said)}"


def _times(subject: Subject, kernel: Kernel, extents: Sequence[int], budget_s: float) -> dict[str, list[float]]:
    ours, eager = _steps(subject, kernel, extents)
    works: dict[str, Callable[[], object]] = {
        "forward": ours.infer,
        "eager.forward": eager.infer,
        "step": ours,
        "eager.step": eager,
    }
    times = interleaved(works, budget_s=budget_s, least=_MIN_REPEATS, most=_MAX_REPEATS)
    # A refusal is final, so it goes by the fastest repeats: a disturbance slows, it never speeds up.
    best = {what: min(values) for what, values in times.items()}
    share = best["step"] / best["eager.step"]
    if best["step"] > LATENCY_FLOOR_US and share > LATENCY_CEILING:
        raise Refuted(f"expected forward and backward within {LATENCY_CEILING:g} times eager's time, found {share:.1f}")
    return times


def _note(times: dict[str, list[float]], figures: Figures) -> None:
    """Figures of the nominal input, by which kernels of different blueprints are compared."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    figures["latency.forward.p50"] = (round(middle["forward"], 3), "us")
    figures["latency.step.p50"] = (round(middle["step"], 3), "us")
    figures["latency.backward.p50"] = (round(max(middle["step"] - middle["forward"], 0.0), 3), "us")
    figures["latency.eager.forward.p50"] = (round(middle["eager.forward"], 3), "us")
    figures["latency.eager.step.p50"] = (round(middle["eager.step"], 3), "us")
    figures["latency.forward.ratio"] = figures["latency.nominal.forward.ratio"]
    figures["latency.step.ratio"] = figures["latency.nominal.step.ratio"]
    figures["latency.noise"] = figures["latency.nominal.noise"]
    figures["latency.repeats"] = (float(len(times["step"])), "count")
