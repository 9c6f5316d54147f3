"""Fused blend and health: the blended output and its statistics, in one pass over memory, where both are due.

    out, found = blend_health(y, [seed(y) for seed in seeds], alphas, feature_dim=1)

The same as `blend` followed by `health` of its result, bit for bit in what is blended, without reading that again.
Gradients are those of `blend`; statistics have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper.kasmina.ops import _blend as blending
from esper.kasmina.ops import _health as measuring
from esper.kasmina.ops._dispatch import use_kernels
from esper.kasmina.ops._health import BUCKETS, Health

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["blend_health"]


def blend_health(
    y: Tensor,
    deltas: Sequence[Tensor],
    alphas: Sequence[Tensor] | Tensor,
    *,
    feature_dim: int = -1,
    eps: float = 0.0,
    buckets: int = BUCKETS,
    seed: int = 0,
) -> tuple[Tensor, Health]:
    """What `blend` gives, and what `health` finds in it; arguments are theirs."""
    measuring.check(y, buckets)
    weights = blending.checked(y, deltas, alphas)
    if not deltas or not use_kernels(y, *deltas):
        out = blending.blend(y, deltas, weights)
        return out, measuring.health(out, feature_dim=feature_dim, eps=eps, buckets=buckets, seed=seed)
    out, *found = _blend_health(y, list(deltas), weights, feature_dim, eps, buckets, seed)
    return out, Health(*found)


@torch.library.custom_op("esper::blend_health", mutates_args=(), device_types="cpu")
def _blend_health(
    y: Tensor, deltas: list[Tensor], alphas: Tensor, feature_dim: int, eps: float, buckets: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(y).copy_(blending.reference(y, deltas, alphas))
    mean, m2, counts, sketch, balance = measuring.reference(out, feature_dim, eps, buckets, seed)
    return out, mean, m2, counts, sketch, balance


@_blend_health.register_kernel("cuda")
def _blend_health_cuda(
    y: Tensor, deltas: list[Tensor], alphas: Tensor, feature_dim: int, eps: float, buckets: int, seed: int
) -> tuple[Tensor, ...]:
    from esper.kasmina.ops import _health_kernel

    return _health_kernel.blended_statistics(y, deltas, alphas, feature_dim, eps, buckets, seed)


@_blend_health.register_fake
def _blend_health_fake(
    y: Tensor,
    deltas: list[Tensor],  # noqa: ARG001  # the schema's names
    alphas: Tensor,  # noqa: ARG001
    feature_dim: int,
    eps: float,  # noqa: ARG001
    buckets: int,
    seed: int,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    return torch.empty_like(y), *measuring.fake_statistics(y, feature_dim, buckets)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    blending.save_for_blend(ctx, inputs[1], inputs[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, g: Tensor, *statistics: Tensor) -> tuple[Any, ...]:  # noqa: ARG001  # these have no gradient
    return *blending.gradients(ctx, g), None, None, None, None


_blend_health.register_autograd(_backward, setup_context=_setup)
