"""Triton kernels of `health` and `blend_health`, and their launches.

A program walks over the blocks of its part, a tile of rows x features at a time, and holds in registers, per feature
and with ``d = x - shift``::

    n = #finite      q = #(|x| <= eps)      s1 = sum d      s2 = sum d^2      t = sum sign(row) d

``shift`` is the mean of the part's first tile. Sums about a value near the mean do not cancel (T. Chan, G. Golub,
R. LeVeque, *Algorithms for computing the sample variance*, 1983) and, unlike Welford's recurrence, need no division for
each value. At its end a part has ``mean = shift + s1 / n``, ``m2 = s2 - s1^2 / n`` and ``t`` moved to that mean; a
second, small kernel merges the parts by Chan's formulas and adds the ``t`` of those in one bucket up to a row of the
sketch. No atomics: the same input gives the same bits.
"""

# No `from __future__ import annotations`: Triton's interpreter would not know a constexpr by its name as text.
import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.kasmina.ops._blend_kernel import blended, triton_accumulator
from esper.kasmina.ops._dispatch import cdiv, on_device, power_of_2
from esper.kasmina.ops._health import fake_statistics
from esper.kasmina.ops._plane import Cut, Plane, contiguous_like, dense
from esper.kasmina.ops._sketch import seed_offset

__all__ = ["blended_statistics", "statistics"]

_WARPS = 4
_STAGES = 3
"""Tiles under way at a time, so that loads do not wait for sums. Each takes shared memory for every tensor that is
read; where many seeds are blended, one tile keeps the memory busy by itself and would not fit three times."""
_MERGE_TILE = 2048
# A constexpr, for a kernel reads no other globals.
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _signs(rows, offset):
    """+1 or -1 for each index of a row: `_sketch.signs`."""
    x = (rows + offset).to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return 1.0 - 2.0 * (x & 1).to(tl.float32)


