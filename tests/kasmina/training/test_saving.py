"""safetensors: dormant, grown and fossilized hosts are saved and loaded, tied weights included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from esper.kasmina.control import Action, Stage
from tests.kasmina.hosts import TinyKernel, choice, mlp
from tests.kasmina.training.tools import Tool, ToolRun

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

S = Stage


class Tied(nn.Module):
    """Its last layer has the weight of the first, turned round, and its middle is narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 4, bias=False)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)
        self.head = nn.Linear(1, 4)
        self.twin = nn.Linear(8, 4, bias=False)
        self.twin.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.embed(x)))
        return self.head(self.second(hidden)) + 0.1 * self.twin(x)


def _tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


@pytest.mark.parametrize("make", [mlp, _tied], ids=["mlp", "tied"])
@pytest.mark.parametrize("stage", [S.DORMANT, S.GRAFTING, S.FOSSILIZED])
def test_saved_and_loaded(tmp_path: Path, make: Callable[[], nn.Module], stage: Stage) -> None:
    """The file has the names of the state; a model with the same seeds takes it, and computes the same."""
    tool = Tool(make=make)
    run, path = ToolRun(tool), tmp_path / "model.safetensors"
    if stage is S.DORMANT:
        run.steps()
    else:
        assert S.GRAFTING is run.grow(S.GRAFTING)
        run.steps()
        assert stage is S.GRAFTING or run.advance(stage) is stage
    save_model(run.model, str(path))
    names = set(load_file(path))
    assert (stage is not S.DORMANT) == any("esper_seed_" in name for name in names)
    assert names <= set(run.model.state_dict())
    loaded = ToolRun(tool)
    if stage is S.DORMANT:
        load_model(loaded.model, str(path))
    else:
        # The structure first: it is what growth remembers.
        loaded.growth.load_state_dict(run.growth.state_dict(), kernels=run.plane.kernels.get)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.zero_()
        load_model(loaded.model, str(path))
    x = run.held_out[0]
    assert torch.equal(run.model(x), loaded.model(x))
    if make is _tied:
        assert loaded.model.twin.weight is loaded.model.embed.weight


def test_tied_weights_grow_where_they_are_shared() -> None:
    """A seed at a layer whose weight is tied gets a group of its own, and the shared weight stays in one."""
    run = ToolRun(Tool(make=_tied))
    run.steps()
    site = run.site("embed", "series")
    signature = run.growth.sites[site].descriptor.signature
    run.plane.kernels["sha256:" + "c" * 64] = TinyKernel("sha256:" + "c" * 64, signature)
    given = choice("sha256:" + "c" * 64, scale=1.0)
    run.boundary(run.decide(Action.GERMINATE, site, kernel=given, to_stage=S.GRAFTING))
    assert S.GRAFTING is run.growth.life.stage(site)
    run.steps()
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert run.model.twin.weight is run.model.embed.weight
    run.growth.close()
