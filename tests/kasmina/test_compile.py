"""Hosts under torch.compile: dormant for free, and a stated number of graphs for a whole life."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from esper.kasmina.blueprints import get
from esper.kasmina.control import Action, BlendStrategy, Stage
from esper.kasmina.kernels import Compiled, Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.build import build, limitations
from esper.kasmina.kernels.kernel import Kernel
from tests.kasmina.hosts import TinyKernel, choice, mlp
from tests.kasmina.loops import KERNEL, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

S = Stage
HAS_COMPILER = not limitations(Tier.STANDARD)


class Compiler:
    """A backend that counts the graphs it is given, by whether they are differentiated."""

    def __init__(self) -> None:
        self.train = self.eval = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        """As ``aot_eager``: the graphs of a real compiler, run by plain torch."""
        if torch.is_grad_enabled():
            self.train += 1
        else:
            self.eval += 1
        return aot_eager(graph, inputs)

    @property
    def graphs(self) -> tuple[int, int]:
        """For training, and for validation."""
        return self.train, self.eval


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    """A fresh dynamo, and no break in the end."""
    torch._dynamo.reset()
    counters.clear()
    found = Compiler()
    yield found
    breaks = dict(counters["graph_break"])
    torch._dynamo.reset()
    assert {} == breaks


def sequential() -> nn.Module:
    """The host of `mlp`, as a module of torch's own: dynamo takes its hooks into the graph."""
    parts = mlp()
    return nn.Sequential(parts.first, nn.ReLU(), parts.second, nn.ReLU(), parts.head)


def around(model: nn.Module, compiler: Compiler) -> nn.Module:
    """``torch.compile(model)``."""
    return torch.compile(model, backend=compiler, fullgraph=True)


def in_place(model: nn.Module, compiler: Compiler) -> nn.Module:
    """``model.compile()``."""
    model.compile(backend=compiler, fullgraph=True)
    return model


FORMS = [(mlp, around), (sequential, around), (mlp, in_place)]
SPANS = {mlp: "first..head", sequential: "0..4"}


class CompiledRun(Run):
    """A run whose model is compiled, before it is wrapped or afterwards; validations have one batch size."""

    def __init__(
        self, compiler: Compiler, make: Any = mlp, form: Any = around, *, first: bool = True, **options: Any
    ) -> None:
        self.span = SPANS[make]
        super().__init__(make=(lambda: form(make(), compiler)) if first else make, **options)
        if not first:
            self.model = form(self.model, compiler)

    def _validate(self) -> dict[str, Any]:
        x, y = self.held_out
        pairs = zip(x.split(8), y.split(8), strict=True)
        return {"loss": [float(nn.functional.cross_entropy(self.model(a), b)) for a, b in pairs]}

    def site(self, name: str = "", kind: str = "parallel") -> int:
        """Index of a site; of the span around the narrow layer by default."""
        return super().site(name or self.span, kind)

    def kernel(self, birth: str = "zero", name: str = "", kind: str = "parallel", **more: Any) -> TinyKernel:
        """A kernel for it."""
        return super().kernel(birth, name or self.span, kind, **more)


def plain_training(model: nn.Module, run: Run, epochs: int) -> dict[str, torch.Tensor]:
    """What `Run.steps` does, without growth; returns the state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step)
    x, y = run.train
    for i in range(16 * epochs):
        batch = slice(8 * (i % 16), 8 * (i % 16) + 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
    return {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("make", "form"), FORMS)
def test_a_dormant_host_is_compiled_once(make: Callable[[], nn.Module], form: Any, compiler: Compiler) -> None:
    """One graph to train and one to validate, sampled or not; the bits of the model alone; sites and health known."""
    run = CompiledRun(compiler, make, form, sample_every=1)
    for _ in range(3):
        run.steps()
        run.boundary()
    assert (1, 1) == compiler.graphs
    assert 9 == len(run.growth.sites)
    assert run.growth.observation.gradient_norm is not None
    found = {k.removeprefix("_orig_mod."): v for k, v in run.model.state_dict().items()}
    alone = plain_training(form(make(), Compiler()), run, 3)
    assert list(alone) == list(found)
    assert all(torch.equal(value, found[name]) for name, value in alone.items())
    run.growth.close()


def test_health_of_a_compiled_host_comes_from_held_out_data(compiler: Compiler) -> None:
    """Rank and dead features are measured at every boundary; the gradient at a site is missing, and stays missing."""
    states = []
    run = CompiledRun(compiler)
    run.plane.policy = states.append
    for _ in range(2):
        run.steps()
        run.boundary()
    for state in states:
        assert {s.index for s in run.growth.sites} == {health.index for health in state.sites}
        assert any(health.effective_rank is not None for health in state.sites)
        assert all(health.dead_fraction is not None and health.gradient_norm is None for health in state.sites)
    # One validation to learn the inputs; afterwards one forward is enough.
    assert (3, 1) == (run.validations, run.growth.measurer.passes)
    run.growth.close()


def test_compiled_after_it_was_wrapped(compiler: Compiler) -> None:
    """A module of torch's own takes the observing hooks into its first graph: one more, and no other."""
    run = CompiledRun(compiler, sequential, first=False)
    for _ in range(2):
        run.steps()
        run.boundary()
    assert (2, 1) == compiler.graphs
    assert run.growth.observation.compiled
    assert 9 == len(run.growth.sites)


