"""Fused health statistics: all that is asked of an activation or a gradient, in one pass over it.

    found = health(y, feature_dim=1)            # nothing waits for the device
    found.variance, found.norm, found.quiet     # tensors on the device of y

An activation is rows x features. Per feature: how many values are finite, how many of these are quiet
(``|x| <= eps``), mean, sum of squared deviations; over all features a sketch of the centred rows (`_sketch`). Values
that are not finite are counted and left out: one of them must not hide what the others say. A feature without any
finite value has mean and variance NaN: what was not measured is missing.

Two findings of disjoint rows merge into that of all of them (`merge`), by the formulas of T. Chan, G. Golub, R. LeVeque
(*Updating formulae and a pairwise algorithm for computing sample variances*, 1979):

    mean = (n_a mean_a + n_b mean_b) / n          m2 = m2_a + m2_b + (mean_b - mean_a)^2 n_a n_b / n

Everything is in float32; float64 is read as float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from esper.kasmina.ops._dispatch import use_kernels
from esper.kasmina.ops._plane import Plane, dense
from esper.kasmina.ops._sketch import bucket_of_rows, participation, seed_offset, signs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BUCKETS", "Health", "fake_statistics", "health", "merge", "reference"]

BUCKETS = 128
"""Rows of a sketch."""
_MOST_BUCKETS = 1024


class Health(NamedTuple):
    """Statistics of one activation of C features; tensors on its device, properties are computed there when read."""

    mean: Tensor
    """(C,)"""
    m2: Tensor
    """(C,): sum of squared deviations from the mean."""
    counts: Tensor
    """(3, C), int64: finite values, others, quiet ones among the finite."""
    sketch: Tensor
    """(K, C): random signed sums of centred rows; see `_sketch`. A missing value counts as one near the mean."""
    balance: Tensor
    """(K,): sums of the signs, with which a sketch moves to another mean."""

    @property
    def finite(self) -> Tensor:
        """(C,): finite values of each feature."""
        return self.counts[0]

    @property
    def nonfinite(self) -> Tensor:
        """Values that are NaN or infinite; scalar."""
        return self.counts[1].sum()

    @property
    def quiet(self) -> Tensor:
        """(C,): finite values of each feature that are at most eps in size."""
        return self.counts[2]

    @property
    def variance(self) -> Tensor:
        """(C,): mean squared deviation of each feature."""
        return self.m2 / self.finite

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of all finite values; scalar."""
        return (self.m2 + self.finite * self.mean.square()).nansum().sqrt()

    @property
    def dead(self) -> Tensor:
        """(C,), bool: features that were measured and never active."""
        return (self.finite > 0) & (self.quiet == self.finite)

    @property
    def dead_fraction(self) -> Tensor:
        """Share of `dead` among the features that were measured; NaN where none was. Scalar."""
        return self.dead.sum() / (self.finite > 0).sum()

    @property
    def still_fraction(self) -> Tensor:
        """Share of features that hardly vary: by at most 1e-5 of the largest deviation. Scalar."""
        deviation = self.variance.sqrt()
        return (deviation <= 1e-5 * deviation.nan_to_num(0.0).max()).sum() / (self.finite > 0).sum()

    @property
    def covariance(self) -> Tensor:
        """(C, C): unbiased estimate of the covariance of the features."""
        return self.sketch.T @ self.sketch / self.finite.max()

    @property
    def participation(self) -> Tensor:
        """Effective rank of order two; scalar. See `_sketch.participation`."""
        return participation(self.sketch)


def health(x: Tensor, *, feature_dim: int = -1, eps: float = 0.0, buckets: int = BUCKETS, seed: int = 0) -> Health:
    """Statistics of x, an activation or a gradient; has no gradient itself.

    Args:
        x: any float dtype and any layout; only a tensor with gaps is copied.
        feature_dim: where the features stand: the last for (N, C) and (N, T, C), 1 for (N, C, H, W).
        eps: values up to this size are quiet.
        buckets: rows of the sketch, a power of two.
        seed: of the random signs; findings that are to be merged need different ones.
    """
    check(x, buckets)
    arguments = (x.detach(), feature_dim, eps, buckets, seed)
    return Health(*(_health(*arguments) if use_kernels(x) else reference(*arguments)))


