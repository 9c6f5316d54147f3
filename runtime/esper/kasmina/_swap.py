"""Puts a faster variant of a kernel in the place of the one that a seed runs, between two steps.

The variant computes the same function of the same parameters (`esper.kasmina.kernels.kernel.KernelModule.use`), so
parameters, what the optimizer knows of them, and the seed's stage stay as they are. A variant whose circuit is open is
left alone, and so is a compiled host: there a blueprint is a part of the host's graph, and no code of a kernel runs.
Ranks of one run keep the kernels that they were given: each would get another one at another time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from esper.kasmina.breaker import CircuitState, Scope
from esper.mesh.errors import Conflict
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from esper.kasmina._seed import SeedRun
    from esper.kasmina.growth import Growth

__all__ = ["settle_kernels"]

_log = get_logger("esper.kasmina.growth")


def settle_kernels(growth: Growth) -> None:
    """Take what the control plane has a faster variant of, and tell it what is in use; where no step is under way."""
    try:
        _take_faster(growth)
    finally:
        growth.plane.hold_kernels(growth.life)


def _take_faster(growth: Growth) -> None:
    if growth.observation.compiled or not growth.ranks.alone:
        return
    for run in growth.life.runs.values():
        if run.kernel is not None and run.attachment is not None:
            variant: Any = growth.plane.faster_kernel(run.choice.kernel_id)
            if variant is not None:
                _swap(growth, run, variant)


def _swap(growth: Growth, run: SeedRun, variant: Any) -> None:
    breakers = growth.life.breakers
    for scope in (Scope.KERNEL, Scope.CODE):
        if breakers.state(scope, variant.id) is not CircuitState.CLOSED:
            return
    use = getattr(run.module, "use", None)
    if use is None:
        return
    try:
        use(variant)
    except Conflict as error:
        growth.counters["variants_refused"] += 1
        _log.warning("variant refused", seed=run.index, kernel_id=run.choice.kernel_id, detail=error.public)
        return
    before = run.choice.kernel_id
    run.kernel, run.choice = variant, replace(run.choice, kernel_id=variant.id)
    assert run.attachment is not None
    run.attachment.seed.guard.kernel_id = variant.id
    fields: dict[str, object] = {
        "seed": run.index,
        "from": before,
        "to": variant.id,
        "tier": variant.running_tier.value,
        "step": growth.steps,
    }
    # What the lineage says of the seed's birth stays as it was.
    run.record.setdefault("swaps", []).append({**fields, "boundary": growth.boundaries})
    growth.counters["kernel_swaps"] += 1
    _log.info("kernel swapped", **fields)
    growth.plane.event("kernel_swapped", fields)
