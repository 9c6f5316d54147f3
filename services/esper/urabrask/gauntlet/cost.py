"""cost.*: memory and time of forward and backward beside eager on this machine."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from esper.urabrask.checks import LATENCY_CEILING, LATENCY_FLOOR_US, MEMORY_CEILING, MEMORY_FLOOR_BYTES
from esper.urabrask.gauntlet.subject import Refuted, Subject

__all__ = ["Figures", "latency", "memory", "warm_profiler"]

_BUDGET_S = 0.35
"""Time that the measurement of latency may take."""
_MIN_REPEATS, _MAX_REPEATS = 7, 41

Figures = dict[str, tuple[float, str]]
"""Name -> value and unit."""


@dataclass(frozen=True)
class _Pass:
    """Forward and backward of one module on one input."""

    module: nn.Module
    x: Tensor
    cotangent: Tensor

    def forward(self) -> Tensor:
        out: Tensor = self.module(self.x)
        return out

    def step(self) -> None:
        torch.autograd.backward(self.forward(), self.cotangent)
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None


def _passes(subject: Subject) -> tuple[_Pass, _Pass]:
    extents = subject.nominal_extents
    x, cotangent = subject.input(extents, seed=31), subject.cotangent(extents, seed=32)
    eager = subject.eager(subject.generic_parameters())
    return _Pass(subject.generic(), x.clone().requires_grad_(), cotangent), _Pass(eager, x.requires_grad_(), cotangent)


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
    kernel, eager = _passes(subject)
    kernel.step()
    eager.step()
    found, usual = _peak(kernel.step), _peak(eager.step)
    ratio = found / max(usual, 1)
    figures["memory.peak"] = (float(found), "bytes")
    figures["memory.eager.peak"] = (float(usual), "bytes")
    figures["memory.ratio"] = (round(ratio, 4), "ratio")
    if found > MEMORY_FLOOR_BYTES and ratio > MEMORY_CEILING:
        raise Refuted(
            f"expected a peak of at most {MEMORY_CEILING:g} times eager's, found {ratio:.1f} times ({found} bytes)"
        )
    return f"peak {found} bytes, {ratio:.2f} times eager's, at input {tuple(kernel.x.shape)}"


def latency(subject: Subject, figures: Figures) -> str:
    """cost.latency: medians of interleaved repeats, so that a disturbance of the machine hits both sides.

    Counted is processor time of the process (one thread, so on an idle machine the same as wall time): an engine that
    shares its machine with a trainer would otherwise measure the trainer.
    """
    kernel, eager = _passes(subject)
    works: dict[str, Callable[[], object]] = {
        "forward": _without_grad(kernel),
        "eager.forward": _without_grad(eager),
        "step": kernel.step,
        "eager.step": eager.step,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(2):
        for work in works.values():
            work()
    end = time.perf_counter() + _BUDGET_S
    while len(times["step"]) < _MIN_REPEATS or (time.perf_counter() < end and len(times["step"]) < _MAX_REPEATS):
        for name, work in works.items():
            began = time.process_time_ns()
            work()
            times[name].append((time.process_time_ns() - began) / 1e3)
    middle = {name: statistics.median(values) for name, values in times.items()}
    # Ratios of pairs: what slowed the machine for a while slowed both of a pair.
    pairs = {
        name: [k / e for k, e in zip(times[name], times[f"eager.{name}"], strict=True)] for name in ("forward", "step")
    }
    ratios = {name: statistics.median(values) for name, values in pairs.items()}
    noise = _noise(pairs["step"])
    figures["latency.forward.p50"] = (round(middle["forward"], 3), "us")
    figures["latency.step.p50"] = (round(middle["step"], 3), "us")
    figures["latency.backward.p50"] = (round(max(middle["step"] - middle["forward"], 0.0), 3), "us")
    figures["latency.eager.forward.p50"] = (round(middle["eager.forward"], 3), "us")
    figures["latency.eager.step.p50"] = (round(middle["eager.step"], 3), "us")
    figures["latency.forward.ratio"] = (round(ratios["forward"], 4), "ratio")
    figures["latency.step.ratio"] = (round(ratios["step"], 4), "ratio")
    figures["latency.noise"] = (round(noise, 4), "ratio")
    figures["latency.repeats"] = (float(len(times["step"])), "count")
    # A refusal is final, so it goes by the fastest repeats: a disturbance slows, it never speeds up.
    best = {name: min(values) for name, values in times.items()}
    share = best["step"] / best["eager.step"]
    if best["step"] > LATENCY_FLOOR_US and share > LATENCY_CEILING:
        raise Refuted(f"expected forward and backward within {LATENCY_CEILING:g} times eager's time, found {share:.1f}")
    return (
        f"forward and backward {middle['step']:.0f} us, {ratios['step']:.2f} times eager's "
        f"(noise {noise:.2f}, {len(times['step'])} interleaved repeats)"
    )


def _without_grad(one: _Pass) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            one.forward()

    return forward


def _noise(ratios: list[float]) -> float:
    """Half the distance between the quartiles of the paired ratios, as a share of their median."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (high - low) / 2 / middle
