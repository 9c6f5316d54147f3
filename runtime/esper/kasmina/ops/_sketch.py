"""A random projection of the rows of an activation: small, linear, and enough for its spectrum.

With X the (R, C) activation centred at its mean, ``sketch = S X`` where S is (K, R) with exactly one entry in each
column, at row ``bucket(r) = block(r) mod K``, of random sign ``s(r)``: the count sketch of Charikar, Chen and
Farach-Colton (*Finding frequent items in data streams*, ICALP 2002), as an embedding of matrices by Clarkson and
Woodruff (*Low rank approximation and regression in input sparsity time*, STOC 2013). Signs are independent, so
``E[S'S] = I`` and with it

    E[sketch' sketch] = X'X                                   for any assignment of rows to buckets,
    E[<sketch_i, sketch_j>^2] = tr(G_i G_j),  i != j          G_i the scatter of the rows of bucket i.

The first gives correlations of features, the second the sum of squared eigenvalues, from which rows of the sketch that
are fewer than the rank still give an effective rank (`participation`). By the central limit theorem a row of the
sketch is like a Gaussian sample with the covariance of the activation, averaged over all of it.

Signs come from a hash of the row's index (lowbias32 of C. Wellons, *Prospecting for hash functions*, 2018), so that
they need no memory and are the same on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from esper.kasmina.ops._plane import Cut, Plane

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bucket_of_rows", "participation", "seed_offset", "signs"]

_MASK = 0xFFFF_FFFF


def seed_offset(seed: int) -> int:
    """Where in the sequence of signs a seed starts: a multiple of the golden ratio keeps seeds apart.

    In the range of signed 32 bits, so that a kernel is compiled for one type of it.
    """
    return ((seed * 0x9E37_79B9 + 0x8000_0000) & _MASK) - 0x8000_0000


def signs(rows: Tensor, offset: int) -> Tensor:
    """+1 or -1 in float32 for each index of a row."""
    x = (rows.to(torch.int64) + offset) & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB_352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846C_A68B) & _MASK
    x = x ^ (x >> 16)
    return 1.0 - 2.0 * (x & 1).to(torch.float32)


def bucket_of_rows(plane: Plane, buckets: int, device: torch.device) -> Tensor:
    """(O, R): the row of the sketch that each row of the plane goes to."""
    cut = Cut.of(plane, buckets)
    outer = torch.arange(plane.outer, device=device)[:, None]
    rows = torch.arange(plane.rows, device=device)[None, :]
    return (outer * cut.per_outer + rows // cut.block_rows) % buckets


def participation(sketch: Tensor) -> Tensor:
    """Effective rank of order two: ``(sum e)^2 / sum e^2`` over the eigenvalues e of the covariance.

    Between 1 and the entropy effective rank of Roy and Vetterli (2007), and not bounded by the buckets. Numerator and
    denominator are estimated from the same pairs of different rows of the sketch, ``|b_i|^2 |b_j|^2`` and
    ``<b_i, b_j>^2``, so that much of their error cancels. The rows are supposed to hold the same mixture, for which
    blocks are dealt to buckets in turn. NaN where fewer than two rows hold data or nothing varies.
    """
    inner = sketch @ sketch.T
    own = inner.diagonal()
    same = own.square().sum()
    return (own.sum().square() - same) / (inner.square().sum() - same)
