"""Optimizer groups of newborns."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from esper.kasmina.newborn import MARK, NewbornGroups, hide_from_schedulers, host_groups
from esper.mesh.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable


def _host(rate: float = 0.1, **options: object) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    return model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=0.01, **options)  # type: ignore[arg-type]


def _newborn() -> list[tuple[str, nn.Parameter]]:
    return [("weight", nn.Parameter(torch.ones(2, 2))), ("bias", nn.Parameter(torch.ones(2)))]


def _step(model: nn.Linear, optimizer: torch.optim.Optimizer, newborn: list[tuple[str, nn.Parameter]]) -> None:
    optimizer.zero_grad()
    (model(torch.ones(2, 3)).square().mean() + sum(p.square().sum() for _, p in newborn)).backward()
    optimizer.step()


def _add(groups: NewbornGroups, model: nn.Linear, scale: float = 3.0) -> list[tuple[str, nn.Parameter]]:
    newborn = _newborn()
    groups.add(5, newborn, model.parameters(), scale)
    return newborn


def test_follows_and_leaves_the_host_alone() -> None:
    """The newborn's rate is its scale times the host's whatever the schedule does; the host steps as without it."""
    alone, alone_optimizer = _host()
    model, optimizer = _host()
    groups = NewbornGroups(optimizer)
    for step in range(6):
        if step == 2:
            newborn = _add(groups, model)
        for o in (alone_optimizer, optimizer):
            host_groups(o)[0]["lr"] = 0.1 / (step + 1)
        _step(alone, alone_optimizer, [])
        _step(model, optimizer, newborn if step >= 2 else [])
    group = optimizer.param_groups[-1]
    assert (5, pytest.approx(0.3 / 6), 0.0, 0.9) == (group[MARK], group["lr"], group["weight_decay"], group["momentum"])
    assert torch.equal(alone.weight, model.weight)
    assert (1, 1) == groups.memberships([p for _, p in newborn])
    groups.remove(5)
    assert 1 == len(optimizer.param_groups)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    assert not optimizer._optimizer_step_pre_hooks
    assert (0, 0) == groups.memberships([p for _, p in newborn])
    groups.remove(5)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], schedules.LRScheduler]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda e: 0.9**e),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda _e: 0.9),
    "step": lambda o: schedules.StepLR(o, 3),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 5),
    "one_cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.2, total_steps=40),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 4),
    "warm_restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "linear": lambda o: schedules.LinearLR(o, total_iters=10),
    "polynomial": lambda o: schedules.PolynomialLR(o, 30),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=5), schedules.CosineAnnealingLR(o, 20)], [5]
    ),
    "chained": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.95)]),
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedulers_do_not_notice(name: str) -> None:
    """Groups come and go while a scheduler runs; the host's rates are those of a run without newborns."""
    rates: list[list[float]] = []
    for grown in (False, True):
        model, optimizer = _host()
        scheduler = SCHEDULES[name](optimizer)
        groups = NewbornGroups(optimizer)
        newborn: list[tuple[str, nn.Parameter]] = []
        seen = []
        for step in range(20):
            if grown and step in {4, 14}:
                newborn = _add(groups, model)
            if grown and step == 9:
                groups.remove(5)
                newborn = []
            _step(model, optimizer, newborn)
            if newborn:
                assert optimizer.param_groups[-1]["lr"] == pytest.approx(3 * optimizer.param_groups[0]["lr"])
            scheduler.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
        rates.append(seen)
    assert rates[0] == rates[1]


def test_plateau_and_late_schedulers() -> None:
    """A plateau scheduler works; one made while a newborn lives loses its entry when the newborn goes."""
    model, optimizer = _host()
    plateau = schedules.ReduceLROnPlateau(optimizer, patience=0)
    groups = NewbornGroups(optimizer)
    newborn = _add(groups, model)
    late = schedules.LambdaLR(optimizer, lambda e: 0.5**e)
    _step(model, optimizer, newborn)
    late.step()
    groups.remove(5)
    _step(model, optimizer, [])
    late.step()
    for _ in range(3):
        plateau.step(1.0)
    assert pytest.approx(0.1 * 0.25 * 0.01) == optimizer.param_groups[0]["lr"]
    assert 0 == hide_from_schedulers(optimizer)
    twin = copy.deepcopy(late)
    assert 1 == len(twin.optimizer.param_groups)
    late.optimizer.extra = 1
    assert 1 == optimizer.extra  # type: ignore[attr-defined]


