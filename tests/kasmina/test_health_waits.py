"""Sampling never waits for a device: the training thread reads no value of any tensor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from esper.kasmina import _report, ops, wrap
from esper.kasmina.control import BlendStrategy, Stage
from esper.kasmina.ops import _health
from tests.kasmina.hosts import mlp, small_cnn
from tests.kasmina.loops import RAMPS, Run

if TYPE_CHECKING:
    from collections.abc import Callable

READING = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "is_nonzero", "argwhere"),
    *("__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__", "__complex__"),
}
"""Functions and methods that give a value of a tensor to Python or to the host."""
READING_OPERATORS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "masked_select", "unique"}


CPU_ALONE = {"_guard", "_probes", "_steps"}
"""Modules that read a value at once where it is on the CPU, having looked whether it is: nothing is waited for."""


def _who(name: str) -> str:
    """The innermost module of the runtime that is at work, and what it does."""
    frame = sys._getframe()
    while frame is not None and not frame.f_globals["__name__"].startswith("esper."):
        frame = frame.f_back
    return f"{'' if frame is None else frame.f_globals['__name__'].rpartition('.')[2]} {name}"


class NoReadingByName(TorchFunctionMode):
    """Notes Python's ways to the values of a tensor, also where the tensor is on the CPU already."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the base."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # A device that comes from a tensor is the CPU here because all are.
        named = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)]
        if name in READING or (name == "to" and "cpu" in named and not kwargs.get("non_blocking")):
            self.found.append(_who(name))
        return func(*args, **kwargs)


class NoReadingByOperator(TorchDispatchMode):
    """Notes the operators that do so, whoever calls them."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the base."""
        name = func.overloadpacket.__name__
        if name in READING_OPERATORS:
            self.found.append(_who(name))
        return func(*args, **(kwargs or {}))


def _steps(run: Run, count: int) -> list[str]:
    found: list[str] = []
    x, y = run.train
    for i in range(count):
        batch = slice(8 * (i % 16), 8 * (i % 16) + 8)
        # Notes, since growth lets no exception of its own out.
        with NoReadingByName(found), NoReadingByOperator(found):
            run.optimizer.zero_grad()
            nn.functional.cross_entropy(run.model(x[batch]), y[batch]).backward()
            run.optimizer.step()
            # A loss on the CPU is read at once, there being nothing to wait for: it is given as the number it is.
            run.growth.step(1.0)
    return found


@pytest.mark.parametrize("strategy", RAMPS)
def test_the_training_thread_reads_nothing(strategy: BlendStrategy) -> None:
    """On sampled steps with dormant seeds and with one that is being blended in, whatever drives its alpha."""
    run = Run(sample_every=1, isolation_learning_rate=1e-2)
    run.germinate("random", blend=strategy, steps=30)
    run.advance(Stage.GRAFTING)
    assert Stage.GRAFTING is run.growth.life.stage(run.site())
    before = run.growth.observation.sampler.position
    assert [] == [entry for entry in _steps(run, 24) if entry.split()[0] not in CPU_ALONE]
    assert before + 24 == run.growth.observation.sampler.position
    run.growth.observation.worker.drain(30.0)
    assert 0 == run.growth.observation.worker.failures
    assert not [name for name in run.growth.counters if name.startswith("failed")]
    assert any(health.effective_rank is not None for health in run.growth.observation.sampler.take())


def test_the_proof_would_notice() -> None:
    """Each way of reading a value is noted."""
    x = torch.ones(3)
    ways: list[Callable[[], object]] = [
        lambda: float(x[0]),
        x[0].item,
        lambda: bool(x[0] > 0),
        x.tolist,
        lambda: x.to("cpu"),
        x.cpu,
        x.numpy,
        x.nonzero,
        lambda: torch.equal(x, x),
    ]
    for way in ways:
        found: list[str] = []
        with NoReadingByName(found), NoReadingByOperator(found):
            way()
        assert found
    found = []
    with NoReadingByOperator(found):
        torch.nonzero(x)
    assert [" nonzero"] == found


@pytest.mark.parametrize("make", [mlp, small_cnn])
@pytest.mark.parametrize("kernels", [False, True])
def test_sampling_works_where_there_are_no_values(
    make: Callable[[], nn.Module], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device reading anything raises: the training thread does not, only the worker comes to grief."""
    # Such a device has no name for those who build kernels, of which there are none here.
    monkeypatch.setattr(_report, "hello", lambda _growth: None)
    if kernels:
        # As on a CUDA device: the operators' fakes stand in for the kernels.
        monkeypatch.setattr(ops, "use_kernels", lambda *_tensors: True)
        monkeypatch.setattr(_health, "use_kernels", lambda *_tensors: True)
    model = make().to("meta")
    x = torch.empty((16, 8) if make is mlp else (16, 3, 8, 8), device="meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    growth = wrap(model, optimizer, sample_every=1)
    # The first forward tells the sites.
    for _ in range(21):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        growth.step()
        growth.observation.worker.drain(30.0)
    assert 20 == growth.observation.sampler.position
    assert not growth.counters
    # 20 samples, three of them with the gradient of the host.
    assert 20 + 3 == growth.observation.worker.failures
    growth.close()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [mlp, small_cnn])
def test_no_synchronisation_on_a_device(make: Callable[[], nn.Module]) -> None:
    """Torch's own detector sees none on sampled steps, and what arrives is what the CPU measures."""
    x = torch.randn((64, 8) if make is mlp else (64, 3, 8, 8))
    found = []
    for device in ("cuda", "cpu"):
        model, inputs = make().to(device), x.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        growth = wrap(model, optimizer, example_inputs=(inputs,), sample_every=1)
        growth.step()
        for step in range(60):
            # The first steps may compile kernels and fill the allocator.
            if device == "cuda" and step > 30:
                growth.observation.worker.drain(30.0)
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.zero_grad()
                model(inputs).square().sum().backward()
                optimizer.step()
                growth.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert growth.observation.worker.drain(30.0)
        assert not growth.counters
        assert 0 == growth.observation.worker.failures
        found.append(growth.observation.sampler.take())
        growth.close()
    for on_device, on_host in zip(*found, strict=True):
        assert on_device.index == on_host.index
        assert on_device.gradient_norm == pytest.approx(on_host.gradient_norm, rel=0.2)
        assert on_device.effective_rank == pytest.approx(on_host.effective_rank, rel=0.3)
