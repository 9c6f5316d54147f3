"""Dormant means absent: a wrapped model is the unwrapped one, bit for bit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina import wrap
from examples.dormant_equality import HOSTS, compare

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_bit_identical(name: str) -> None:
    """Outputs, gradients, state_dict keys and values, types and three optimizer steps are those of the bare host."""
    assert {} == {what: equal for what, equal in compare(name).items() if not equal}


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_no_hook_after_the_first_forward(name: str) -> None:
    """One observing hook stands until the first training forward; afterwards none, except on sampled steps."""
    make, batch = HOSTS[name]
    model = make()
    growth = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), sample_every=0)
    assert 1 == _hooks(model)
    x, _ = batch(0)
    model(x).sum().backward()
    growth.step(1.0)
    assert 0 == _hooks(model)
    assert growth.sites
    growth.close()


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) // 2


def test_copy_and_example_inputs() -> None:
    """A wrapped model can be deep-copied; with example inputs no hook is ever put on it."""
    make, batch = HOSTS["mlp"]
    model = make().eval()
    wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=(batch(0)[0],)).close()
    assert 0 == _hooks(model)
    assert torch.equal(model(batch(0)[0]), copy.deepcopy(model)(batch(0)[0]))


def test_first_forward_in_evaluation_is_left_alone() -> None:
    """Evaluation without gradients takes attention's fast path as ever; sites are learnt from a training forward."""
    make: Callable[[], nn.Module] = HOSTS["transformer"][0]
    x: Tensor = HOSTS["transformer"][1](0)[0]
    bare, model = make().eval(), make().eval()
    growth = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        assert torch.equal(bare(x), model(x))
    growth.step(1.0)
    assert () == growth.sites
    growth.close()
