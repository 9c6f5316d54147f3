"""Activation checkpointing: seeds inside, around and across the part that is run again in the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.control import Action, Stage
from tests.kasmina.hosts import choice
from tests.kasmina.loops import Run

if TYPE_CHECKING:
    from collections.abc import Callable


class Deep(nn.Module):
    """Five layers of which the third and the fourth may be recomputed."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.z, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(torch.tanh(self.z(x))))
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.d(self._middle(x))
        return self.d(checkpoint(self._middle, x, use_reentrant=self.reentrant))

    def _middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(torch.tanh(self.b(x))))


def _deep() -> nn.Module:
    torch.manual_seed(0)
    return Deep()


@pytest.fixture(scope="module")
def grown() -> Callable[[str, str], Run]:
    """A host with one loud seed in full effect at a site."""

    def make(name: str, kind: str) -> Run:
        run = Run(make=_deep, parameter_budget=10_000, causal=False)
        run.steps(1)
        run.kernel("zero", name, kind)
        given = choice("sha256:" + "a" * 64)
        site = run.site(name, kind)
        run.boundary(run.decide(Action.GERMINATE, site, kernel=given, to_stage=Stage.GRAFTING), metrics={})
        with torch.no_grad():
            for parameter in run.growth.life.runs[site].module.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        return run

    return make


SITES = [("b", "series"), ("c", "parallel"), ("b..c", "parallel"), ("a..c", "parallel"), ("c..d", "parallel")]
SITES += [("b..d", "parallel"), ("a..b", "parallel")]
UPSTREAM = {"c..d": {"z", "a", "b"}, "a..c": {"z"}, "a..b": {"z"}}
"""What stands before a span that crosses a reentrant border, and gets no gradient through it."""


def _gradients(run: Run, x: Tensor) -> dict[str, Tensor]:
    run.model.zero_grad()
    run.model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "kind"), SITES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_it(
    grown: Callable[[str, str], Run], name: str, kind: str, reentrant: bool
) -> None:
    """Outputs are the same, and so are all gradients; only what crosses a reentrant border does not go upstream."""
    run = grown(name, kind)
    x = run.train[0][:8]
    wanted = _gradients(run, x)
    output = run.model(x)
    run.model.reentrant = reentrant
    for _ in range(2):
        found = _gradients(run, x)
    assert torch.equal(output, run.model(x))
    assert list(wanted) == list(found)
    different = {key.split(".")[0] for key in wanted if not torch.allclose(wanted[key], found[key], atol=1e-6)}
    assert (UPSTREAM.get(name, set()) if reentrant else set()) == different
