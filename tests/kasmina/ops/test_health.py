"""Statistics of activations and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from esper.kasmina import ops
from esper.kasmina.health import effective_rank


def _rows(count=200, features=6, rank=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rank, generator=generator) @ torch.randn(rank, features, generator=generator)


def _values(found, *names):
    return {name: getattr(found, name) for name in names}


def test_every_statistic_has_its_plain_meaning():
    """Mean, variance, norm, counts, as torch computes them one by one."""
    x = torch.relu(_rows())
    x[:, 2] = 0.0
    found = ops.health(x)
    assert_close(found.mean, x.mean(0))
    assert_close(found.variance, x.var(0, correction=0))
    assert_close(found.norm, x.norm())
    assert_close(found.quiet, (x == 0).sum(0))
    assert_close(found.dead, torch.tensor([False, False, True, False, False, False]))
    assert_close(found.dead_fraction, torch.tensor(1 / 6))
    assert_close(found.still_fraction, torch.tensor(1 / 6))
    assert 0 == found.nonfinite


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5), -1), ((3, 4, 5), -1), ((3, 5, 4), 1), ((2, 5, 3, 4), 1), ((5, 7), 0), ((5,), -1)]
)
def test_features_may_stand_anywhere(shape, dim):
    """The same rows give the same statistics in any layout."""
    x = torch.randn(shape)
    rows = x.movedim(dim, -1).reshape(-1, 5)
    names = ("mean", "variance", "norm", "counts")
    assert_close(_values(ops.health(x, feature_dim=dim), *names), _values(ops.health(rows), *names))


def test_a_tensor_with_gaps_is_measured_too():
    """A slice is copied; everything else is not."""
    x = torch.randn(6, 10)[:, ::2]
    assert_close(ops.health(x).mean, x.mean(0))


def test_the_variance_survives_a_large_mean():
    """Sums about zero would leave nothing of a deviation that is a millionth of the mean squared."""
    x = _rows(1000).double() + 3e4
    assert_close(ops.health(x).variance.double(), x.float().double().var(0, correction=0), rtol=1e-3, atol=0.0)


def test_missing_values_are_counted_and_left_out():
    """One NaN hides nothing, and a feature of nothing else has no mean."""
    x = _rows()
    x[3, 1], x[5, 1], x[:, 4] = torch.nan, torch.inf, torch.nan
    found = ops.health(x)
    kept = torch.cat([x[:3, 1], x[4:5, 1], x[6:, 1]])
    assert 202 == found.nonfinite
    assert_close(found.mean[1], kept.mean())
    assert_close(found.variance[1], kept.var(correction=0))
    assert found.mean[4].isnan()
    assert found.variance[4].isnan()
    assert_close(found.norm, x[x.isfinite()].norm())
    assert_close(found.dead_fraction, torch.tensor(0.0))


def test_nothing_measured_is_missing():
    """An empty batch is neither dead nor healthy."""
    found = ops.health(torch.empty(0, 3))
    assert found.mean.isnan().all()
    assert found.dead_fraction.isnan()
    assert found.participation.isnan()
    assert 0 == found.finite.sum()


@pytest.mark.parametrize(
    ("x", "buckets"), [(torch.ones(2, dtype=torch.int32), 4), (torch.ones(()), 4), (torch.ones(2), 3)]
)
def test_what_has_no_statistics_is_refused(x, buckets):
    """Integers, scalars, and sketches that the kernel has no tile for."""
    with pytest.raises(ValueError, match="health: expected"):
        ops.health(x, buckets=buckets)


def test_statistics_have_no_gradient():
    """They look at a network and never reach into it."""
    x = torch.randn(4, 3, requires_grad=True)
    assert not any(tensor.requires_grad for tensor in ops.health(x))
    assert not any(tensor.requires_grad for tensor in torch.ops.esper.health(x, -1, 0.0, 4, 0))


def test_the_sketch_estimates_the_covariance():
    """Unbiased: the mean over many seeds of the signs goes to the covariance itself."""
    x = _rows(count=300, rank=2)
    mean = torch.stack([ops.health(x, buckets=16, seed=seed).covariance for seed in range(400)]).mean(0)
    exact = torch.cov(x.T, correction=0)
    assert_close(mean, exact, rtol=0.0, atol=0.08 * float(exact.diagonal().max()))


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_sketch_tells_the_effective_rank(rank):
    """Of a whole activation, from a sketch of 64 rows; also the one that the health of a site is reported by."""
    basis = torch.linalg.qr(torch.randn(128, rank, generator=torch.Generator().manual_seed(1)))[0]
    x = _rows(4096, rank, rank=rank, seed=2) @ basis.T
    shares = torch.linalg.eigvalsh(torch.cov(x.T).double())
    exact = float(shares.sum().square() / shares.square().sum())
    found = ops.health(x, buckets=64)
    assert abs(float(found.participation) - exact) <= 0.15 * exact
    entropy = effective_rank(x.double().numpy())
    assert abs(effective_rank(found.sketch.double().numpy()) - entropy) <= 0.3 * entropy


def test_participation_is_not_bounded_by_the_sketch():
    """Pairs of rows still tell a rank that is larger than the number of rows."""
    x = torch.randn(8192, 256, generator=torch.Generator().manual_seed(3))
    found = ops.health(x, buckets=64)
    assert 200 <= float(found.participation) <= 320


def test_seeds_draw_other_signs():
    """Signs of one seed are balanced, and those of two are unrelated."""
    first, second = (ops.health(torch.ones(4096, 1), buckets=2, seed=seed).balance for seed in (0, 1))
    assert not torch.equal(first, second)
    assert float(first.abs().max()) < 5 * 2048**0.5


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 60),
    cut=st.integers(0, 60),
    shift=st.floats(-100, 100, width=32),
    holes=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 2)), max_size=6),
)
def test_merged_halves_are_the_whole(count, cut, shift, holes):
    """Chan's formulas: wherever rows are cut, and whatever is missing, the merge finds what one pass finds."""
    x = _rows(count, 3, 3) + torch.linspace(0.0, shift, count)[:, None]
    for row, feature in holes:
        if row < count:
            x[row, feature] = torch.nan
    cut = min(cut, count)
    whole = ops.health(x)
    merged = ops.merge(ops.health(x[:cut], seed=1), ops.health(x[cut:], seed=2))
    names = ("mean", "m2", "counts")
    assert_close(_values(merged, *names), _values(whole, *names), rtol=1e-4, atol=1e-3, equal_nan=True)


