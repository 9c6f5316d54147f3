"""Gradient scalers and closures: what newborns' gradients are judged by, and which steps count."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina._losses import LossReader
from esper.kasmina._steps import StepWatch
from esper.kasmina.blueprints import Birth, get
from esper.kasmina.control import Action, Stage
from esper.kasmina.isolation import IsolationTrainer
from esper.kasmina.kernels import Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.build import build
from esper.kasmina.newborn import NewbornGroups
from esper.kasmina.spikes import SpikeDetector
from tests.kasmina.hosts import TinyDelta, choice, vector
from tests.kasmina.test_isolation import _captures
from tests.kasmina.training.tools import CastDelta, Lion, Tool, ToolRun, autocast

if TYPE_CHECKING:
    from collections.abc import Callable

S = Stage


def _newborn(fused: bool) -> tuple[nn.Parameter, torch.optim.Optimizer, NewbornGroups]:
    host = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([host], lr=0.1, fused=fused)
    groups = NewbornGroups(optimizer, clip_norm=1.0)
    newborn = nn.Parameter(torch.zeros(4))
    groups.add(0, [("w", newborn)], [host], 1.0)
    return newborn, optimizer, groups


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [0.1, 10.0])
@pytest.mark.parametrize("unscale", [False, True])
def test_clipping_sees_unscaled_gradients(fused: bool, size: float, unscale: bool) -> None:
    """A newborn's gradient is measured and clipped as if there were no scaler, whoever divides by the scale."""
    newborn, optimizer, groups = _newborn(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    groups.compensate(0, torch.tensor(0.5))
    scaler.scale((newborn * size).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    # Four elements of `size`, divided by alpha.
    assert float(groups.gradient_norm(0)) == pytest.approx(4 * size)
    change = min(1.0, 4 * size) / 2 * 0.1
    assert torch.allclose(newborn, torch.full((4,), -change), rtol=1e-4)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1), lambda p: Lion(p, 0.1)])
@pytest.mark.parametrize("by_name", [False, True])
def test_closures_are_clipped_after_their_backward(make: Callable[[Any], torch.optim.Optimizer], by_name: bool) -> None:
    """The gradient that a closure computes is clipped, not the one that stood there before."""
    host, newborn = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))
    optimizer = make([host])
    groups = NewbornGroups(optimizer, clip_norm=1.0)
    groups.add(0, [("w", newborn)], [host], 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (newborn * 10.0).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert 0.0 == loss.item()
    assert float(groups.gradient_norm(0)) == pytest.approx(20.0)
    assert float(newborn.grad.norm()) == pytest.approx(1.0, rel=1e-4)
    assert not host.grad


def test_a_step_that_a_fused_optimizer_skips() -> None:
    """It is called and does nothing: on a CPU that is known at once."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    watch = StepWatch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, done in ((1.0, True), (math.inf, False), (2.0, True)):
        optimizer.zero_grad()
        scaler.scale((parameter * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (done, False) == (watch.take(), watch.take())
    watch.close()
    assert not optimizer._optimizer_step_post_hooks


def test_an_overflow_is_no_spike() -> None:
    """A loss that overflowed in a skipped step counts as high, not as the end, and is in no mean."""
    detector = SpikeDetector(patience=3)
    detector.arm()
    assert "" == detector.update(math.inf, skipped=True)
    assert "" == detector.update(math.nan, skipped=True)
    assert "" == detector.update(1.0, skipped=True)
    assert "" == detector.update(math.inf, skipped=True)
    assert "found inf" in detector.update(math.inf)
    assert ["", "", "x"] == [detector.update(math.nan, skipped=True) and "x" for _ in range(3)]
    reader = LossReader()
    for value, skipped in ((1.0, False), (math.inf, True), (3.0, True)):
        reader.push(torch.tensor(value), skipped)
    assert [False, True, True] == [loss.skipped for loss in reader.read()]
    assert 2.0 == reader.mean()


def test_a_graft_outlives_an_overflow() -> None:
    """A newborn is not rolled back for a loss that overflowed, which its scaler answered by skipping the step."""
    run = ToolRun(Tool(update=autocast(torch.float16), scale=2.0**10, delta=CastDelta))
    assert S.GRAFTING is run.grow(S.GRAFTING)
    steps = run.growth.steps
    x, y = run.train
    run.train = (x * 1e30, y)
    run.steps(2)
    run.train = (x, y)
    assert (2, steps) == (run.skipped, run.growth.steps)
    run.steps(4)
    assert S.GRAFTING is run.growth.life.stage(run.site())
    assert steps + 4 == run.growth.steps
    run.growth.close()


def test_isolation_leaves_out_what_overflowed() -> None:
    """Where only the device knows that a step was skipped, its batch changes nothing and is not held out."""
    trainer = IsolationTrainer(TinyDelta(vector(6, 4), "random"))
    for overflowed in (None, torch.tensor(0.0), torch.tensor(1.0)):
        for capture in _captures(4):
            capture.overflowed = overflowed
            if overflowed is not None and overflowed > 0:
                capture.gradient.fill_(math.inf)
            trainer.step(capture)
    gain, held_out, _ = trainer.measure()
    assert trainer.finite
    assert (True, 2) == (gain is not None, held_out)
    twin = IsolationTrainer(TinyDelta(vector(6, 4), "random"))
    twin.load_state_dict(trainer.state_dict())
    assert 2 == twin.measure()[1]


def test_an_optimizer_that_never_steps() -> None:
    """A loop whose optimizer is another one counts no step, and is told why."""
    run = ToolRun(Tool())
    for _ in range(3):
        run.growth.step(1.0)
    run.boundary(metrics={})
    assert 0 == run.growth.steps
    assert "no optimizer step was seen" in "".join(run.growth._said)
    run.growth.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_of_the_library_under_autocast(dtype: torch.dtype) -> None:
    """A real kernel trains in isolation on half-precision activations, ramps, and learns, in its own type."""
    tool = Tool(update=autocast(dtype), scale=None if dtype is torch.bfloat16 else 2.0**12)
    run = ToolRun(tool, isolation_learning_rate=1e-2, parameter_budget=5000)
    run.steps()
    signature = run.growth.sites[run.site()].descriptor.signature
    bundle = build(get("bottleneck_mlp").with_birth(Birth.RANDOM), signature, Tier.PORTABLE)
    kernel = load_candidate(bundle, kernel_id_of(bundle))
    run.plane.kernels[kernel.id] = kernel
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(kernel.id, steps=8, scale=1.0)))
    assert S.STABILIZING is run.advance(S.STABILIZING)
    assert 0 == run.growth.counters["failed_step"] + run.growth.counters["kernel_failures"]
    run.growth.close()
