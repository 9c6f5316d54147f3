"""Triton kernels of `blend`, and their launches.

Forward, per element::

    out = y + sum_i alpha_i * delta_i

Backward, per element, with partial sums of the dots that are added up in a fixed order (no atomics: the gradient of an
alpha is the same in every run)::

    grad_delta_i = alpha_i * g          grad_alpha_i = sum(g * delta_i)

Elementwise kernels in this manner: P. Tillet, H. T. Kung, D. Cox, *Triton: an intermediate language and compiler for
tiled neural network computations*, MAPL 2019; the layout of files follows Liger-Kernel (P. Hsu et al., 2024).
"""

# No `from __future__ import annotations`: Triton's interpreter would not know a constexpr by its name as text.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.kasmina.ops._dispatch import cdiv, on_device
from esper.kasmina.ops._plane import contiguous_like, dense

__all__ = ["backward", "blended", "forward", "triton_accumulator"]

_BLOCK = 2048
"""Elements of a program: 16 bytes in flight for each of 256 threads in the narrowest dtype."""
_WARPS = 8


@triton.jit
def blended(y, deltas, alphas, offsets, live, COUNT: tl.constexpr, ACC: tl.constexpr):
    """The blended values at some offsets, unrounded; shared by all kernels that blend."""
    # Sums are wider than the values: rounding once instead of once for each seed.
    total = tl.load(y + offsets, mask=live, other=0.0).to(ACC)
    # Unrolled, because the deltas are separate tensors: COUNT makes one variant for each number of seeds.
    for i in tl.static_range(COUNT):
        alpha = tl.load(alphas + i).to(ACC)
        total += alpha * tl.load(deltas[i] + offsets, mask=live, other=0.0).to(ACC)
    return total


@triton.jit
def _forward(y, deltas, alphas, out, size, COUNT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    # 64 bits: activations of more than 2^31 elements exist.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < size
    total = blended(y, deltas, alphas, offsets, live, COUNT, ACC)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    g, deltas, alphas, grads, dots, size, programs,
    COUNT: tl.constexpr, DOTS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < size
    wide = tl.load(g + offsets, mask=live, other=0.0).to(ACC)
    for i in tl.static_range(COUNT):
        alpha = tl.load(alphas + i).to(ACC)
        tl.store(grads[i] + offsets, (alpha * wide).to(grads[i].dtype.element_ty), mask=live)
        # A constexpr: without it the deltas would be read, and kept alive, although nobody asks for these sums.
        if DOTS:
            delta = tl.load(deltas[i] + offsets, mask=live, other=0.0).to(ACC)
            tl.store(dots + i * programs + program, tl.sum(wide * delta, axis=0))


def triton_accumulator(dtype: torch.dtype) -> Any:
    """As `_blend.accumulator`, in Triton's types."""
    return tl.float64 if dtype is torch.float64 else tl.float32


def forward(y: Tensor, deltas: list[Tensor], alphas: Tensor) -> Tensor:
    """Launch the forward."""
    y = dense(y)
    out = torch.empty_like(y)
    same = tuple(contiguous_like(delta, y) for delta in deltas)
    if y.numel():
        with on_device(y):
            _forward[(cdiv(y.numel(), _BLOCK),)](
                y, same, alphas.contiguous(), out, y.numel(),
                COUNT=len(same), ACC=triton_accumulator(y.dtype), BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
    return out


def backward(g: Tensor, deltas: list[Tensor], alphas: Tensor) -> list[Tensor]:
    """Launch the backward; see `_blend._backward`."""
    g = dense(g)
    count, programs = len(alphas), cdiv(g.numel(), _BLOCK)
    grads = [torch.empty_like(g) for _ in range(count)]
    same = tuple(contiguous_like(delta, g) for delta in deltas)
    wide = torch.float64 if g.dtype is torch.float64 else torch.float32
    dots = torch.empty((count if deltas else 0, programs), dtype=wide, device=g.device)
    if g.numel():
        with on_device(g):
            _backward[(programs,)](
                g, same, alphas.contiguous(), tuple(grads), dots, g.numel(), programs,
                COUNT=count, DOTS=bool(deltas), ACC=triton_accumulator(g.dtype), BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
    return [*grads, dots.sum(dim=1).to(alphas.dtype)] if deltas else grads
