"""What runs in a worker process of the forge: one build at a time, with torch, a compiler and nothing else.

Jobs and results are JSON values and bytes (`esper.mesh.workers`). A job without an order asks what this machine can do.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from esper.mesh.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["compile_job", "warm"]

_NICENESS = 10


def warm() -> None:
    """Import what a build needs, so that the first order does not wait for it, and give way to others."""
    import torch
    from torch import _inductor  # noqa: F401  # imported for its seconds

    from esper.kasmina.kernels import build  # noqa: F401  # likewise

    # One job a process: the pool, not torch, decides how many cores the forge uses.
    torch.set_num_threads(1)
    # A run that trains on this machine goes first; compilers that a build starts inherit it.
    os.nice(_NICENESS)


def compile_job(job: dict[str, Any], report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Build a kernel, or tell what can be built.

    Args:
        job: ``ir`` (bytes), ``signature``, ``tier`` and ``target`` as texts; empty to ask for the machine.
        report: is told ``{"phase": ...}`` as phases begin.

    Returns:
        ``bundle``; or ``refused`` and ``reason`` when the order cannot be built; or ``target`` and ``limitations``.
    """
    from esper.kasmina.blueprints import Blueprint
    from esper.kasmina.kernels import Target, Tier
    from esper.kasmina.kernels.build import build, limitations
    from esper.kasmina.signature import Signature

    if not job:
        return {"target": str(Target.here()), "limitations": {tier.value: limitations(tier) for tier in Tier}}
    try:
        bundle = build(
            Blueprint.from_json(job["ir"]),
            Signature.parse(job["signature"]),
            Tier(job["tier"]),
            Target.parse(job["target"]) if job["target"] else None,
            progress=lambda phase: report({"phase": phase}),
        )
    except EsperError as error:
        return {"refused": error.public, "reason": error.reason}
    return {"bundle": bundle}
