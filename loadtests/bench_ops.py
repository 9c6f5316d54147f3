"""What the device operations move per second, against a plain copy on the same device, and against unfused torch.

    python -m loadtests.bench_ops

Prints JSON lines (`_report.py`). Bandwidth counts what an operation must move at least: each input read once, each
output written once. On a GPU activations are several times the L2 cache, times come from events on the stream, and a
copy is timed right after each run, so ratios are medians over pairs. Where there is no GPU its rows say "not measured",
and the CPU's say what the operations, plain torch there, cost against fewer statistics taken one by one.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina import ops
from loadtests._report import Report, Target

PAIRS = 25
_AHEAD_CYCLES = 2_000_000
"""About a millisecond."""
COPY = 0.9
"""Share of the bandwidth of a copy that is asked for."""


@dataclass(frozen=True)
class Shape:
    """An activation to measure on."""

    name: str
    on_gpu: tuple[int, ...]
    on_cpu: tuple[int, ...]
    feature_dim: int


SHAPES = (
    Shape("features last", (128, 1024, 1024), (16, 128, 256), -1),
    Shape("features second", (160, 256, 56, 56), (8, 64, 32, 32), 1),
)
SEEDS = (1, 4)


@dataclass(frozen=True)
class Work:
    """An operation, the same without fusion, and how often it passes over the activation."""

    name: str
    fused: Callable[[], object]
    unfused: Callable[[], object]
    passes: int
    target: Target | None = None


def _unfused_blend(y: Tensor, deltas: list[Tensor], alphas: Tensor) -> Tensor:
    for index, delta in enumerate(deltas):
        y = y + (alphas[index] * delta).to(y.dtype)
    return y


def _unfused_health(x: Tensor, feature_dim: int) -> list[Tensor]:
    """The statistics of `ops.health`, less its sketch, one after the other."""
    over = [d for d in range(x.dim()) if d != feature_dim % x.dim()]
    variance, mean = torch.var_mean(x, over, correction=0)
    return [mean, variance, torch.linalg.vector_norm(x), x.isfinite().sum(over), (x.abs() <= 0.0).sum(over)]


def _works(shape: Shape, dtype: torch.dtype, device: str) -> list[Work]:
    y = torch.randn(shape.on_gpu if device == "cuda" else shape.on_cpu, device=device).to(dtype)
    deltas = [torch.randn_like(y) for _ in range(max(SEEDS))]
    alphas = torch.full((len(deltas),), 0.5, device=device)
    dim = shape.feature_dim

    def both(count: int) -> Callable[[], object]:
        return lambda: _unfused_health(_unfused_blend(y, deltas[:count], alphas), dim)

    works = [
        Work("health", lambda: ops.health(y, feature_dim=dim), lambda: _unfused_health(y, dim), 1, Target.above(COPY))
    ]
    for count in SEEDS:
        some, some_alphas = deltas[:count], alphas[:count]
        works += [
            Work(
                f"blend of {count}",
                lambda some=some, a=some_alphas: ops.blend(y, some, a),  # type: ignore[misc]  # bound, not inferred
                lambda some=some, a=some_alphas: _unfused_blend(y, some, a),  # type: ignore[misc]
                count + 2,
                Target.above(COPY),
            ),
            Work(
                f"blend of {count} and health",
                lambda some=some, a=some_alphas: ops.blend_health(y, some, a, feature_dim=dim),  # type: ignore[misc]
                both(count),
                count + 2,
                Target.above(COPY),
            ),
        ]
    return works


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.thread_time()
        run()
        return time.thread_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch
    # The device is kept busy until all is in its queue: what counts is its time, not that of Python.
    torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]  # noqa: SLF001  # there is no public one
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _against(run: Callable[[], object], other: Callable[[], object], device: str) -> list[float]:
    """Seconds of one over those of the other, alternating."""
    for _ in range(2):
        run(), other()
    return [_seconds(run, device) / _seconds(other, device) for _ in range(PAIRS)]


def _label(work: Work, shape: Shape, dtype: torch.dtype) -> str:
    return f"{work.name}, {shape.name}, {str(dtype).removeprefix('torch.')}"


def _gpu(report: Report) -> None:
    name = torch.cuda.get_device_name()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            source = torch.randn(shape.on_gpu, device="cuda").to(dtype)
            target = torch.empty_like(source)
            size = source.numel() * source.element_size()
            copies = [2 * size / _seconds(lambda s=source, t=target: t.copy_(s), "cuda") for _ in range(PAIRS)]  # type: ignore[misc]
            label = f"device copy, {shape.name}, {str(dtype).removeprefix('torch.')}"
            report.add(label, statistics.median(copies) / 1e9, unit="GB/s", bytes=size, device=name)
            for work in _works(shape, dtype, "cuda"):
                slower = _against(work.fused, lambda s=source, t=target: t.copy_(s), "cuda")  # type: ignore[misc]
                ratios = [work.passes / 2 / ratio for ratio in slower]
                label = f"{_label(work, shape, dtype)}, bytes per second / device copy"
                report.add(label, statistics.median(ratios), unit="ratio", target=work.target, runs=ratios, device=name)
                ratios = _against(work.fused, work.unfused, "cuda")
                label = f"{_label(work, shape, dtype)}, time / unfused torch"
                report.add(label, statistics.median(ratios), unit="ratio", runs=ratios, device=name)


def _no_gpu(report: Report) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            names = ["health", *(f"blend of {count}{more}" for count in SEEDS for more in ("", " and health"))]
            for name in names:
                label = f"{name}, {shape.name}, {str(dtype).removeprefix('torch.')}, bytes per second / device copy"
                report.not_measured(label, "no CUDA device", unit="ratio", target=Target.above(COPY))


def _cpu(report: Report) -> None:
    for shape in SHAPES:
        for work in _works(shape, torch.float32, "cpu"):
            ratios = _against(work.fused, work.unfused, "cpu")
            label = f"{_label(work, shape, torch.float32)}, CPU, time / unfused torch"
            report.add(label, statistics.median(ratios), unit="ratio", runs=ratios, shape=list(shape.on_cpu))


def _call(report: Report) -> None:
    """What it costs to go through an operator that is registered in Python, on a tensor of nothing."""
    y, alphas, count = torch.ones(8, requires_grad=True), torch.ones(1), 200
    deltas = [torch.ones(8, requires_grad=True)]

    def through(function: Callable[..., object]) -> Callable[[], float]:
        def run() -> float:
            start = time.thread_time()
            for _ in range(count):
                function(y, deltas, alphas)
            return (time.thread_time() - start) / count

        return run

    report.measure("call of the operator, forward", through(torch.ops.esper.blend), unit="us", scale=1e6)
    report.measure("call of the formula, forward", through(ops.blend), unit="us", scale=1e6)


def main() -> None:
    """Print the figures of this machine."""
    torch.set_num_threads(1)
    report = Report("ops", packages=("torch", "triton"))
    (_gpu if torch.cuda.is_available() else _no_gpu)(report)
    _cpu(report)
    _call(report)


if __name__ == "__main__":
    main()
