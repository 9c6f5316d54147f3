"""Statistics of site outputs."""

from __future__ import annotations

import itertools
import math
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from esper.kasmina._spectrum import saturation
from esper.kasmina.health import ROWS, HealthSampler, Worker, bottleneck, dead_fraction, effective_rank
from esper.kasmina.sites import discover, observe
from tests.kasmina.hosts import mlp, small_cnn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.hooks import RemovableHandle


def test_effective_rank_of_known_spectra() -> None:
    """Equal eigenvalues give their number, one gives 1, geometric ones exp of their entropy; wide samples agree."""
    generator = np.random.default_rng(0)
    assert pytest.approx(8.0, rel=0.02) == effective_rank(generator.normal(size=(4000, 8)))
    line = generator.normal(size=(200, 1)) @ np.ones((1, 8))
    assert pytest.approx(1.0, rel=1e-6) == effective_rank(line)
    shares = np.array([0.5, 0.25, 0.25])
    orthogonal = np.linalg.qr(generator.normal(size=(101, 3)) - 0.0)[0]
    orthogonal -= orthogonal.mean(0)
    basis = np.linalg.qr(orthogonal)[0]
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert pytest.approx(expected, rel=1e-6) == effective_rank(basis * np.sqrt(shares))
    wide = generator.normal(size=(20, 300))
    gram = effective_rank(wide)
    direct = np.linalg.eigvalsh(np.cov(wide.T)).clip(1e-12)
    share = direct / direct.sum()
    assert pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-3) == gram


def test_unmeasurable_is_none() -> None:
    """Constant, too few or not finite rows have no rank; they are not called healthy."""
    assert effective_rank(np.ones((5, 3))) is None
    assert effective_rank(np.ones((1, 3))) is None
    assert effective_rank(np.array([[1.0, math.nan], [1.0, 2.0]])) is None
    assert dead_fraction(np.array([[1.0, math.inf], [1.0, 2.0]])) is None
    assert 1.0 == dead_fraction(np.ones((5, 3)))


def test_dead_fraction() -> None:
    """Features that do not move count as dead."""
    rows = np.random.default_rng(0).normal(size=(50, 4))
    rows[:, 1] = 3.0
    assert 0.25 == dead_fraction(rows)


def _step(sampler: HealthSampler, worker: Worker, run: Callable[[], object]) -> None:
    handles = sampler.install()
    run()
    for handle in handles:
        handle.remove()
    sampler.collect()
    assert worker.drain(30.0)
    assert 0 == worker.failures


def _sampler(model: nn.Module, x: torch.Tensor, per_sample: int = 8) -> tuple[HealthSampler, Worker]:
    worker = Worker()
    return HealthSampler(model, discover(model, observe(model, (x,))).sites, worker, per_sample), worker


def test_sampled_values_are_those_of_the_activations() -> None:
    """Rank, dead fraction and gradient at each site are those of the tensors there; sites at one module share them."""
    model, x = mlp(), torch.randn(20, 8)
    sampler, worker = _sampler(model, x, per_sample=3)
    for _ in range(2):
        _step(sampler, worker, lambda: model(x).square().sum().backward())
    found = {h.index: h for h in sampler.take()}
    assert set(range(9)) == set(found)
    y = model.first(x)
    y.retain_grad()
    model.head(torch.relu(model.second(torch.relu(y)))).square().sum().backward()
    series = found[1]
    assert pytest.approx(effective_rank(y.detach().double().numpy()), rel=1e-5) == series.effective_rank
    assert series.effective_rank is not None
    assert pytest.approx(series.effective_rank / 16) == series.saturation
    assert pytest.approx(float(y.grad.square().mean().sqrt()), rel=1e-5) == series.gradient_norm
    assert found[0].effective_rank == series.effective_rank
    assert () == sampler.take()
    worker.close()


@pytest.mark.parametrize("shape", [(600, 8), (64, 3, 8, 8), (3, 3, 40, 40)])
def test_samples_are_bounded_and_rotate(shape: tuple[int, ...]) -> None:
    """At most ROWS rows of a site are copied, and a few sites a time take turns until all were measured."""
    model, x = (mlp() if len(shape) == 2 else small_cnn()), torch.randn(shape)
    sampler, worker = _sampler(model, x, per_sample=3)
    seen: set[int] = set()
    for _ in range(5):
        handles = sampler.install()
        assert 3 == sum("observe" in _name(handle) for handle in handles)
        model(x).sum().backward()
        for handle in handles:
            handle.remove()
        for taken in sampler._taken.values():
            assert all(tensor.numel() <= ROWS * 16 for tensor in taken.tensors())
        sampler.collect()
        worker.drain(30.0)
        document = sampler.document()
        sampler.restore(document)
        assert document == sampler.document()
        seen |= {h.index for h in sampler.take()}
    assert len(seen) == len(discover(model, observe(model, (x,))).sites)
    worker.close()


