"""Fused blend: ``y + sum_i alpha_i * delta_i`` in one pass over memory, for any number of seeds at one site.

    out = blend(y, [seed(y) for seed in seeds], alphas)

Plain torch reads and writes y once more for each seed and rounds to its dtype in between. Here every element is read
once and sums are in float32 (float64 where y is), so the result is rounded once. The host branch is never scaled.

Backward: ``grad y = g``, which needs no memory at all, ``grad delta_i = alpha_i * g``, and where alpha learns,
``grad alpha_i = <g, delta_i>``, in one pass over g as well. Derivatives of any order follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper.kasmina.ops._dispatch import use_kernels

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LEAST_ELEMENTS", "accumulator", "blend", "checked", "gradients", "reference", "save_for_blend"]

LEAST_ELEMENTS = 1 << 20
"""Below this, calling an operator that is registered in Python costs more than the passes over memory it saves."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float32, or float64 where the values are."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def checked(y: Tensor, deltas: Sequence[Tensor], alphas: Sequence[Tensor] | Tensor) -> Tensor:
    """The alphas as one vector; refuses what does not fit together."""
    for delta in deltas:
        if delta.shape != y.shape:
            raise ValueError(f"blend: expected deltas of shape {tuple(y.shape)}, found {tuple(delta.shape)}")
    if isinstance(alphas, Tensor):
        weights = alphas.reshape(-1)
    else:
        weights = torch.stack([alpha.reshape(()) for alpha in alphas]) if len(alphas) else y.new_empty(0)
    if len(weights) != len(deltas):
        raise ValueError(f"blend: expected one alpha for each of {len(deltas)} deltas, found {len(weights)}")
    return weights


def blend(y: Tensor, deltas: Sequence[Tensor], alphas: Sequence[Tensor] | Tensor) -> Tensor:
    """``y + sum_i alphas[i] * deltas[i]`` with the shape and dtype of y.

    Args:
        y: output of the host, of any float dtype and layout.
        deltas: outputs of seeds, of the shape of y; their dtypes may differ from its own.
        alphas: as many scalars on the device, or one vector: never numbers, so compiled graphs survive their changes.

    In a compiled graph the formula itself is given to the compiler, which makes the same single pass of it and fuses
    that with what stands before and after.
    """
    weights = checked(y, deltas, alphas)
    if not deltas:
        return y
    if torch.compiler.is_compiling() or y.numel() < LEAST_ELEMENTS or not use_kernels(y, *deltas):
        return reference(y, deltas, weights)
    out: Tensor = _blend(y, list(deltas), weights)
    return out


def reference(y: Tensor, deltas: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """The same in plain torch: what every device but CUDA runs, and what the kernel is compared with."""
    dtype = accumulator(y.dtype)
    total = y.to(dtype)
    for index, delta in enumerate(deltas):
        total = total + alphas[index].to(dtype) * delta.to(dtype)
    return total.to(y.dtype)


@torch.library.custom_op("esper::blend", mutates_args=(), device_types="cpu")
def _blend(y: Tensor, deltas: list[Tensor], alphas: Tensor) -> Tensor:
    # As the fake foretells: strides of y, whatever those of the deltas.
    return torch.empty_like(y).copy_(reference(y, deltas, alphas))


@_blend.register_kernel("cuda")
def _blend_cuda(y: Tensor, deltas: list[Tensor], alphas: Tensor) -> Tensor:
    from esper.kasmina.ops import _blend_kernel

    return _blend_kernel.forward(y, deltas, alphas)


@_blend.register_fake
def _blend_fake(y: Tensor, deltas: list[Tensor], alphas: Tensor) -> Tensor:  # noqa: ARG001  # the schema's names
    return torch.empty_like(y)


@torch.library.custom_op("esper::blend_backward", mutates_args=(), device_types="cpu")
def _backward(g: Tensor, deltas: list[Tensor], alphas: Tensor) -> list[Tensor]:
    """``alpha_i * g`` in the dtype of g, and behind them, where deltas are given, the vector of ``<g, delta_i>``."""
    dtype = accumulator(g.dtype)
    wide = g.to(dtype)
    grads = [torch.empty_like(g).copy_(alpha.to(dtype) * wide) for alpha in alphas]
    if deltas:
        dots = torch.stack([(wide * delta.to(dtype)).sum() for delta in deltas])
        grads.append(dots.to(alphas.dtype))
    return grads


@_backward.register_kernel("cuda")
def _backward_cuda(g: Tensor, deltas: list[Tensor], alphas: Tensor) -> list[Tensor]:
    from esper.kasmina.ops import _blend_kernel

    return _blend_kernel.backward(g, deltas, alphas)


@_backward.register_fake
def _backward_fake(g: Tensor, deltas: list[Tensor], alphas: Tensor) -> list[Tensor]:
    grads = [torch.empty_like(g) for _ in range(alphas.shape[0])]
    return [*grads, torch.empty_like(alphas)] if deltas else grads


def save_for_blend(ctx: Any, deltas: list[Tensor], alphas: Tensor) -> None:
    """Keep for the backward what it needs: the deltas only where alpha learns, which it mostly does not."""
    ctx.dtypes = [delta.dtype for delta in deltas]
    ctx.save_for_backward(alphas, *(deltas if alphas.requires_grad else ()))


def gradients(ctx: Any, g: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Of y, the deltas and the alphas, after `save_for_blend`."""
    alphas, *deltas = ctx.saved_tensors
    found = _backward(g, deltas, alphas)
    grads = [grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=False)]
    return g, grads, found[-1] if deltas else None


def _setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], Tensor], output: Tensor) -> None:  # noqa: ARG001  # by name
    save_for_blend(ctx, inputs[1], inputs[2])


_blend.register_autograd(gradients, setup_context=_setup)


def _backward_setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], Tensor], output: list[Tensor]) -> None:  # noqa: ARG001
    g, deltas, alphas = inputs
    ctx.count = len(deltas)
    ctx.save_for_backward(g, alphas, *deltas)


def _double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """The backward is linear in each of its arguments; rare enough for plain torch."""
    g, alphas, *deltas = ctx.saved_tensors
    wide = g.to(accumulator(g.dtype))
    scaled, dots = grads[: len(alphas)], grads[-1].to(wide.dtype)
    towards = reference(torch.zeros_like(wide), scaled, alphas)
    if deltas:
        towards = reference(towards, deltas, dots)
    of_deltas = [(dots[index] * wide).to(delta.dtype) for index, delta in enumerate(deltas)]
    of_alphas = torch.stack([(grad.to(wide.dtype) * wide).sum() for grad in scaled]).to(alphas.dtype)
    return towards.to(g.dtype), of_deltas, of_alphas


_backward.register_autograd(_double_backward, setup_context=_backward_setup)
