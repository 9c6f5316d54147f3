"""With every tool: dormant is absent, a whole life works, nothing of a culled seed stays, a resumed run is the same."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from esper.kasmina.control import Action, Stage
from esper.kasmina.newborn import host_groups
from tests.kasmina.training.tools import (
    CastDelta,
    Lion,
    Tool,
    ToolRun,
    accumulated,
    accumulated_and_told,
    autocast,
    checkpointed,
    clipped,
    closure,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Made = Callable[[Any], torch.optim.Optimizer]

S = Stage


def _adam(kind: Any = torch.optim.AdamW, rate: float = 1e-2, **options: Any) -> Made:
    return lambda p: kind(p, lr=rate, **options)


def _groups(p: Any) -> torch.optim.Optimizer:
    params = list(p)
    groups = [
        {"params": params[:2], "lr": 2e-2, "betas": (0.8, 0.99), "name": "first"},
        {"params": params[2:], "weight_decay": 0.1, "name": "rest"},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


BF16 = autocast(torch.bfloat16)
FP16 = autocast(torch.float16)
CAREFUL = {"isolation_learning_rate": 1e-2}

TOOLS = {
    "autocast bfloat16": Tool(update=BF16, delta=CastDelta, options=CAREFUL),
    "autocast float16, gradient scaler": Tool(update=FP16, scale=2.0**23, delta=CastDelta, options=CAREFUL),
    "float16, gradient scaler, fused": Tool(_adam(fused=True), FP16, scale=2.0**23, delta=CastDelta, options=CAREFUL),
    "float16, unscaled and clipped by the loop": Tool(update=clipped, scale=2.0**23, delta=CastDelta),
    "accumulation": Tool(update=accumulated, options=CAREFUL),
    "accumulation, told of each pass": Tool(update=accumulated_and_told, options=CAREFUL),
    "checkpoint inside": Tool(make=checkpointed(reentrant=False, whole=False), options=CAREFUL),
    "checkpoint around": Tool(make=checkpointed(reentrant=False, whole=True), options=CAREFUL),
    "reentrant checkpoint inside": Tool(make=checkpointed(reentrant=True, whole=False)),
    "reentrant checkpoint around": Tool(make=checkpointed(reentrant=True, whole=True), options=CAREFUL),
    "closure": Tool(update=closure, options=CAREFUL),
    "nesterov, foreach": Tool(lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True, weight_decay=1e-3, foreach=True)),
    "adam": Tool(_adam(torch.optim.Adam)),
    "adamw, foreach": Tool(_adam(foreach=True)),
    "adamw, fused, amsgrad": Tool(_adam(fused=True, amsgrad=True)),
    "adamw, rate as a tensor": Tool(lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False)),
    "rmsprop": Tool(_adam(torch.optim.RMSprop, momentum=0.5, centered=True)),
    "adagrad": Tool(_adam(torch.optim.Adagrad, 0.05)),
    "adafactor": Tool(_adam(torch.optim.Adafactor, 0.05)),
    "lion": Tool(_adam(Lion, 3e-3, weight_decay=0.01)),
    "groups with options": Tool(_groups),
    "one cycle": Tool(scheduler=lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=400)),
    "cosine": Tool(_adam(), scheduler=lambda o: schedules.CosineAnnealingLR(o, 400)),
    "plateau": Tool(scheduler=lambda o: schedules.ReduceLROnPlateau(o, patience=20)),
    "sequential": Tool(
        _adam(),
        scheduler=lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, total_iters=10), schedules.CosineAnnealingLR(o, 390)], [10]
        ),
    ),
}
ISOLATED = [name for name, tool in TOOLS.items() if tool.options == CAREFUL]
"""Tools that come between a seed in isolation and what it learns from."""


def _same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key, value in a.items():
            _same(value, b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, value in enumerate(a):
            _same(value, b[i], f"{where}/{i}")
    elif not callable(a):
        assert a == b, where


@pytest.mark.parametrize("name", TOOLS)
def test_dormant_is_absent(name: str) -> None:
    """Model, optimizer, scheduler and scaler end with the bits of a run without growth; skipped steps do not count."""
    bare, run = ToolRun(TOOLS[name], wrapped=False), ToolRun(TOOLS[name])
    for each in (bare, run):
        each.steps(20)
    _same(bare.state(), {k: v for k, v in run.state().items() if k != "growth"})
    assert (20 - run.skipped, {}) == (run.growth.steps, dict(run.growth.counters))
    assert (run.scaler is not None) == bool(run.skipped)
    assert run.growth.sites
    run.growth.close()


@pytest.mark.parametrize("name", TOOLS)
def test_whole_life(name: str) -> None:
    """Grafted, on the host's schedule, the same bits after a resumption; culled there without a trace, kept here."""
    run = ToolRun(TOOLS[name])
    assert S.GRAFTING is run.grow(S.GRAFTING)
    newborn = run.optimizer.param_groups[-1]
    before = [p.detach().clone() for p in newborn["params"]]
    run.steps(8)
    assert all(not torch.equal(a, b) for a, b in zip(before, newborn["params"], strict=True))
    resumed = _resume(run)
    for each in (run, resumed):
        each.steps()
        each.boundary(each.decide(Action.ADVANCE, to_stage=S.FINE_TUNING))
        each.steps(8)
    assert run.growth.life.stage(run.site()) in {S.STABILIZING, S.FINE_TUNING}
    _same(*({**each.state(), "growth": {**each.growth.state_dict(), "seconds": 0}} for each in (run, resumed)))
    _follows(run)
    resumed.boundary(resumed.decide(Action.CULL))
    resumed.steps(3)
    _without_a_trace(resumed)
    assert S.FOSSILIZED is run.advance(S.FOSSILIZED, limit=30)
    run.steps(3)
    for each in (run, resumed):
        assert 0 == each.growth.counters["failed_step"] + each.growth.counters["rollbacks"]
        each.growth.close()


def _resume(run: ToolRun) -> ToolRun:
    buffer = io.BytesIO()
    torch.save(run.state(), buffer)
    resumed = ToolRun(run.tool)
    resumed.load(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), run.plane.kernels)
    resumed.plane.kernels = run.plane.kernels
    return resumed


def _follows(run: ToolRun) -> None:
    hosts, newborn = host_groups(run.optimizer), run.optimizer.param_groups[-1]
    assert len(hosts) == len(run.optimizer.param_groups) - 1
    # The scheduler has moved the host's rate since the step that this rate was for.
    assert float(newborn["lr"]) == pytest.approx(float(hosts[-1]["lr"]), rel=0.05)


def _without_a_trace(run: ToolRun) -> None:
    """Groups, state and hooks are those of an optimizer that never had a newborn."""
    host = {id(p) for p in run.model.parameters()}
    assert host == {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in run.optimizer.state} <= host
    assert not run.optimizer._optimizer_step_pre_hooks
    assert "esper" not in "".join(run.model.state_dict())


@pytest.mark.parametrize("name", ISOLATED)
def test_isolation_and_ramp(name: str) -> None:
    """A loud newborn learns from what it sees of the host, and its alpha rises from near 0 to 1."""
    run = ToolRun(TOOLS[name])
    assert S.GRAFTING is run.grow(S.GRAFTING, "random")
    assert run.growth.lineage()[0]["stages"][-1]["stage"] == "GRAFTING"
    assert S.STABILIZING is run.advance(S.STABILIZING)
    assert 0 == run.growth.counters["failed_step"] + run.growth.counters["rollbacks"]
    run.growth.close()