def test_clipping_and_compensation() -> None:
    """A ramped newborn's gradient is divided by alpha, then clipped; the host's is left as it is."""
    model, optimizer = _host()
    groups = NewbornGroups(optimizer, clip_norm=1.0)
    newborn = _add(groups, model)
    assert groups.gradient_norm(5) is None
    groups.compensate(5, torch.tensor(0.5))
    for _, p in newborn:
        p.grad = torch.full_like(p, 0.1)
    model.weight.grad = torch.full_like(model.weight, 100.0)
    optimizer.step()
    norm = groups.gradient_norm(5)
    assert norm is not None
    assert pytest.approx(0.2 * 6**0.5) == float(norm)
    assert torch.allclose(newborn[0][1].grad, torch.tensor(0.2))
    assert bool((model.weight.grad == 100.0).all())
    for _, p in newborn:
        p.grad = torch.full_like(p, 10.0)
    optimizer.step()
    total = sum(float(p.grad.square().sum()) for _, p in newborn)
    assert pytest.approx(1.0, rel=1e-3) == total


def test_freeze_keeps_moments() -> None:
    """Frozen parameters do not move and take no gradient; thawed ones go on with their momentum."""
    model, optimizer = _host()
    groups = NewbornGroups(optimizer)
    newborn = _add(groups, model)
    _step(model, optimizer, newborn)
    groups.freeze(5, frozen=True)
    before = newborn[0][1].clone()
    (model(torch.ones(2, 3)).sum()).backward()
    optimizer.step()
    assert torch.equal(before, newborn[0][1])
    groups.freeze(5, frozen=False)
    assert "momentum_buffer" in optimizer.state[newborn[0][1]]
    _step(model, optimizer, newborn)
    assert not torch.equal(before, newborn[0][1])


def test_merge_is_smooth_and_complete() -> None:
    """After FOSSILIZED the rate goes geometrically to the host's and weight decay linearly; then nothing is clipped."""
    model, optimizer = _host()
    groups = NewbornGroups(optimizer, merge_steps=4, clip_norm=1e-3)
    newborn = _add(groups, model, scale=16.0)
    groups.merge(5)
    seen = []
    for _ in range(6):
        _step(model, optimizer, newborn)
        group = optimizer.param_groups[-1]
        seen.append((round(group["lr"] / 0.1, 6), round(group["weight_decay"], 6)))
    assert [(8.0, 0.0025), (4.0, 0.005), (2.0, 0.0075), (1.0, 0.01), (1.0, 0.01), (1.0, 0.01)] == seen
    assert float(newborn[0][1].grad.norm()) > 1e-3


def test_named_parameters_tensor_rates_and_site_group() -> None:
    """Named groups stay named, tensor rates stay tensors of their own, and the site's own group is followed."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(first.named_parameters()), "lr": torch.tensor(0.1)},
            {"params": list(second.named_parameters()), "lr": torch.tensor(0.01)},
        ],
        weight_decay=0.1,
        foreach=False,
    )
    groups = NewbornGroups(optimizer)
    newborn = _newborn()
    groups.add(0, newborn, second.parameters(), 2.0)
    group = optimizer.param_groups[-1]
    assert ["weight", "bias"] == group["param_names"]
    assert pytest.approx(0.02) == float(group["lr"])
    optimizer.param_groups[1]["lr"].fill_(0.5)
    sum(p.sum() for _, p in newborn).backward()
    optimizer.step()
    assert (pytest.approx(1.0), pytest.approx(0.5)) == (float(group["lr"]), float(optimizer.param_groups[1]["lr"]))
    with pytest.raises(Conflict, match="no optimizer group"):
        groups.add(0, _newborn(), [], 1.0)


def test_state_survives_the_optimizers_own() -> None:
    """After the optimizer's load_state_dict, which replaces its groups, the newborn is still followed and removable."""
    model, optimizer = _host()
    groups = NewbornGroups(optimizer)
    newborn = _add(groups, model)
    _step(model, optimizer, newborn)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    host_groups(optimizer)[0]["lr"] = 0.7
    _step(model, optimizer, newborn)
    assert pytest.approx(2.1) == optimizer.param_groups[-1]["lr"]
    document = groups.document()
    assert [{"seed": 5, "scale": 3.0, "host": 0, "merging": -1, "frozen": False}] == document
    groups.restore({**document[0], "frozen": True, "merging": 3}, None)
    assert (True, 3) == (groups.document()[0]["frozen"], groups.document()[0]["merging"])
    groups.remove(5)
    assert 1 == len(optimizer.param_groups)