def test_a_merged_sketch_is_centred_at_the_common_mean():
    """Gram of the merge: unbiased although each half was centred at a mean of its own."""
    x = torch.cat([_rows(100, 4) + 3.0, _rows(60, 4, seed=1) - 5.0])

    def estimate(seed):
        halves = ops.health(x[:100], seed=2 * seed), ops.health(x[100:], seed=2 * seed + 1)
        return ops.merge(*halves).covariance

    exact = torch.cov(x.T, correction=0)
    mean = torch.stack([estimate(seed) for seed in range(300)]).mean(0)
    assert_close(mean, exact, rtol=0.0, atol=0.08 * float(exact.diagonal().max()))


def test_no_value_is_read_back():
    """Run on tensors that have no values: a device would never be waited for."""
    with FakeTensorMode():
        x = torch.empty(4, 8, 5, 5)
        found = ops.health(x, feature_dim=1)
        ops.merge(found, found)
        properties = [name for name, value in vars(ops.Health).items() if isinstance(value, property)]
        assert 9 <= len(properties)
        for name in properties:
            getattr(found, name)
        ops.blend_health(x, [x, x], torch.ones(2), feature_dim=1)


@pytest.mark.parametrize(("shape", "dim"), [((6, 5), -1), ((2, 5, 3, 4), 1)])
def test_the_operator_passes_opcheck(shape, dim):
    """Schema, fake, autograd and tracing agree with what the operator does."""
    x = torch.randn(shape)
    torch.library.opcheck(torch.ops.esper.health.default, (x, dim, 0.0, 8, 0))
    torch.library.opcheck(torch.ops.esper.health.default, (x.requires_grad_(), dim, 0.0, 8, 0))


@pytest.mark.parametrize(
    "function", [lambda x: ops.health(x).variance, lambda x: torch.ops.esper.health(x, -1, 0.0, 8, 0)[1] / len(x)]
)
def test_a_compiled_graph_has_no_break(function):
    """The public function and the operator itself can stand in the middle of a graph."""
    x = torch.randn(10, 4)
    run = torch.compile(lambda x: function(x * 2), backend="aot_eager", fullgraph=True)
    assert_close(run(x), (x * 2).var(0, correction=0))


def test_the_worker_finds_the_same_rank_in_a_sketch_as_in_rows():
    """`health.effective_rank` takes a sketch where it takes rows."""
    x = _rows(2000, 32, rank=3)
    rank = effective_rank(ops.health(x).sketch.numpy().astype(np.float64))
    assert abs(rank - effective_rank(x.double().numpy())) < 0.3
