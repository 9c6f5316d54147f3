"""The kernels against plain torch in float64, over odd shapes, layouts and dtypes.

One table for two places: Triton's interpreter, which needs a process of its own because it must be chosen before Triton
is imported (`python -m tests.kasmina.ops.table`, one JSON object per case), and a CUDA device.
"""

import json
import sys
import traceback
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.ops._plane import Plane
from esper.kasmina.ops._sketch import bucket_of_rows, seed_offset, signs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Of one rounding to the dtype; the interpreter cuts bfloat16 off where a device rounds to nearest."""
_LAYOUTS = {
    "vector": ((37, 5), -1, None),
    "one feature": ((33, 1), -1, None),
    "one row": ((1, 9), -1, None),
    "sequence": ((3, 70, 130), -1, None),
    "sequence, features second": ((2, 6, 65), 1, None),
    "image": ((3, 7, 5, 9), 1, None),
    "image, wide rows": ((2, 3, 17, 33), 1, None),
    "image, channels last": ((2, 6, 5, 7), 1, torch.channels_last),
    "features first": ((11, 40), 0, None),
    "many rows": ((4100, 3), -1, None),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    dtype: torch.dtype
    layout: str
    seeds: int
    spoilt: bool = False
    """True where some values are not finite."""

    def __str__(self) -> str:
        spoilt = ", not finite" if self.spoilt else ""
        return f"{str(self.dtype).removeprefix('torch.')}, {self.layout}, {self.seeds} seeds{spoilt}"

    def tensor(self, device: str, generator: torch.Generator, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Random values in the case's dtype and layout."""
        shape, _, memory_format = _LAYOUTS[self.layout]
        values = (torch.randn(shape, generator=generator) * scale + mean).to(device, self.dtype)
        return values.contiguous(memory_format=memory_format) if memory_format else values

    @property
    def feature_dim(self) -> int:
        return _LAYOUTS[self.layout][1]


CASES = [
    *(Case(torch.float32, layout, 1 + index % 2) for index, layout in enumerate(_LAYOUTS)),
    *(Case(dtype, layout, 2) for dtype in (torch.bfloat16, torch.float16) for layout in ("vector", "image")),
    Case(torch.bfloat16, "image, channels last", 1),
    Case(torch.float64, "vector", 3),
    Case(torch.float32, "vector", 5),
    Case(torch.float32, "vector", 1, spoilt=True),
    Case(torch.float16, "image", 1, spoilt=True),
]
BUCKETS = 16
SEED = 7


def check(case: Case, device: str) -> None:
    """Run all kernels on one case and compare; raises AssertionError."""
    from esper.kasmina.ops import _blend_kernel, _health_kernel

    generator = torch.Generator().manual_seed(5)
    # Far from zero: sums of squares about zero would lose the variance.
    eps = 500.0 if case.dtype in {torch.float32, torch.float64} else 20.0
    y = case.tensor(device, generator, scale=0.5, mean=eps)
    deltas = [case.tensor(device, generator) for _ in range(case.seeds)]
    alphas = torch.rand(case.seeds, generator=generator).to(device)
    if case.spoilt:
        y.view(-1)[::7], y.view(-1)[3::11] = torch.nan, torch.inf
    out = _blend_kernel.forward(y, deltas, alphas)
    _same_blend(out, y, deltas, alphas, case)
    _same_health(_health_kernel.statistics(out, case.feature_dim, eps, BUCKETS, SEED), out, case.feature_dim, eps)
    both, *found = _health_kernel.blended_statistics(y, deltas, alphas, case.feature_dim, eps, BUCKETS, SEED)
    torch.testing.assert_close(both, out, rtol=0, atol=0, equal_nan=True)
    assert both.stride() == out.stride() == y.stride()
    _same_health(found, out, case.feature_dim, eps)
    _same_gradients(case.tensor(device, generator), deltas, alphas, case)


def _same_blend(out, y, deltas, alphas, case):
    expected = y.double() + sum(a * d.double() for a, d in zip(alphas.double(), deltas, strict=True))
    finite = expected.isfinite()
    assert torch.equal(finite, out.isfinite())
    torch.testing.assert_close(out.double()[finite], expected[finite], rtol=TOLERANCE[case.dtype], atol=1e-5)


def _same_gradients(g, deltas, alphas, case):
    from esper.kasmina.ops import _blend_kernel

    *grads, dots = _blend_kernel.backward(g, deltas, alphas)
    alone = _blend_kernel.backward(g, [], alphas)
    for alpha, delta, grad, same, dot in zip(alphas.double(), deltas, grads, alone, dots, strict=True):
        torch.testing.assert_close(grad.double(), alpha * g.double(), rtol=TOLERANCE[case.dtype], atol=1e-6)
        assert torch.equal(grad, same)
        product = g.double() * delta.double()
        torch.testing.assert_close(dot.double(), product.sum(), rtol=0, atol=1e-6 * float(product.abs().sum()))


def _same_health(found, x, feature_dim, eps):
    mean, m2, counts, sketch, balance = found
    plane = Plane.of(x, feature_dim)
    rows = plane.view(x).reshape(-1, plane.features).double()
    finite = rows.isfinite()
    kept = rows.where(finite, 0.0)
    n = finite.sum(0)
    assert torch.equal(counts, torch.stack([n, len(rows) - n, (finite & (rows.abs() <= eps)).sum(0)]))
    expected = kept.sum(0) / n
    centred = (rows - expected).where(finite, 0.0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    squares = centred.square().sum(0).where(n > 0, torch.nan)
    torch.testing.assert_close(m2.double(), squares, rtol=2e-4, atol=1e-4, equal_nan=True)
    sign = signs(torch.arange(len(rows), device=x.device), seed_offset(SEED)).double()
    bucket = bucket_of_rows(plane, BUCKETS, x.device).flatten()
    projection = rows.new_zeros(BUCKETS, len(rows))
    projection[bucket, torch.arange(len(rows), device=x.device)] = sign
    torch.testing.assert_close(balance.double(), projection.sum(1))
    assert sketch.isfinite().all()
    if finite.all():
        # Centred at the mean that is reported; means of parts, which are rounded too, move a row by their balance.
        moved = 2.0**-23 * float(expected.abs().max()) * (1.0 + float(balance.abs().max()))
        exact = projection @ (rows - mean.double())
        torch.testing.assert_close(sketch.double(), exact, rtol=1e-4, atol=1e-4 + moved)


def main() -> None:
    """Run the table on this process's CPU: under Triton's interpreter."""
    for case in CASES:
        error = ""
        try:
            check(case, "cpu")
        except Exception:  # noqa: BLE001  # reported by the test of this case
            error = traceback.format_exc()
        json.dump({"case": str(case), "error": error}, sys.stdout)
        print(flush=True)


if __name__ == "__main__":
    main()