def _name(handle: RemovableHandle) -> str:
    return getattr(handle.hooks_dict_ref()[handle.id], "__name__", "")


def test_without_gradient_it_is_missing() -> None:
    """A forward whose loss never came back has no gradient and no score: None, not zero."""
    model, x = mlp(), torch.randn(20, 8)
    sampler, worker = _sampler(model, x)
    for _ in range(2):
        _step(sampler, worker, lambda: model(x))
    found = sampler.take()
    assert len(found) == 9
    assert {None} == {h.gradient_norm for h in found} | {h.bottleneck for h in found}
    assert any(h.effective_rank is not None for h in found)
    worker.close()


def test_samples_are_dense_at_first() -> None:
    """Each step until every output was seen, then half as many with each round, down to one in `every`; 0 is never."""
    model, x = mlp(), torch.randn(20, 8)
    sampler, worker = _sampler(model, x, per_sample=1)
    sampled = []
    for step in range(60):
        if sampler.due(step, 10):
            sampled.append(step)
            sampler.install()
    assert [0, 1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 50] == sampled
    worker.close()


def test_too_few_rows_can_not_tell_saturation() -> None:
    """A rank near the number of rows may be any larger one: missing, not low; one far below is what it is."""
    assert saturation(100.0, 768, 128) is None
    assert pytest.approx(20 / 768) == saturation(20.0, 768, 128)
    assert pytest.approx(0.5) == saturation(8.0, 16, 128)
    assert 1.0 == saturation(17.0, 16, 128)
    assert saturation(None, 16, 128) is None


def test_bottleneck_of_known_rows() -> None:
    """A quarter of the wish is within reach of the own weights, a third of the rest within that of the branch."""
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(200, 12)) - 0.0)[0]
    basis -= basis.mean(0)
    own, branch = basis[:, :2] * 10.0, basis[:, :4] * 10.0
    wish = np.stack([basis[:, 0] + 0.0, basis[:, 2], basis[:, 6], basis[:, 7]], axis=1)
    rank = effective_rank(own)
    assert rank is not None
    assert pytest.approx(0.25 / rank**2, rel=0.02) == bottleneck(branch, own, wish)
    assert pytest.approx(0.0, abs=1e-3) == bottleneck(own, own, wish)
    assert bottleneck(branch, own, np.zeros_like(wish)) is None
    assert bottleneck(branch, np.ones_like(own), wish) is None
    assert bottleneck(branch * np.nan, own, wish) is None
    assert bottleneck(generator.normal(size=(200, 190)), own, wish) is None


@pytest.mark.parametrize("narrow", [1, 2])
def test_the_score_finds_a_planted_bottleneck(narrow: int) -> None:
    """Of all spans of a perceptron the one that leads around its narrow layer is scored highest."""
    torch.manual_seed(0)
    widths = [20, 24, 24, 24, 24, 10]
    widths[narrow + 1] = 3
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    teacher = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10))
    x = torch.randn(1024, 20)
    labels = (3 * teacher(x)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:256]), labels[:256]).backward()

    for _ in range(150):
        step()
        optimizer.step()
    sampler, worker = _sampler(model, x[:256], per_sample=len(layers))
    for _ in range(24):
        _step(sampler, worker, step)
    scores = {h.index: h.bottleneck for h in sampler.take()}
    best = max((i for i in scores if scores[i] is not None), key=lambda i: scores[i])
    site = next(s for s in discover(model, observe(model, (x[:4],))).sites if s.index == best)
    assert int(site.source) <= 2 * narrow < int(site.target)
    worker.close()


def test_worker_survives_and_sheds() -> None:
    """A job that fails is counted and the next one runs; beyond the limit jobs are shed and counted."""
    worker, done, gate = Worker(limit=2), threading.Event(), threading.Event()
    assert worker.drain(0.1)
    worker.submit(lambda: 1 / 0)
    worker.submit(done.set)
    assert done.wait(5.0)
    assert 1 == worker.failures
    worker.submit(gate.wait)
    for _ in range(5):
        worker.submit(lambda: None)
    assert worker.shed >= 2
    assert not worker.drain(0.05)
    worker.close(timeout_s=0.05)
    gate.set()
    assert worker.drain(5.0)
    worker.close()
    worker.close()