class Block(nn.Module):
    """Two layers with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 8) -> (N, 8)."""
        return x + self.b(torch.relu(self.a(x)))


class Blocks(nn.Module):
    """Two blocks and a head, compiled in parts or inside a function."""

    def __init__(self, how: str, compiler: Compiler) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 4)
        for place, block in enumerate(self.blocks):
            if how == "in place":
                block.compile(backend=compiler)
            elif how == "around":
                self.blocks[place] = torch.compile(block, backend=compiler)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 8) -> (N, 4)."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own question
@pytest.mark.parametrize("how", ["in place", "around", "a function"])
def test_compiled_in_parts_or_by_a_function(how: str, compiler: Compiler) -> None:
    """Seeds inside a compiled part learn, wherever the compiler stands; what is dormant is compiled once."""
    run = Run(make=lambda: Blocks(how, compiler))
    if how == "a function":
        inner = run.model

        def call(x: torch.Tensor) -> torch.Tensor:
            return inner(x)

        run.model = nn.Module()
        run.model.forward = torch.compile(call, backend=compiler)
    for _ in range(2):
        run.steps()
        run.boundary(metrics=lambda: {"loss": [float(run.model(x).mean()) for x in run.held_out[0].split(8)]})
    assert run.growth.observation.compiled
    # Of each block, or of the whole with and without the hooks of the first forward.
    assert 2 == compiler.train
    site = next(s for s in run.growth.sites if s.descriptor.name.endswith(".a"))
    run.plane.kernels[KERNEL] = kernel = TinyKernel(KERNEL, site.descriptor.signature)
    born = run.decide(Action.GERMINATE, site.index, kernel=choice(KERNEL), to_stage=S.GRAFTING)
    assert run.boundary(born, metrics={}).applied[0].done
    run.steps(4)
    assert float(kernel.made[0].up.detach().abs().sum()) > 0


def live(run: CompiledRun, birth: str, compiler: Compiler) -> dict[str, tuple[int, int]]:
    """A whole life after two dormant epochs; the graphs made for each stage, until the next."""
    graphs: dict[str, tuple[int, int]] = {}
    seen = (0, 0)

    def count(stage: str) -> None:
        nonlocal seen
        now = compiler.graphs
        graphs[stage] = (now[0] - seen[0], now[1] - seen[1])
        seen = now

    for _ in range(2):
        run.steps()
        run.boundary()
    count("DORMANT")
    way = [S.GRAFTING, S.STABILIZING, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]
    run.germinate(birth, to=S.GRAFTING if birth == "zero" else S.TRAINING, blend=BlendStrategy.DRIFT, steps=8)
    for stage, following in pairwise([*(() if birth == "zero" else (S.TRAINING,)), *way]):
        run.steps()
        assert following is run.advance(following)
        count(stage.name)
    run.steps()
    run.boundary()
    count("FOSSILIZED")
    return graphs


@pytest.mark.parametrize("birth", ["zero", "random"])
def test_graphs_of_a_life(birth: str, compiler: Compiler) -> None:
    """Born silent: two graphs to train and one to validate; born loud: one more each. None is alpha's."""
    run = CompiledRun(compiler, isolation_learning_rate=1e-2)
    graphs = live(run, birth, compiler)
    assert {
        "DORMANT": (1, 1),
        **({} if birth == "zero" else {"TRAINING": (1, 1)}),
        "GRAFTING": (1, 1),
        # It is no longer measured how loud the seed is.
        "STABILIZING": (1, 0),
        "EVALUATING": (0, 0),
        "FINE_TUNING": (0, 0),
        "FOSSILIZED": (0, 0),
    } == graphs
    # Worth was measured, with the seed on and off, by the graph that was there.
    assert run.growth.measurer.passes > 4
    report = run.plane.reports[-1]
    assert report.counterfactual is not None
    assert report.counterfactual.lower_bound > 0
    assert not {"failed_step", "failed_observation", "failed_measure"} & set(run.growth.counters)
    run.growth.close()


