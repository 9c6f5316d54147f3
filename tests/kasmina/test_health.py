"""Statistics of site outputs."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

from esper.kasmina.health import ROWS, HealthSampler, Worker, dead_fraction, effective_rank
from esper.kasmina.sites import discover, observe
from tests.kasmina.hosts import mlp, small_cnn


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


def _sample(model: nn.Module, x: torch.Tensor, per_sample: int = 8) -> tuple[HealthSampler, Worker]:
    worker = Worker()
    sampler = HealthSampler(model, discover(model, observe(model, (x,))).sites, worker, per_sample)
    handles = sampler.install()
    model(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    sampler.collect()
    assert worker.drain(5.0)
    return sampler, worker


def test_sampled_values_are_those_of_the_activations() -> None:
    """Rank, dead fraction and gradient at each site are those of the tensors there; sites at one module share them."""
    model, x = mlp(), torch.randn(20, 8)
    sampler, worker = _sample(model, x)
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


def test_samples_are_bounded_and_rotate() -> None:
    """At most ROWS rows of a site are copied, and a few sites a time take turns until all were measured."""
    model, x = small_cnn(), torch.randn(64, 3, 8, 8)
    worker = Worker()
    sampler = HealthSampler(model, discover(model, observe(model, (x,))).sites, worker, per_sample=3)
    seen: set[int] = set()
    for _ in range(5):
        handles = sampler.install()
        assert 3 == len(handles)
        model(x).sum().backward()
        for handle in handles:
            handle.remove()
        assert all(sample.numel() <= ROWS * 8 for sample, _, _ in sampler._taken.values())
        sampler.collect()
        worker.drain(5.0)
        document = sampler.document()
        sampler.restore(document)
        assert document == sampler.document()
        seen |= {h.index for h in sampler.take()}
    assert len(seen) == len(discover(model, observe(model, (x,))).sites)
    worker.close()


def test_without_gradient_it_is_missing() -> None:
    """A forward whose loss never came back has no gradient: None, not zero."""
    model, x = mlp(), torch.randn(20, 8)
    worker = Worker()
    sampler = HealthSampler(model, discover(model, observe(model, (x,))).sites, worker)
    handles = sampler.install()
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    sampler.collect()
    worker.drain(5.0)
    assert {None} == {h.gradient_norm for h in sampler.take()}
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