def check(x: Tensor, buckets: int) -> None:
    """Refuse what the statistics are not defined for."""
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"health: expected a float tensor with features, found {x.dtype} of shape {tuple(x.shape)}")
    if not 1 < buckets <= _MOST_BUCKETS or buckets & (buckets - 1):
        raise ValueError(f"health: expected a power of two of at most {_MOST_BUCKETS} buckets, found {buckets}")


def merge(a: Health, b: Health) -> Health:
    """What `health` finds in the rows of both; their sketches must come from different seeds."""
    total = a.finite + b.finite
    weight = b.finite / total
    gap = b.mean - a.mean
    mean = torch.where(a.finite == 0, b.mean, torch.where(b.finite == 0, a.mean, a.mean + gap * weight))
    between = (gap.square() * a.finite * weight).nan_to_num(0.0)
    m2 = torch.where(total > 0, a.m2.nan_to_num(0.0) + b.m2.nan_to_num(0.0) + between, torch.nan)
    sketch = _recentred(a, mean) + _recentred(b, mean)
    return Health(mean, m2, a.counts + b.counts, sketch, a.balance + b.balance)


def _recentred(found: Health, mean: Tensor) -> Tensor:
    return found.sketch + found.balance[:, None] * (found.mean - mean).nan_to_num(0.0)


def reference(x: Tensor, feature_dim: int, eps: float, buckets: int, seed: int) -> tuple[Tensor, ...]:
    """The fields of `Health` in plain torch: what every device but CUDA runs, and what the kernel is compared with."""
    x = dense(x)
    plane = Plane.of(x, feature_dim)
    values = plane.view(x).to(torch.float32)
    finite = values.isfinite()
    count = finite.sum((0, 1))
    quiet = (finite & (values.abs() <= eps)).sum((0, 1))
    mean = values.where(finite, 0.0).sum((0, 1)) / count
    deviations = (values - mean).where(finite, 0.0)
    m2 = torch.where(count > 0, deviations.square().sum((0, 1)), torch.nan)
    index = torch.arange(plane.outer * plane.rows, device=x.device)
    sign = signs(index, seed_offset(seed))
    bucket = bucket_of_rows(plane, buckets, x.device).flatten()
    signed = (deviations * sign.view(plane.outer, plane.rows, 1)).reshape(-1, plane.features)
    sketch = values.new_zeros(buckets, plane.features).index_add_(0, bucket, signed)
    balance = values.new_zeros(buckets).index_add_(0, bucket, sign)
    return mean, m2, torch.stack([count, len(index) - count, quiet]), sketch, balance


def fake_statistics(x: Tensor, feature_dim: int, buckets: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the fields of `Health`."""
    features = x.shape[feature_dim]
    shapes: Sequence[tuple[Any, ...]] = ((features,), (features,), (buckets, features), (buckets,))
    mean, m2, sketch, balance = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return mean, m2, x.new_empty((3, features), dtype=torch.int64), sketch, balance


@torch.library.custom_op("esper::health", mutates_args=(), device_types="cpu")
def _health(
    x: Tensor, feature_dim: int, eps: float, buckets: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, m2, counts, sketch, balance = reference(x, feature_dim, eps, buckets, seed)
    return mean, m2, counts, sketch, balance


@_health.register_kernel("cuda")
def _health_cuda(x: Tensor, feature_dim: int, eps: float, buckets: int, seed: int) -> tuple[Tensor, ...]:
    from esper.kasmina.ops import _health_kernel

    return _health_kernel.statistics(x, feature_dim, eps, buckets, seed)


@_health.register_fake
def _health_fake(
    x: Tensor,
    feature_dim: int,
    eps: float,  # noqa: ARG001  # the schema's names
    buckets: int,
    seed: int,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    return fake_statistics(x, feature_dim, buckets)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001  # by name
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # noqa: ARG001  # statistics only look
    return (None,) * 5


_health.register_autograd(_backward, setup_context=_setup)
