"""Any dense activation as outer x rows x features, without copying, and how it is cut into blocks.

Legend: O outer, R rows, C features. Element (o, r, c) of a plane stands ``o * outer_stride + r * row_stride +
c * feature_stride`` behind the first. The dimensions of a dense tensor, taken from the largest stride to the smallest,
are those before the features (O), the features, and those after them (R). Where none stand after them, as in (N, C),
(N, T, C) and an image with channels last, those before are the rows and O is 1.

The cut is a function of the shape alone, never of the device, so the sketch of an activation is the same on all.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from esper.kasmina.ops._dispatch import cdiv, power_of_2

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cut", "Plane", "contiguous_like", "dense"]

_TILE = 2048
"""Elements of a tile: 16 per thread of four warps, which leaves registers for four accumulators of each."""
_PROGRAMS = 1024
"""Wanted of a launch: about eight for each multiprocessor of a large device."""
_LEAST_BLOCKS = 16
"""Of a part, so that the statistics it writes are small beside the activations it reads."""
_MOST_BLOCKS = 32_767
"""Of a part: two counts of blocks share 32 bits in the kernel."""


class Plane(NamedTuple):
    """Sizes and strides, in elements."""

    outer: int
    rows: int
    features: int
    outer_stride: int
    row_stride: int
    feature_stride: int

    @classmethod
    def of(cls, x: Tensor, feature_dim: int) -> Plane:
        """Of a tensor that `dense` has passed."""
        feature_dim %= x.dim()
        order = _order(x)
        assert order is not None
        place = order.index(feature_dim) if feature_dim in order else len(order)
        features = x.shape[feature_dim]
        # Lists: a compiled graph has no place for a generator.
        before = prod([x.shape[d] for d in order[:place]])
        after = prod([x.shape[d] for d in order[place + 1 :]])
        if after == 1:
            return cls(1, before, features, before * features, features, 1)
        return cls(before, after, features, features * after, 1, after)

    def view(self, x: Tensor) -> Tensor:
        """The values as (O, R, C): a view."""
        order = _order(x)
        assert order is not None
        dense = x.permute([d for d in range(x.dim()) if d not in order] + order)
        if self.feature_stride == 1:
            return dense.reshape(self.outer, self.rows, self.features)
        return dense.reshape(self.outer, self.features, self.rows).transpose(1, 2)


class Cut(NamedTuple):
    """A plane cut into blocks of rows; block b belongs to part ``b mod parts``."""

    block_rows: int
    block_features: int
    per_outer: int
    """Blocks of each outer index; the last one may be ragged."""
    blocks: int
    parts: int
    """A multiple of the buckets, or one part for each block."""

    @classmethod
    def of(cls, plane: Plane, buckets: int) -> Cut:
        """The contiguous direction gets the long side of the tile: that is what makes loads coalesce."""
        features = power_of_2(plane.features)
        # Small enough for a block in each bucket: a sketch with empty rows says little about a narrow site.
        rows = min(power_of_2(plane.rows), power_of_2(plane.outer * plane.rows // buckets + 1) // 2 or 1)
        if plane.feature_stride == 1:
            block_features = min(128, features)
            block_rows = min(_TILE // block_features, rows)
        else:
            block_rows = min(256, rows)
            block_features = min(_TILE // block_rows, features)
        per_outer = cdiv(plane.rows, block_rows)
        blocks = plane.outer * per_outer
        wanted = min(cdiv(_PROGRAMS, cdiv(plane.features, block_features)), cdiv(blocks, _LEAST_BLOCKS))
        wanted = max(wanted, cdiv(blocks, _MOST_BLOCKS))
        return cls(block_rows, block_features, per_outer, blocks, min(cdiv(wanted, buckets) * buckets, blocks))


def _order(x: Tensor) -> list[int] | None:
    """Dimensions of more than one element from the largest stride to the smallest; None for a tensor with gaps."""
    order = sorted((d for d in range(x.dim()) if x.shape[d] != 1), key=x.stride, reverse=True)
    expected = 1
    for dim in reversed(order):
        if x.stride(dim) != expected:
            return None
        expected *= x.shape[dim]
    return order


def dense(x: Tensor) -> Tensor:
    """The tensor itself where its elements fill its memory, in any order of dimensions, else a copy that does."""
    # As empty_like, which the fakes of the operators use: they must foretell the strides.
    return x if _order(x) is not None else torch.empty_like(x).copy_(x)


def contiguous_like(x: Tensor, like: Tensor) -> Tensor:
    """The tensor with its elements in memory in the order of those of `like`, which is dense: itself where they are."""
    if all(x.shape[d] == 1 or x.stride(d) == like.stride(d) for d in range(x.dim())):
        return x
    return x.new_empty_strided(like.shape, like.stride()).copy_(x)