def test_optimizers_that_can_not_take_newborns() -> None:
    """They are named, with the reason; others are not."""
    weight = [nn.Linear(1, 1).weight]
    assert "LBFGS takes one parameter group" in NewbornGroups(torch.optim.LBFGS(weight)).unfit()
    assert "SparseAdam takes sparse gradients" in NewbornGroups(torch.optim.SparseAdam(weight)).unfit()
    assert "Muon takes matrices" in NewbornGroups(torch.optim.Muon(weight)).unfit()
    assert not NewbornGroups(torch.optim.Adam(weight)).unfit()


class _Around(torch.optim.Optimizer):
    """What accelerate puts around an optimizer: the same groups, the same state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, object]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, object]:  # type: ignore[override]
        return self.optimizer.defaults

    def step(self, closure: object = None) -> None:
        self.optimizer.step()


def test_schedulers_of_something_around_the_optimizer() -> None:
    """A scheduler may hold what a framework has put around the optimizer."""
    model, optimizer = _host()
    around = _Around(optimizer)
    scheduler = schedules.LambdaLR(around, lambda e: 0.5**e)
    groups = NewbornGroups(optimizer)
    newborn = _add(groups, model)
    for _ in range(2):
        _step(model, around, newborn)
        scheduler.step()
    assert (pytest.approx(0.025), pytest.approx(0.15)) == tuple(group["lr"] for group in optimizer.param_groups)


def test_schedulers_made_of_schedulers() -> None:
    """Schedulers that see the host's groups alone can still be put together, and asked for their optimizer."""
    model, optimizer = _host()
    first, second = schedules.LinearLR(optimizer, total_iters=2), schedules.ExponentialLR(optimizer, 0.5)
    groups = NewbornGroups(optimizer)
    newborn = _add(groups, model)
    assert isinstance(first.optimizer, torch.optim.SGD)
    assert first.optimizer == optimizer == second.optimizer
    assert {first.optimizer, second.optimizer} == {optimizer}
    both = schedules.SequentialLR(optimizer, [first, second], [2])
    late = schedules.StepLR(first.optimizer, 2)
    for scheduler in (both, late):
        _step(model, optimizer, newborn)
        scheduler.step()
    assert 2 == len(optimizer.param_groups)


def test_schedulers_made_before_the_first_step_of_a_resumed_run() -> None:
    """A scheduler that is made when the groups are back, and given the state that it had, goes on."""
    model, optimizer = _host()
    groups = NewbornGroups(optimizer)
    saved = schedules.LambdaLR(optimizer, lambda e: 0.5**e).state_dict()
    newborn = _add(groups, model)
    groups.restore(groups.document()[0], None)
    scheduler = schedules.LambdaLR(optimizer, lambda e: 0.5**e)
    scheduler.load_state_dict(saved)
    _step(model, optimizer, newborn)
    scheduler.step()
    assert pytest.approx(0.05) == optimizer.param_groups[0]["lr"]


def test_no_warning_from_schedulers() -> None:
    """A scheduler first stepped after a newborn came still sees that the optimizer stepped before it."""
    model, optimizer = _host()
    scheduler = schedules.StepLR(optimizer, 2)
    newborn = _add(NewbornGroups(optimizer), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(model, optimizer, newborn)
        scheduler.step()