@triton.jit
def _tile(y, deltas, alphas, offsets, live, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Values as they are stored and as they are measured, and which of them are finite."""
    stored = blended(y, deltas, alphas, offsets, live, COUNT, ACC).to(y.dtype.element_ty)
    # Measured after rounding: statistics are of what the next layer sees.
    values = stored.to(tl.float32)
    # NaN compares false; a mere `values - values == 0` would be folded by a compiler that may.
    finite = live & (tl.abs(values) <= _LARGEST)
    return stored, values, finite


@triton.jit
def _places(block, per_outer, rows, c, outer_stride, row_stride, feature_stride, BLOCK_R: tl.constexpr):
    """Offsets of a tile, the indices of its rows and which of those exist."""
    o = (block // per_outer).to(tl.int64)
    r = (block % per_outer) * BLOCK_R + tl.arange(0, BLOCK_R)
    # 64 bits: activations of more than 2^31 elements exist.
    wide = r.to(tl.int64)
    offsets = o * outer_stride + wide[:, None] * row_stride + c.to(tl.int64)[None, :] * feature_stride
    return offsets, o * rows + wide, r < rows


# A seed is a run-time value: specialised on, each would be a compilation.
@triton.jit(do_not_specialize=["offset"])
def _parts(
    y, deltas, alphas, out, means, m2s, finites, quiets, sketches, balances,
    blocks, per_outer, rows, features, outer_stride, row_stride, feature_stride, parts, eps, offset,
    COUNT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < features
    places, _, real = _places(part, per_outer, rows, c, outer_stride, row_stride, feature_stride, BLOCK_R)
    # The first tile is read twice; the second time it comes from the cache.
    _, values, finite = _tile(y, deltas, alphas, places, real[:, None] & known[None, :], COUNT, ACC)
    first = tl.sum(finite.to(tl.float32), axis=0)
    shift = tl.sum(tl.where(finite, values, 0.0), axis=0) / tl.maximum(first, 1.0)
    s1 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    t = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    # Two counts in 32 bits, finite below and quiet above: registers decide how many loads are under way.
    counts = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
    balance = tl.zeros((BLOCK_R,), tl.float32)
    # Parts take turns: neighbours in memory are read at the same time, and each bucket sees all of the batch.
    for block in tl.range(part, blocks, parts, num_stages=STAGES):
        places, index, real = _places(block, per_outer, rows, c, outer_stride, row_stride, feature_stride, BLOCK_R)
        live = real[:, None] & known[None, :]
        stored, values, finite = _tile(y, deltas, alphas, places, live, COUNT, ACC)
        # A constexpr: health alone writes nothing back.
        if COUNT > 0:
            tl.store(out + places, stored, mask=live)
        d = tl.where(finite, values - shift[None, :], 0.0)
        sign = tl.where(real, _signs(index, offset), 0.0)
        s1 += d
        s2 += d * d
        t += sign[:, None] * d
        counts += tl.where(finite, tl.where(tl.abs(values) <= eps, 65537, 1), 0)
        balance += sign
    n = tl.sum(counts & 65535, axis=0)
    total = tl.sum(s1, axis=0)
    moved = total / tl.maximum(n.to(tl.float32), 1.0)
    signed = tl.sum(balance, axis=0)
    # 64 bits: parts times features may exceed 2^31 for very wide layers.
    target = part.to(tl.int64) * features + c
    tl.store(means + target, shift + moved, mask=known)
    # Rounding may leave a constant feature a hair below zero.
    tl.store(m2s + target, tl.maximum(tl.sum(s2, axis=0) - total * moved, 0.0), mask=known)
    tl.store(finites + target, n, mask=known)
    tl.store(quiets + target, tl.sum(counts >> 16, axis=0), mask=known)
    tl.store(sketches + target, tl.sum(t, axis=0) - signed * moved, mask=known)
    # Every program of the part writes the same value.
    tl.store(balances + part, signed)


@triton.jit
def _merge(
    means, m2s, finites, quiets, sketches, balances, mean, m2, counts, sketch, balance,
    parts, rows, features, BUCKETS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < features
    lane = tl.arange(0, BUCKETS)
    ns = tl.zeros((BUCKETS, BLOCK_C), tl.float32)
    sums = tl.zeros((BUCKETS, BLOCK_C), tl.float32)
    for start in range(0, parts, BUCKETS):
        p = start + lane
        live = (p < parts)[:, None] & known[None, :]
        places = p.to(tl.int64)[:, None] * features + c[None, :]
        n = tl.load(finites + places, mask=live, other=0).to(tl.float32)
        ns += n
        sums += n * tl.load(means + places, mask=live, other=0.0)
    total = tl.sum(ns, axis=0)
    centre = tl.sum(sums, axis=0) / tl.maximum(total, 1.0)
    squares = tl.zeros((BUCKETS, BLOCK_C), tl.float32)
    sketched = tl.zeros((BUCKETS, BLOCK_C), tl.float32)
    # Exact beyond 2^24 rows, where float32 no longer counts.
    finite = tl.zeros((BUCKETS, BLOCK_C), tl.int64)
    quiet = tl.zeros((BUCKETS, BLOCK_C), tl.int64)
    signed = tl.zeros((BUCKETS,), tl.float32)
    for start in range(0, parts, BUCKETS):
        p = start + lane
        real = p < parts
        live = real[:, None] & known[None, :]
        places = p.to(tl.int64)[:, None] * features + c[None, :]
        count = tl.load(finites + places, mask=live, other=0)
        n = count.to(tl.float32)
        # A part without a finite value has no mean: its missing values count as the common one.
        gap = tl.where(count > 0, tl.load(means + places, mask=live, other=0.0) - centre[None, :], 0.0)
        moved = tl.load(balances + p, mask=real, other=0.0)
        squares += tl.load(m2s + places, mask=live, other=0.0) + n * gap * gap
        sketched += tl.load(sketches + places, mask=live, other=0.0) + moved[:, None] * gap
        finite += count.to(tl.int64)
        quiet += tl.load(quiets + places, mask=live, other=0).to(tl.int64)
        signed += moved
    measured = tl.sum(finite, axis=0)
    missing = float("nan")
    tl.store(mean + c, tl.where(measured > 0, centre, missing), mask=known)
    tl.store(m2 + c, tl.where(measured > 0, tl.sum(squares, axis=0), missing), mask=known)
    tl.store(counts + c, measured, mask=known)
    tl.store(counts + features + c, rows - measured, mask=known)
    tl.store(counts + 2 * features + c, tl.sum(quiet, axis=0), mask=known)
    tl.store(sketch + lane.to(tl.int64)[:, None] * features + c[None, :], sketched, mask=known[None, :])
    tl.store(balance + lane, signed)


def statistics(x: Tensor, feature_dim: int, eps: float, buckets: int, seed: int) -> tuple[Tensor, ...]:
    """Launch for an activation as it is: the fields of `Health`."""
    x = dense(x)
    return _launch(x, [], x, x, feature_dim, eps, buckets, seed)


def blended_statistics(
    y: Tensor, deltas: list[Tensor], alphas: Tensor, feature_dim: int, eps: float, buckets: int, seed: int
) -> tuple[Tensor, ...]:
    """Launch for an activation that is blended on the way: the result, then the fields of `Health`."""
    y = dense(y)
    out = torch.empty_like(y)
    return out, *_launch(y, deltas, alphas.contiguous(), out, feature_dim, eps, buckets, seed)


def _launch(
    y: Tensor,
    deltas: list[Tensor],
    alphas: Tensor,
    out: Tensor,
    feature_dim: int,
    eps: float,
    buckets: int,
    seed: int,
) -> tuple[Tensor, ...]:
    plane = Plane.of(y, feature_dim)
    cut = Cut.of(plane, buckets)
    same = tuple(contiguous_like(delta, y) for delta in deltas)
    floats = torch.empty((3, cut.parts, plane.features), dtype=torch.float32, device=y.device)
    ints = torch.empty((2, cut.parts, plane.features), dtype=torch.int32, device=y.device)
    signed = torch.empty(cut.parts, dtype=torch.float32, device=y.device)
    found = fake_statistics(y, feature_dim, buckets)
    partial = (floats[0], floats[1], ints[0], ints[1], floats[2], signed)
    merged_features = max(1, min(_MERGE_TILE // buckets, power_of_2(plane.features)))
    with on_device(y):
        if y.numel():
            _parts[(cdiv(plane.features, cut.block_features), cut.parts)](
                y, same, alphas, out, *partial, cut.blocks, cut.per_outer, plane.rows, plane.features,
                plane.outer_stride, plane.row_stride, plane.feature_stride, cut.parts, eps, seed_offset(seed),
                COUNT=len(same), ACC=triton_accumulator(y.dtype),
                BLOCK_R=cut.block_rows, BLOCK_C=cut.block_features, STAGES=_STAGES if len(same) < _STAGES else 1,
                num_warps=_WARPS,
            )  # fmt: skip
        if plane.features:
            _merge[(cdiv(plane.features, merged_features),)](
                *partial, *found, cut.parts, plane.outer * plane.rows, plane.features,
                BUCKETS=buckets, BLOCK_C=merged_features, num_warps=8,
            )  # fmt: skip
    return found
