"""A faster variant takes a kernel's place between two steps: nothing but the time that it takes is another."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from esper.kasmina.blueprints import Birth, get
from esper.kasmina.breaker import Scope
from esper.kasmina.control import Action, Stage
from esper.kasmina.kernels import Compiled, Kernel, Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.attempt import portable_gradients
from esper.kasmina.kernels.build import build
from tests.kasmina.hosts import choice
from tests.kasmina.loops import Run

if TYPE_CHECKING:
    from torch import Tensor

    from esper.kasmina.signature import Signature

S = Stage
VARIANT = "sha256:" + "c" * 64


def portable(signature: Signature, blueprint: str = "bottleneck_mlp") -> Kernel:
    """A kernel as the forge builds it in a second."""
    bundle = build(get(blueprint).with_birth(Birth.RANDOM), signature, Tier.PORTABLE)
    return load_candidate(bundle, kernel_id_of(bundle))


def variant_of(kernel: Kernel, calls: list[str]) -> Kernel:
    """A kernel of the same blueprint whose code stands for compiled one; it tells its calls."""

    def forward(inputs: list[Tensor]) -> list[Tensor]:
        calls.append("forward")
        with torch.no_grad():
            return [kernel.portable(*inputs)]

    def backward(taken: list[Tensor]) -> list[Any]:
        calls.append("backward")
        grad, *inputs = taken
        return portable_gradients(kernel.portable, grad, inputs, [True] * len(inputs))

    return Kernel(
        kernel_id=VARIANT,
        manifest=replace(kernel.manifest, tier=Tier.STANDARD, target="cpu/x86_64/avx2/torch-2.13"),
        plan=kernel.plan,
        parameters={name: p.detach() for name, p in kernel.instantiate().named_parameters()},
        compiled=Compiled(forward, backward, tuple(range(1 + len(kernel.parameter_names)))),
        nbytes=0,
    )


def grafted(**options: Any) -> Run:
    """A run in which a real kernel has been trained for a while."""
    run = Run(rate=0.05, parameter_budget=2000, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **options)
    run.steps()
    kernel = portable(run.growth.sites[run.site()].descriptor.signature)
    run.plane.kernels[kernel.id] = kernel
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(kernel.id, steps=2, scale=1.0), to_stage=S.GRAFTING))
    run.advance(S.GRAFTING)
    run.steps()
    return run


def offered(run: Run, calls: list[str]) -> Kernel:
    """The variant, at hand from now on."""
    seed = run.growth.life.runs[run.site()]
    assert isinstance(seed.kernel, Kernel)
    variant = variant_of(seed.kernel, calls)
    run.plane.variants[seed.choice.kernel_id] = variant
    return variant


def optimizer_state(run: Run) -> dict[int, list[int]]:
    """Which tensors the optimizer holds, by parameter."""
    return {
        id(p): [id(value) for value in held.values() if isinstance(value, torch.Tensor)]
        for p, held in run.optimizer.state.items()
    }


def test_nothing_changes_but_who_computes() -> None:
    """Values, parameters, optimizer state and stage stay; from then on the variant runs, and training agrees."""
    run, twin, calls = grafted(), grafted(), []
    seed = run.growth.life.runs[run.site()]
    x = run.held_out[0]
    before, state, parameters = run.model(x), optimizer_state(run), list(seed.module.parameters())
    stage, born = run.growth.life.stage(run.site()), seed.choice.kernel_id
    offered(run, calls)
    run.boundary(metrics={"loss": 1.0})
    twin.boundary(metrics={"loss": 1.0})
    assert (VARIANT, VARIANT, stage) == (seed.choice.kernel_id, seed.kernel.id, run.growth.life.stage(run.site()))
    assert all(a is b for a, b in zip(parameters, seed.module.parameters(), strict=True))
    assert state == optimizer_state(run)
    torch.testing.assert_close(run.model(x), before)
    (event,) = [fields for kind, fields in run.plane.events if kind == "kernel_swapped"]
    assert (born, VARIANT, "standard", run.growth.steps) == (event["from"], event["to"], event["tier"], event["step"])
    assert [VARIANT] == [swap["to"] for swap in run.growth.lineage()[0]["swaps"]]
    assert VARIANT in run.plane.held
    assert born not in run.plane.held
    calls.clear()
    run.steps()
    twin.steps()
    assert {"forward", "backward"} == set(calls)
    assert list(twin.model.state_dict()) == list(run.model.state_dict())
    for name, value in twin.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_with_the_variant() -> None:
    """The checkpoint names the variant, and what comes back runs it with the same parameters and optimizer state."""
    run, calls = grafted(), []
    variant = offered(run, calls)
    run.boundary(metrics={"loss": 1.0})
    buffer = io.BytesIO()
    parts = {"growth": run.growth, "model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    again = Run(rate=0.05, parameter_budget=2000, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    again.growth.load_state_dict(state["growth"], kernels={VARIANT: variant})
    again.model.load_state_dict(state["model"])
    again.optimizer.load_state_dict(state["optimizer"])
    again.scheduler.load_state_dict(state["scheduler"])
    for other in (run, again):
        calls.clear()
        other.steps()
        assert {"forward", "backward"} == set(calls)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value)


@pytest.mark.parametrize("why", ["another blueprint", "an open circuit", "a compiled host"])
def test_what_is_not_taken(why: str) -> None:
    """A variant of something else, one that has failed, and any in a compiled host: the seed keeps its kernel."""
    run, calls = grafted(), []
    seed = run.growth.life.runs[run.site()]
    before = seed.kernel
    offered(run, calls)
    if why == "another blueprint":
        run.plane.variants[seed.choice.kernel_id] = portable(seed.kernel.manifest.signature, "low_rank")
    elif why == "an open circuit":
        run.growth.life.breakers.trip(Scope.CODE, VARIANT, "raised once")
    else:
        run.growth.observation.compiled = True
    run.boundary(metrics={"loss": 1.0})
    assert before is seed.kernel
    assert (why == "another blueprint") == bool(run.growth.counters["variants_refused"])
    assert "kernel_swapped" not in [kind for kind, _ in run.plane.events]