def test_a_life_leaves_no_graph_behind(compiler: Compiler) -> None:
    """However many seeds come and go, dynamo's limit of graphs per function is no nearer; the host is itself again."""
    run = CompiledRun(compiler)
    for life in range(3):
        run.steps()
        run.boundary()
        before = run.model(run.held_out[0][:8]).clone()
        run.germinate(to=S.GRAFTING)
        assert torch.equal(before, run.model(run.held_out[0][:8]))
        run.steps()
        run.boundary(run.decide(Action.CULL, embargo_boundaries=0))
        run.boundary(run.decide(Action.RELEASE))
        assert S.DORMANT is run.growth.life.stage(run.site())
        assert 2 * (life + 1) == compiler.train
    alone = mlp()
    alone.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in run.model.state_dict().items()})
    assert torch.allclose(alone(run.held_out[0]), run.model(run.held_out[0]))


def test_isolation_sees_the_same_compiled_or_not(compiler: Compiler) -> None:
    """What a seed learns from in isolation, values and gradients, does not depend on who runs the host."""
    found = []
    for run in (CompiledRun(compiler), Run()):
        run.steps()
        run.boundary()
        run.germinate("random", to=S.TRAINING)
        run.steps(4)
        seed = run.growth.life.runs[run.site()]
        assert seed.isolation is not None
        assert 4 == seed.isolation.steps
        found.append([p.detach().clone() for p in seed.module.parameters()])
        run.growth.close()
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_kernel_in_a_compiled_host(compiler: Compiler) -> None:
    """There a blueprint becomes a part of the host's graph: compiled functions could not be looked into."""
    run = CompiledRun(compiler)
    run.steps()
    run.boundary()
    site = run.growth.sites[run.site()]
    bundle = build(get("bottleneck_mlp"), site.descriptor.signature, Tier.PORTABLE)
    loaded = load_candidate(bundle, kernel_id_of(bundle))
    opaque = _opaque(loaded)
    run.plane.kernels[loaded.id] = opaque
    decision = run.decide(Action.GERMINATE, kernel=choice(loaded.id), to_stage=S.GRAFTING)
    assert run.boundary(decision).applied[0].done
    run.steps()
    seed = run.growth.life.runs[run.site()].module
    born = dict(loaded.instantiate().named_parameters())
    assert all(not torch.equal(p, born[name]) for name, p in seed.named_parameters())
    x = run.held_out[0][:8]
    with torch.no_grad():
        torch.testing.assert_close(run.model(x), run.growth.model.forward(x))


def _opaque(kernel: Kernel) -> Kernel:
    """The kernel with compiled functions that dynamo can not trace, in place of machine code."""
    values = {name: p.detach() for name, p in kernel.instantiate().named_parameters()}

    def delta(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(kernel.instantiate(), dict(zip(values, parameters, strict=True)), (x,))

    @torch._dynamo.disable
    def forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [delta(*inputs).detach()]

    @torch._dynamo.disable
    def backward(taken: list[torch.Tensor]) -> list[torch.Tensor]:
        grad, *inputs = taken
        wanted = [t.detach().requires_grad_() for t in inputs]
        with torch.enable_grad():
            return list(torch.autograd.grad(delta(*wanted), wanted, grad))

    return Kernel(
        kernel_id=kernel.id,
        manifest=kernel.manifest,
        plan=kernel.plan,
        parameters=values,
        compiled=Compiled(forward, backward, tuple(range(1 + len(values)))),
        nbytes=kernel.nbytes,
    )


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason=", ".join(limitations(Tier.STANDARD)) or "has one")
def test_the_default_compiler(compiler: Compiler) -> None:
    """With inductor a grafted and an isolated seed compute what plain torch computes."""
    del compiler
    runs = []
    for form in (lambda model: torch.compile(model, fullgraph=True), lambda model: model):
        run = Run(make=lambda form=form: form(mlp()))
        run.growth.observation.look((run.train[0][:8],))
        run.growth.life.watch.detector.threshold = 1e9
        runs.append(run)
        run.kernel("zero"), run.kernel("random", "second", "series", id="sha256:" + "b" * 64)
        run.boundary(
            run.decide(Action.GERMINATE, kernel=choice(KERNEL), to_stage=S.GRAFTING),
            run.decide(
                Action.GERMINATE, run.site("second", "series"), kernel=choice("sha256:" + "b" * 64), to_stage=S.TRAINING
            ),
            metrics={},
        )
        run.steps(6)
    compiled, plain = ({k.removeprefix("_orig_mod."): v for k, v in run.model.state_dict().items()} for run in runs)
    assert list(plain) == list(compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
