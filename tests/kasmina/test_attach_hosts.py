"""Seeds in hosts with unusual outputs, shapes, owners and backwards."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina._ports import first_tensor, output_tensor, replace_first, why_no_tensor
from esper.kasmina.attach import Attachment, SeedModule, owner_of
from esper.kasmina.control import SiteKind
from esper.kasmina.health import HealthSampler, Worker
from esper.kasmina.seeds import Execution
from esper.kasmina.sites import discover, observe
from tests.kasmina.hosts import TinyDelta

if TYPE_CHECKING:
    from esper.kasmina.sites import Site

X = torch.randn(3, 4)


class _Named(NamedTuple):
    loss: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class _Frozen:
    name: str
    hidden: Tensor


class _Mapping(OrderedDict[str, Any]):
    """As model outputs of transformers: a dictionary whose entries are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@pytest.mark.parametrize(
    "output",
    [
        X,
        (X, None),
        [None, X],
        (torch.tensor(1.0), X),
        _Named(torch.tensor(1.0), X),
        _Frozen("a", X),
        {"loss": torch.tensor(1.0), "ids": torch.ones(3, 4, dtype=torch.long), "hidden": X},
        _Mapping(loss=torch.tensor(1.0), hidden=X),
        ((torch.ones(3), {"states": [X]}), "cache"),
    ],
)
def test_the_tensor_of_an_output(output: Any) -> None:
    """It is the first of floating-point numbers with two dimensions; its replacement leaves the rest as it was."""
    assert not why_no_tensor(output)
    assert X is output_tensor(output)
    other = torch.zeros(3, 4)
    changed = replace_first(output, other)
    assert type(output) is type(changed)
    assert other is output_tensor(changed)
    assert X is output_tensor(output)
    if isinstance(output, _Mapping):
        assert (other, output.loss) == (changed.hidden, changed["loss"])


def test_the_tensor_of_an_input() -> None:
    """A list of stages counts by its first tensor, where no argument is a tensor; a dictionary does not count."""
    assert X is first_tensor(([X, torch.ones(1)],), {})
    assert X is first_tensor(([torch.ones(1)], 3), {"x": X})
    assert first_tensor(({"x": X},), {}) is None


class _Helper(nn.Module):
    """Iterates over its children in a method that its forward calls, inside a comprehension's function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def _run(self, x: Tensor) -> Tensor:
        return sum((child(x) for child in [m for m in self.children() if not isinstance(m, nn.ReLU)]), x)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


def test_owner_where_a_helper_iterates() -> None:
    """The child hangs below a module that any method reachable from the forward iterates; a seed is run as identity."""
    model = _Helper()
    assert owner_of(model) is model.a
    site = _site(nn.Sequential(model), X, "0", SiteKind.SERIES)
    seed = _seed(site)
    assert X is seed(X)


def _site(model: nn.Module, x: Tensor, name: str, kind: SiteKind) -> Site:
    sites = discover(model, observe(model, (x,))).sites
    return next(s for s in sites if s.descriptor.name == name and s.descriptor.kind is kind)


def _seed(site: Site) -> SeedModule:
    seed = SeedModule(TinyDelta(site.descriptor.signature, "random"), site)
    seed.mode = Execution.BLENDED
    seed.alpha.fill_(1.0)
    return seed


def test_volumes() -> None:
    """A branch around a convolution over volumes is pooled in all three dimensions; its health is sampled."""
    model = nn.Sequential(nn.Conv3d(2, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4)).eval()
    x = torch.randn(2, 2, 4, 6, 8)
    site = _site(model, x, "0", SiteKind.PARALLEL)
    bare, seed = model[0](x), _seed(site)
    Attachment.attach(model, site, seed)
    pooled = nn.functional.avg_pool3d(x, 2)
    torch.testing.assert_close(bare + seed.delta(pooled.flatten(3)).view_as(bare), model[0](x))
    sampler = HealthSampler(model, [site], Worker())
    handles = sampler.install()
    model(x).sum().backward()
    sampler.collect()
    sampler._worker.close()
    assert sampler.take()[0].effective_rank is not None
    assert handles


class _Recomputed(nn.Module):
    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return x


@pytest.mark.parametrize("name", ["blocks.0", "blocks.1.0..blocks.1.2", "blocks.0..blocks.1"])
def test_activation_checkpointing(name: str) -> None:
    """Blocks that run again in the backward give the gradients of those that do not, spans across blocks included."""
    gradients = []
    for recompute in (False, True):
        model = _Recomputed(recompute=recompute)
        site = _site(model, X, name, SiteKind.PARALLEL)
        seed = _seed(site)
        attachment = Attachment.attach(model, site, seed)
        for _ in range(2):
            model.zero_grad()
            model(X.requires_grad_()).square().sum().backward()
        assert not seed.error
        gradients.append([p.grad for p in model.parameters()])
        copied = copy.deepcopy(model)
        assert torch.equal(copied(X), model(X))
        attachment.detach()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class _Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, skip: bool = False, rows: int = 3) -> Tensor:
        return self.last(x if skip else self.first(x)[:rows])


def test_spans_under_control_flow() -> None:
    """A span whose first module is skipped is not taken in that forward; other samples at its ends fail the seed."""
    model = _Skipping()
    site = _site(model, X, "first..last", SiteKind.PARALLEL)
    seed = _seed(site)
    Attachment.attach(model, site, seed)
    grown = model(X)
    assert torch.equal(model.last(X), model(X, skip=True))
    assert torch.equal(grown, model(X))
    assert torch.equal(grown[:2], model(X)[:2])
    assert (2, 4) == tuple(model(X, rows=2).shape)
    assert "expected a change of the shape (2, 4), found (3, 4)" in seed.error


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer])
def test_the_input_of_a_span_may_be_a_parameter_or_a_buffer(kind: Any) -> None:
    """A network that feeds one to its own layers (a table of positions) gets no second entry of it in its state."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = kind(torch.rand(5, 4))
            self.body = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.body(self.table).T

    model = Table()
    site = next(s for s in discover(model, observe(model, (X,))).sites if s.descriptor.granularity == "span")
    attachment = Attachment.attach(model, site, seed := _seed(site))
    names = list(model.state_dict())
    for _ in range(2):
        model(X)
    assert "" == seed.error
    assert names == list(model.state_dict())
    attachment.detach()
