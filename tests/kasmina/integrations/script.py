"""A control plane that follows a script, for frameworks that own their loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from esper.kasmina.control import Action, Advice, Decision, Stage
from esper.kasmina.local import LocalPlane
from tests.kasmina.hosts import TinyDelta, TinyKernel, choice, decide

if TYPE_CHECKING:
    from torch import Tensor, nn

    from esper.kasmina.control import BoundaryState, RunHello

KERNEL = "sha256:" + "a" * 64
OPTIONS = {
    "run_id": "t",
    "min_graft_steps": 4,
    "sample_every": 5,
    "confidence": 0.5,
    "probation_boundaries": 1,
    "price_per_million_parameters": 0.0,
    "causal": False,
    "parameter_budget": 100_000,
}
"""Gates that open within a few steps."""


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same names in the same order, with the same bits."""
    assert list(a) == list(b)
    assert [] == [name for name in a if not torch.equal(a[name], b[name])]


def values(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


class Script(LocalPlane):
    """Germinates at one site at one boundary, and commands the seed forward at each later one.

    Args:
        site: name of a parallel site.
        first: boundary at which it germinates.
        cull: boundary at which it is taken out; 0 for never.
        delta: module of the kernel.
    """

    def __init__(
        self, site: str = "first..head", *, first: int = 1, cull: int = 0, delta: type[TinyDelta] = TinyDelta
    ) -> None:
        super().__init__(advise=self._advise)
        self.site = site
        self.first = first
        self.cull = cull
        self.delta = delta
        self.seed = -1
        self.states: list[BoundaryState] = []

    def open(self, hello: RunHello) -> None:
        super().open(hello)
        # A session that is being resumed knows its sites a little later.
        for found in hello.sites:
            if found.name == self.site and found.kind.value == "parallel":
                self.seed = found.index
                self.kernels[KERNEL] = TinyKernel(KERNEL, found.signature, "zero", found.causal, self.delta)

    def _advise(self, state: BoundaryState) -> Advice:
        self.states.append(state)
        decisions: tuple[Decision, ...] = ()
        if state.boundary == self.first:
            given = choice(KERNEL, scale=1.0)
            decisions = (decide(state.boundary, self.seed, Action.GERMINATE, kernel=given, to_stage=Stage.GRAFTING),)
        elif state.boundary == self.cull:
            decisions = (decide(state.boundary, self.seed, Action.CULL),)
        elif any(s.index == self.seed and s.stage < Stage.FOSSILIZED for s in state.seeds):
            decisions = (decide(state.boundary, self.seed, Action.ADVANCE, to_stage=Stage.FOSSILIZED),)
        return Advice(boundary=state.boundary, decisions=decisions, explanation="", controller_state=b"")
