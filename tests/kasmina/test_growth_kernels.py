"""The growth core with the library's own kernels, and the examples as a user runs them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

from esper.kasmina.blueprints import Birth, get
from esper.kasmina.control import Action, Stage
from esper.kasmina.kernels import Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.build import build
from tests.kasmina.hosts import choice, small_cnn, small_transformer
from tests.kasmina.loops import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.kernels import Kernel
    from esper.kasmina.signature import Signature

S = Stage


def _kernel(blueprint: str, signature: Signature, birth: Birth) -> Kernel:
    bundle = build(get(blueprint).with_birth(birth), signature, Tier.PORTABLE)
    return load_candidate(bundle, kernel_id_of(bundle))


@pytest.mark.parametrize("birth", list(Birth))
def test_whole_life_with_a_real_kernel(birth: Birth) -> None:
    """A portable kernel built from the catalogue goes from GERMINATED to FOSSILIZED around the narrow layer."""
    run = Run(rate=0.05, isolation_learning_rate=1e-2, parameter_budget=2000)
    run.steps()
    kernel = _kernel("bottleneck_mlp", run.growth.sites[run.site()].descriptor.signature, birth)
    run.plane.kernels[kernel.id] = kernel
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(kernel.id, steps=8, scale=1.0)))
    assert S.FOSSILIZED is run.advance(S.FOSSILIZED)
    twin = torch.nn.ModuleDict({"m": run.model})
    assert any("esper_seed_" in key for key in twin.state_dict())


@pytest.mark.parametrize(
    ("make", "shape", "name", "blueprint"),
    [
        (small_cnn, (4, 3, 8, 8), "1", "depthwise_conv"),
        (small_cnn, (4, 3, 8, 8), "0..1", "low_rank"),
        (small_transformer, (4, 5, 16), "0.layers.0", "mini_attention"),
    ],
)
def test_images_and_sequences(
    make: Callable[[], torch.nn.Module], shape: tuple[int, ...], name: str, blueprint: str
) -> None:
    """Kernels for images and sequences graft without changing the host's output, and learn there."""
    from esper.kasmina.blueprints.catalogue import catalogue

    known = {b.name for b in catalogue()}
    chosen = next(n for n in known if n.startswith(blueprint.partition("_")[0]))
    run = Run(make=make, parameter_budget=100_000)
    x = torch.randn(shape)
    run.model(x).sum().backward()
    run.growth.step(1.0)
    site = run.site(name)
    kernel = _kernel(chosen, run.growth.sites[site].descriptor.signature, Birth.ZERO)
    run.plane.kernels[kernel.id] = kernel
    run.model.eval()
    before = run.model(x)
    decision = run.decide(Action.GERMINATE, site, kernel=choice(kernel.id), to_stage=S.GRAFTING)
    report = run.boundary(decision, metrics={"loss": 1.0})
    assert (S.GRAFTING, ()) == (report.applied[0].stage, report.applied[0].refused[2:])
    assert torch.equal(before, run.model(x))
    for _ in range(3):
        run.optimizer.zero_grad()
        run.model(x).square().mean().backward()
        run.optimizer.step()
        run.growth.step(1.0)
    run.growth.life.runs[site].attachment.seed.enabled = False
    without = run.model(x)
    run.growth.life.runs[site].attachment.seed.enabled = True
    assert not torch.equal(without, run.model(x))


def test_examples_run(run_python: Callable[..., str]) -> None:
    """The plain loop trains to its end with no mesh at its address; the equality program finds every bit equal."""
    code = "import runpy, sys; sys.argv = ['x', *sys.argv[1:]]; "
    plain = run_python(
        code + "m = runpy.run_path('examples/plain_loop.py'); m['main']('127.0.0.1:9', epochs=3)",
    )
    assert re.search(r"epoch  3: loss \d\.\d+, accuracy 0\.\d+\n(?s:.*), 0 seeds not dormant", plain)
    equal = run_python("import runpy; m = runpy.run_path('examples/dormant_equality.py'); print(m['main']())")
    assert equal.endswith("0\n")
    assert "DIFFERS" not in equal
