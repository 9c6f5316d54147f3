"""Ways to compile a kernel; an aggressive build tries several on the target and keeps the fastest.

Which of them wins is not known beforehand: it depends on the blueprint, its widths and the machine. Each is measured
against plain torch at the shape classes at which the gauntlet will judge the kernel, all of them in turn, so that a
disturbance of the machine hits all alike. The measurements stand in the manifest.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina.blueprints.module import BlueprintModule, torch_dtype
from esper.kasmina.kernels.bundle import Trial
from esper.kasmina.kernels.compiling import compile_program
from esper.kasmina.kernels.kernel import Compiled, Kernel, KernelModule
from esper.kasmina.kernels.load import native
from esper.kasmina.kernels.pace import shape_classes
from esper.kasmina.kernels.partition import Cut, export_partitioned
from esper.kasmina.kernels.timing import Paired, Step, interleaved, paired
from esper.kasmina.signature import Layout
from esper.mesh.errors import InternalError
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.kasmina.blueprints.plan import Plan
    from esper.kasmina.kernels.bundle import Manifest
    from esper.kasmina.kernels.target import Target

__all__ = ["Attempt", "Variant", "compile_variant", "tune", "variants"]

_log = get_logger("esper.kasmina.kernels")
_BUDGET_S = 300.0
"""Time after which no further variant is begun, by the longest so far; the forge's own limit is twice that."""
_MEASURE_S = 1.0
_LEAST, _MOST = 7, 60


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile a kernel."""

    name: str
    cut: Cut = Cut.MINIMUM
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of inductor."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A variant that was compiled."""

    variant: Variant
    forward: bytes
    backward: bytes
    recalled: tuple[int, ...]


STANDARD = Variant("minimum")
"""The one that a standard build takes."""


def variants(plan: Plan, device: str) -> list[Variant]:
    """What an aggressive build tries, the likeliest first."""
    convolves = plan.signature.layout is Layout.IMAGE or any(n.op == "conv" for n in plan.nodes)
    found = [STANDARD, Variant("everything", Cut.EVERYTHING)]
    if convolves and plan.signature.layout is Layout.IMAGE:
        found.append(Variant("channels_last", Cut.EVERYTHING, {"force_layout_optimization": True}))
    # On the CPU products are tried as templates of inductor's own beside the library's; without freezing, since the
    # weights are inputs.
    backends = {"max_autotune_gemm_backends": "CPP,ATEN"} if device == "cpu" else {}
    found.append(Variant("autotuned", Cut.EVERYTHING, {"max_autotune": True, **backends}))
    found.append(Variant("recomputed", Cut.NOTHING))
    return found


def compile_variant(plan: Plan, here: Target, variant: Variant) -> Attempt:
    """Compile both halves.

    Raises:
        InternalError: as `compile_program`.
    """
    halves = export_partitioned(plan, variant.cut, here.device)
    return Attempt(
        variant,
        compile_program(halves.forward, here, variant.options),
        compile_program(halves.backward, here, variant.options),
        halves.recalled,
    )


def tune(
    plan: Plan, manifest: Manifest, here: Target, tried: Sequence[Variant], *, budget_s: float = _BUDGET_S
) -> tuple[Attempt, tuple[Trial, ...]]:
    """The fastest variant, and what was measured: nothing where there is no choice.

    Args:
        plan: what to build.
        manifest: of the kernel.
        here: target.
        tried: the likeliest first.
        budget_s: time for compiling.

    Raises:
        InternalError: none could be compiled; the first one's reason.
    """
    attempts = _attempts(plan, here, tried, budget_s)
    if len(tried) == 1:
        return attempts[0], ()
    modules = {attempt.variant.name: _module(plan, manifest, attempt).to(here.device) for attempt in attempts}
    trials: list[Trial] = []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for extents in shape_classes(plan).values():
            for name, found in _measured(plan, modules, extents, here.device).items():
                trials.append(
                    Trial(
                        variant=name,
                        positions=math.prod(extents),
                        ratio=round(found.ratio, 4),
                        noise=round(found.noise, 4),
                    )
                )
    return min(attempts, key=lambda attempt: _cost(trials, attempt.variant.name)), tuple(trials)


def _attempts(plan: Plan, here: Target, tried: Sequence[Variant], budget_s: float) -> list[Attempt]:
    attempts: list[Attempt] = []
    failure: InternalError | None = None
    end, longest = time.monotonic() + budget_s, 0.0
    for variant in tried:
        began = time.monotonic()
        if attempts and began + longest > end:
            break
        try:
            attempts.append(compile_variant(plan, here, variant))
        except InternalError as error:
            # One that this compiler cannot do is one that does not win.
            _log.info("variant dropped", variant=variant.name, reason=error.reason, error=error.public[:500])
            failure = failure or error
        longest = max(longest, time.monotonic() - began)
    if not attempts:
        assert failure is not None
        raise failure
    return attempts


def _module(plan: Plan, manifest: Manifest, attempt: Attempt) -> KernelModule:
    compiled = Compiled(native(attempt.forward), native(attempt.backward), attempt.recalled)
    values = {
        spec.name: torch.randn(spec.shape).mul(0.1).to(torch_dtype(plan.signature.dtype))
        for spec in plan.parameter_specs
    }
    kernel = Kernel(
        kernel_id=attempt.variant.name, manifest=manifest, plan=plan, parameters=values, compiled=compiled, nbytes=0
    )
    return KernelModule(kernel, values)


def _measured(
    plan: Plan, modules: Mapping[str, KernelModule], extents: Sequence[int], device: str
) -> dict[str, Paired]:
    signature = plan.signature
    shape = list(extents)
    shape.insert(signature.layout.feature_dim, signature.in_features)
    x = torch.randn(shape, dtype=torch_dtype(signature.dtype), device=device)
    some = next(iter(modules.values()))
    eager = BlueprintModule(plan, parameters=dict(some.named_parameters())).to(device)
    with torch.no_grad():
        cotangent = torch.randn_like(eager(x))
    steps = {
        name: Step(module, x.clone().requires_grad_(), cotangent) for name, module in {"": eager, **modules}.items()
    }
    clock = time.process_time_ns if device == "cpu" else time.perf_counter_ns
    times = interleaved(steps, budget_s=_MEASURE_S, least=_LEAST, most=_MOST, clock=clock)
    return {name: paired(times[name], times[""]) for name in modules}


def _cost(trials: Sequence[Trial], name: str) -> tuple[float, float]:
    """Ratios multiplied: each at most 1, since where it is slower plain torch will run; then as they are."""
    ratios = [trial.ratio for trial in trials if trial.variant == name]
    return math.prod(min(ratio, 1.0) for ratio in ratios), math.prod(ratios)
