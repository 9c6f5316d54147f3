"""Averages of the weights: they get and lose the parameters of newborns with the host."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper.kasmina.control import Action, Stage
from esper.kasmina.growth import Change, ChangeKind
from tests.kasmina.hosts import choice
from tests.kasmina.loops import OTHER, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

S = Stage


class Table:
    """An average as people write it: by name, over the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self) -> None:
        for name, p in self.model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 0.1)

    def changed(self, change: Change) -> None:
        """What the documentation tells to do."""
        parameters = dict(self.model.named_parameters())
        for name in change.parameters:
            if change.kind is ChangeKind.ATTACHED:
                self.shadow[name] = parameters[name].detach().clone()
            elif change.kind is ChangeKind.DETACHED:
                del self.shadow[name]


class Averaging(Run):
    """A run with an average of each kind, updated after each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.averages = [
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        ]
        self.table = Table(self.model)
        for average in self.averages:
            self.growth.follow(average.module)
        self.growth.on_change(self.table.changed)

    def schedule(self, loss: Tensor) -> None:
        super().schedule(loss)
        for average in self.averages:
            average.update_parameters(self.model)
        self.table.update()


def _agree(run: Averaging) -> None:
    """The averages have the host's names, and the same values, however they were taken."""
    names = [name for name, _ in run.model.named_parameters()]
    for average in run.averages:
        assert names == [name for name, _ in average.module.named_parameters()]
    first, second = (dict(average.module.named_parameters()) for average in run.averages)
    assert set(names) == set(run.table.shadow)
    assert all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("birth", ["zero", "random"])
def test_newborns_are_averaged(birth: str) -> None:
    """From its birth on a newborn is averaged too; the average computes with it, and ends as the host does."""
    run = Averaging(isolation_learning_rate=1e-2)
    changes: list[Change] = []
    stop = run.growth.on_change(changes.append)
    run.germinate(birth, steps=8)
    assert S.GRAFTING is run.advance(S.GRAFTING)
    _agree(run)
    assert S.STABILIZING is run.advance(S.STABILIZING)
    _agree(run)
    x = run.held_out[0]
    twin, host = run.averages[0].module, run.model
    seed = twin.get_submodule(f"head.esper_seed_{run.site()}")
    with_seed = twin(x)
    seed.enabled = False
    assert not torch.equal(with_seed, twin(x))
    seed.enabled = True
    assert [ChangeKind.ATTACHED, ChangeKind.MOVED, ChangeKind.MOVED, ChangeKind.MOVED] == [c.kind for c in changes]
    assert S.STABILIZING is changes[-1].stage
    assert changes[-1].parameters == tuple(n for n, _ in host.named_parameters() if "esper" in n)
    for average in run.averages:
        average.update_parameters(host)
        average.module.load_state_dict(host.state_dict())
        assert torch.equal(host(x), average.module(x))
    run.boundary(run.decide(Action.CULL))
    assert ChangeKind.DETACHED is changes[-1].kind
    stop()
    run.steps(3)
    _agree(run)
    assert "esper" not in "".join(twin.state_dict())
    run.growth.close()


def test_a_copy_that_was_made_of_a_grown_host() -> None:
    """A copy with seeds in it follows as well, with the values that it has; one that has none yet gets them."""
    run = Run()
    bare = copy.deepcopy(run.model)
    run.germinate(to=S.GRAFTING)
    run.steps(3)
    twin = copy.deepcopy(run.model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    before = twin(run.held_out[0])
    run.growth.follow(twin)
    assert torch.equal(before, twin(run.held_out[0]))
    run.growth.follow(bare)
    assert list(run.model.state_dict()) == list(bare.state_dict())
    run.kernel("zero", "head", "series", id=OTHER)
    series = run.site("head", "series")
    run.boundary(run.decide(Action.GERMINATE, series, kernel=choice(OTHER), to_stage=S.GRAFTING))
    run.boundary(run.decide(Action.CULL), run.decide(Action.CULL, series))
    assert list(run.model.state_dict()) == list(twin.state_dict())
    assert not any(m._forward_hooks for m in twin.modules())
    run.growth.close()


def test_averages_resume() -> None:
    """After the session is loaded the average has the host's seeds, and takes its own values."""
    run = Averaging()
    run.germinate(to=S.GRAFTING)
    run.steps()
    buffer = io.BytesIO()
    torch.save([run.growth.state_dict(), run.averages[0].state_dict()], buffer)
    growth, average = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    resumed = Averaging()
    resumed.growth.load_state_dict(growth, kernels=run.plane.kernels.get)
    resumed.averages[0].load_state_dict(average)
    x = run.held_out[0]
    assert torch.equal(run.averages[0](x), resumed.averages[0](x))
    run.growth.close()


def test_a_listener_that_fails() -> None:
    """What a user's listener raises is logged; the seed lives, and other listeners are told."""
    run = Run()
    told: list[Change] = []

    def broken(_change: Change) -> None:
        raise RuntimeError("no")

    run.growth.on_change(broken)
    run.growth.on_change(told.append)
    run.germinate(to=S.GRAFTING)
    assert S.GRAFTING is run.growth.life.stage(run.site())
    assert [ChangeKind.ATTACHED, ChangeKind.MOVED, ChangeKind.MOVED] == [change.kind for change in told]
    run.growth.close()
