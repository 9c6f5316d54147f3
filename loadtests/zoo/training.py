"""One network of the zoo in training, wrapped or alone, and what is compared of two of them.

bare, wrapped = Run(host), Run(host, sample_every=1)
assert same(bare.step(), wrapped.step())
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints import get
from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.control import Action, Decision
from esper.kasmina.local import LocalPlane
from esper.kasmina.wrapping import wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.kasmina.growth import Growth
    from esper.kasmina.signature import Signature
    from esper.kasmina.sites import Site
    from loadtests.zoo._host import Host

__all__ = ["BLUEPRINT", "Kernel", "Run", "close", "real", "same"]

BLUEPRINT = "low_rank"


@dataclass(frozen=True)
class Manifest:
    """The part of a kernel's manifest that the runtime reads."""

    signature: Signature
    parameter_count: int
    birth: str = "zero"
    causal: bool = True
    flops_per_position: int = 0


@dataclass(frozen=True)
class Kernel:
    """A blueprint run eagerly: what a portable kernel computes, without a bundle to build."""

    signature: Signature

    @property
    def manifest(self) -> Manifest:
        """What it is."""
        return Manifest(self.signature, sum(p.numel() for p in self.instantiate().parameters()))

    def instantiate(self, device: torch.device | str = "cpu") -> nn.Module:
        """A fresh module."""
        return BlueprintModule(get(BLUEPRINT).check(self.signature)).to(device)


def _leaves(output: Any) -> Iterator[Tensor]:
    """Every tensor of an output, in its order."""
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, dict):
        parts = list(output.values())
    elif isinstance(output, list | tuple):
        parts = list(output)
    elif is_dataclass(output):
        parts = [getattr(output, f.name) for f in fields(output)]
    else:
        parts = []
    for part in parts:
        yield from _leaves(part)


def real(output: Any) -> list[Tensor]:
    """Every tensor of an output that holds floating-point numbers."""
    return [leaf for leaf in _leaves(output) if leaf.is_floating_point()]


class Run:
    """One network in training."""

    def __init__(self, host: Host, **options: Any) -> None:
        self.host = host
        self.model = host.make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.plane = LocalPlane()
        self.kernels: dict[str, Kernel] = {}
        self.growth: Growth | None = None
        if options:
            given = {"run_id": "compatibility", "parameter_budget": 1 << 30, "settle_steps": 0, **options}
            self.growth = wrap(self.model, self.optimizer, mesh=self.plane, **given)
        self.count = 0

    def step(self) -> list[Tensor]:
        """Forward, backward, optimizer; gives outputs, gradients, and the random state that they leave."""
        torch.manual_seed(self.count)
        random.seed(self.count)
        self.optimizer.zero_grad()
        args, kwargs = self.host.batch(self.count)
        outputs = real(self.model(*args, **kwargs))
        wanted = [leaf for leaf in outputs if leaf.requires_grad]
        loss = torch.stack([leaf.float().square().mean() for leaf in wanted]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        self.count += 1
        if self.growth is not None:
            self.growth.step(loss)
        state = torch.tensor([*torch.get_rng_state().tolist(), random.getrandbits(32)])
        return [*(leaf.detach() for leaf in outputs), *gradients, state]

    def evaluate(self) -> list[Tensor]:
        """Outputs of one batch in evaluation; random numbers that the network draws are the same each time."""
        args, kwargs = self.host.batch(0)
        self.model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(2)
            outputs = real(self.model(*args, **kwargs))
        self.model.train()
        return outputs

    def boundary(self, *decisions: Decision) -> list[str]:
        """Carry decisions out; what was refused."""
        assert self.growth is not None
        report = self.growth.boundary({"loss": 1.0}, decisions=decisions)
        refused = [f"{a.decision.action}: {', '.join(map(str, a.refused))}" for a in report.applied if not a.done]
        return refused if len(report.applied) == len(decisions) else [*refused, "a decision was not carried out"]

    def decide(self, site: Site, action: Action, **more: Any) -> Decision:
        """A decision for the next boundary."""
        assert self.growth is not None
        boundary = self.growth.boundaries + 1
        return Decision(
            decision_id=f"{boundary}/{site.index}/{action}",
            boundary=boundary,
            seed=site.index,
            action=action,
            reason="BY_HAND",
            explanation="compatibility suite",
            **more,
        )


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal in every bit; a value that is not a number equals itself."""
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


def close(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal up to rounding: fused paths of torch that look for hooks are not taken around a seed."""
    return len(left) == len(right) and all(
        torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )
