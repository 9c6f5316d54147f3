"""A real host under the real controller: a run whose loss is not finite does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from esper.kasmina import wrap
from esper.kasmina.convert import boundary_state_from_proto, boundary_state_to_proto
from esper.kasmina.local import LocalPlane
from esper.tamiyo.controller import Conversation
from esper.tamiyo.domain import KernelFacts, Shelf
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.rules import Rules
from tests.services.tamiyo.tamiyo_worlds import make_kernel

if TYPE_CHECKING:
    from esper.kasmina.control import BoundaryState


@pytest.mark.parametrize("broken", [False, True])
def test_a_host_of_nan_does_not_germinate(*, broken: bool) -> None:
    """What is measured as NaN reaches the shield over the wire; the same host in good health germinates."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plane = LocalPlane()
    growth = wrap(model, optimizer, mesh=plane, run_id="digits-1", sample_every=1)
    if broken:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    x = torch.randn(64, 8)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        growth.step(loss)
    assert plane.hello is not None
    signatures = {site.signature for site in plane.hello.sites}
    kernels: list[KernelFacts] = [make_kernel(n, signature=s, parameters=4) for n, s in enumerate(signatures, 1)]
    rules = Rules(saturation_threshold=0.0, saturation_floor=0.0)
    conversation = Conversation(plane.hello, HeuristicPolicy(), rules)
    states: list[BoundaryState] = []

    def advise(state: BoundaryState) -> object:
        states.append(boundary_state_from_proto(boundary_state_to_proto(state)))
        return conversation.advise(states[-1], Shelf(kernels))

    plane.policy = advise
    report = growth.boundary({"loss": float(loss.detach())})
    assert report.advice is not None
    said = report.advice.explanation
    assert broken == ("the host is not well at boundary 1: train_loss, validation_loss" in said), said
    assert (0 if broken else 1) == len(report.applied), said
    growth.close()
