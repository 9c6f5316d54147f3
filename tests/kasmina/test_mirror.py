"""Devices get the state of all seeds."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load, save

from esper.kasmina import mirror as mirrors
from esper.kasmina.attach import Attachment, SeedModule
from esper.kasmina.control import Stage
from esper.kasmina.layout import SeedLayout
from esper.kasmina.mirror import DeviceMirror
from esper.kasmina.seeds import Execution
from esper.kasmina.sites import discover, observe
from tests.kasmina.hosts import TinyDelta, mlp

if TYPE_CHECKING:
    from torch import nn

CPU = torch.device("cpu")


def _grown(*names: str) -> tuple[nn.Module, SeedLayout, DeviceMirror, list[SeedModule]]:
    model = mlp()
    sites = {s.descriptor.name: s for s in discover(model, observe(model, (torch.randn(4, 8),))).sites}
    layout = SeedLayout(len(sites) * 2)
    mirror, seeds = DeviceMirror(layout), []
    for name in names:
        seed = SeedModule(TinyDelta(sites[name].descriptor.signature, "random"), sites[name])
        Attachment.attach(model, sites[name], seed)
        seed.mode = Execution.BLENDED
        seed.alpha.fill_(0.5)
        mirror.bind(seed)
        seeds.append(seed)
    return model, layout, mirror, seeds


@pytest.fixture(params=[True, False], ids=["shared", "copied"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes in the host's memory; the other way is that of a device of its own."""
    monkeypatch.setattr(mirrors, "_shares", lambda _device: request.param)


@pytest.mark.usefixtures("_memory")
def test_all_alphas_that_are_due_change_with_one_push() -> None:
    """Not before it, and no other: what a device itself wrote, or a checkpoint, is not overwritten."""
    _, layout, mirror, (first, second, third) = _grown("first", "second", "first..head")
    assert [0.5] * 3 == [float(seed.alpha) for seed in (first, second, third)]
    layout.set_alpha(first.index, 0.25)
    layout.set_alpha(second.index, 1.0)
    third.alpha.add_(0.125)
    assert [0.5, 0.5] == [float(first.alpha), float(second.alpha)]
    mirror.push()
    assert [0.25, 1.0, 0.625] == [float(seed.alpha) for seed in (first, second, third)]
    first.alpha.fill_(0.75)
    layout.transition(first.index, Stage.GERMINATED)
    mirror.push()
    assert 0.75 == float(first.alpha)
    assert Stage.GERMINATED == int(mirror.columns(CPU)["stage"][first.index])


def test_a_push_copies_only_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy on a step without a change, one for a device where something changed."""
    pushes: list[object] = []
    _, layout, mirror, (seed,) = _grown("first")
    monkeypatch.setattr(mirrors._Side, "push", lambda side: pushes.append(side.shared))
    mirror.push()
    layout.tick()
    mirror.push()
    assert 1 == len(pushes)
    layout.set_alpha(seed.index, 1.0)
    mirror.push()
    assert 2 == len(pushes)


def test_alpha_stays_a_buffer_of_its_seed() -> None:
    """state_dict, safetensors, deepcopy and load_state_dict see a 0-dimensional buffer with a value of its own."""
    model, layout, mirror, (first, second) = _grown("first", "second")
    state = model.state_dict()
    names = [f"first.esper_seed_{first.index}.alpha", f"second.esper_seed_{second.index}.alpha"]
    assert [torch.Size()] * 2 == [state[name].shape for name in names]
    assert [0.5, 0.5] == [float(load(save(state))[name]) for name in names]
    twin = copy.deepcopy(model)
    layout.set_alpha(first.index, 1.0)
    mirror.push()
    assert 0.5 == float(twin.state_dict()[names[0]])
    model.load_state_dict(twin.state_dict())
    assert 0.5 == float(first.alpha)
    mirror.release(first.index)
    layout.set_alpha(first.index, 1.0)
    mirror.push()
    assert 0.5 == float(first.alpha)


def test_a_model_that_was_moved_is_still_told() -> None:
    """`model.to` gives buffers other memory; the host's decisions reach them all the same."""
    model, layout, mirror, (first, second) = _grown("first", "second")
    model.double()
    layout.set_alpha(first.index, 0.25)
    mirror.push()
    assert (0.25, 0.5) == (float(first.alpha), float(second.alpha))


def test_compiled_once_along_a_ramp() -> None:
    """A graph reads alpha from the mirror: no recompilation when it changes, and the value is the new one."""
    torch._dynamo.reset()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model, layout, mirror, (_, second) = _grown("first", "first..head")
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(10):
        layout.set_alpha(second.index, step / 10)
        mirror.push()
        torch.testing.assert_close(model(x), compiled(x))
    assert 1 == len(graphs)
    torch._dynamo.reset()


@pytest.mark.gpu
def test_a_push_does_not_wait_for_the_device() -> None:
    """Alphas reach a CUDA device without a synchronisation."""
    model, layout, mirror, (first, second) = _grown("first", "second")
    model.cuda()
    for seed in (first, second):
        mirror.bind(seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout.set_alpha(first.index, 0.25)
        mirror.push()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (0.25, 0.5) == (float(first.alpha), float(second.alpha))
