"""Runs, states and kernels for the controller's tests: builders with sensible defaults, and strategies over them."""

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from esper.kasmina.control import (
    BoundaryState,
    Counterfactual,
    RunHello,
    SeedState,
    SiteDescriptor,
    SiteHealth,
    SiteKind,
    Stage,
)
from esper.kasmina.seeds import LIVING
from esper.kasmina.signature import Layout, Signature
from esper.tamiyo.domain import KernelFacts, Shelf, Situation
from esper.tamiyo.memory import Memory, observe
from esper.tamiyo.rules import Rules

NARROW = Signature(Layout.IMAGE, 8, 8)
WIDE = Signature(Layout.IMAGE, 16, 16)
FLAT = Signature(Layout.VECTOR, 16, 10)
RULES = Rules()
GATED = LIVING | {Stage.EMBARGOED, Stage.ROLLED_BACK}
thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Whole histories are slow to draw on a busy machine, and that is no finding."""


def kernel_id(number: int) -> str:
    """A digest that people can tell apart."""
    return f"sha256:{number:064x}"


def make_site(index=0, **changes):
    """A layer of width 8 in an image network."""
    values = {
        "index": index,
        "name": f"conv{index}",
        "kind": SiteKind.PARALLEL,
        "granularity": "layer",
        "module_type": "Conv2d",
        "signature": NARROW,
        "narrowest_width": 8,
        "parameters": 576,
        "depth": index / 10,
    }
    return SiteDescriptor(**(values | changes))


def make_kernel(number=1, **changes):
    """A validated portable kernel for width 8, born at zero."""
    values = {
        "kernel_id": kernel_id(number),
        "blueprint_id": kernel_id(1000 + number),
        "blueprint_name": f"blueprint{number}",
        "signature": NARROW,
        "portable": True,
        "target": "",
        "zero_birth": True,
        "causal": False,
        "parameters": 300,
        "flops_per_position": 600,
        "latency_us": 40.0,
        "tags": ("conv",),
    }
    return KernelFacts(**(values | changes))


def make_hello(sites=None, **changes):
    """A run of 2,000 steps, decay at 70 %, room for 2,000 parameters and two seeds."""
    values = {
        "run_id": "digits-1",
        "target": "cpu/x86_64/avx2/torch-2.13",
        "total_steps": 2000,
        "decay_start": 0.7,
        "host_parameters": 1500,
        "parameter_budget": 2000,
        "max_active_seeds": 2,
        "sites": (make_site(0), make_site(1), make_site(2)) if sites is None else tuple(sites),
        "task": "digits",
    }
    return RunHello(**(values | changes))


def make_seed(index=0, stage=Stage.FINE_TUNING, **changes):
    """A seed of kernel 1 that is ready."""
    values = {
        "index": index,
        "stage": stage,
        "boundaries_in_stage": 1,
        "steps_in_stage": 100,
        "ready": stage in GATED,
        "alpha": 1.0,
        "kernel_id": kernel_id(1),
        "parameters": 300,
    }
    return SeedState(**(values | changes))


def make_state(boundary=3, seeds=(), saturation=0.9, **changes):
    """Boundary of 100 steps each; every one of the first three sites measured."""
    values = {
        "run_id": "digits-1",
        "boundary": boundary,
        "step": 100 * boundary,
        "epoch": float(boundary),
        "train_loss": 1.0 / boundary,
        "validation_loss": 1.0 / boundary,
        "validation_accuracy": 0.9,
        "learning_rate": 0.01,
        "gradient_norm": 1.0,
        "parameters_added": sum(seed.parameters for seed in seeds),
        "flops_per_sample": 1e6,
        "seconds": 2.0 * boundary,
        "seeds": tuple(seeds),
        "sites": tuple(SiteHealth(index=i, effective_rank=8 * saturation, saturation=saturation) for i in range(3)),
    }
    return BoundaryState(**(values | changes))


def make_situation(state=None, hello=None, kernels=None, memory=None, rules=RULES):
    """A situation whose memory has seen the state."""
    state = make_state() if state is None else state
    memory = observe(Memory() if memory is None else memory, state, embargo=rules.embargo_boundaries)
    return Situation(
        hello=make_hello() if hello is None else hello,
        state=state,
        memory=memory,
        shelf=Shelf([make_kernel(1)] if kernels is None else kernels),
        rules=rules,
    )


def gain(lower, mean=None, batches=16):
    """A counterfactual."""
    return Counterfactual(
        mean_gain=lower if mean is None else mean, lower_bound=lower, confidence=0.95, batches=batches
    )


signatures = st.sampled_from([NARROW, WIDE, FLAT])
maybe = st.none() | st.floats(-2, 4, allow_nan=False)
numbers = st.floats(allow_nan=True, allow_infinity=True) | st.none() | st.floats(0, 3)


@st.composite
def hellos(draw, max_sites=6):
    """Any run of a few sites."""
    count = draw(st.integers(1, max_sites))
    sites = [
        make_site(
            index,
            kind=draw(st.sampled_from(SiteKind)),
            granularity=draw(st.sampled_from(["layer", "block", "span"])),
            signature=draw(signatures),
            narrowest_width=draw(st.integers(1, 16)),
            causal=draw(st.booleans()),
            name=draw(st.sampled_from([f"conv{index}", f"block.{index}", "conv0..conv2", "block"])),
        )
        for index in range(count)
    ]
    return make_hello(
        sites,
        total_steps=draw(st.none() | st.integers(1, 4000)),
        decay_start=draw(st.none() | st.floats(0, 1)),
        parameter_budget=draw(st.integers(0, 3000)),
        max_active_seeds=draw(st.integers(1, 4)),
        blueprints=draw(st.sampled_from([(), (), ("blueprint1", "blueprint2")])),
    )


@st.composite
def kernels(draw):
    """A few kernels of any kind."""
    return [
        make_kernel(
            number,
            signature=draw(signatures),
            portable=draw(st.booleans()),
            target=draw(st.sampled_from(["cpu/x86_64/avx2/torch-2.13", "cpu/other"])),
            zero_birth=draw(st.booleans()),
            causal=draw(st.booleans()),
            parameters=draw(st.integers(1, 2000)),
            latency_us=draw(st.none() | st.floats(1, 100)),
            tags=draw(st.sampled_from([(), ("conv",), ("adapter", "mlp"), ("attention",)])),
        )
        for number in range(1, 1 + draw(st.integers(0, 5)))
    ]


@st.composite
def seed_states(draw, index):
    """Any seed, lawful or strange."""
    stage = draw(st.sampled_from([stage for stage in Stage if stage is not Stage.DORMANT]))
    blocked = draw(st.sampled_from(["", "", "NO_GAIN", "NOT_FINITE", "SPIKE", "PROBATION", "KERNEL_PENDING", "OTHER"]))
    measured = draw(st.none() | st.builds(gain, st.floats(-1, 1), st.floats(-1, 1)))
    return make_seed(
        index,
        stage,
        boundaries_in_stage=draw(st.integers(0, 12)),
        ready=not blocked and stage in GATED,
        blocked_by=blocked,
        kernel_id=draw(st.sampled_from(["", kernel_id(1), kernel_id(2), kernel_id(99)])),
        parameters=draw(st.integers(0, 800)),
        counterfactual=measured,
        failure=draw(st.sampled_from(["", "", "loss spike"])),
    )


@st.composite
def boundary_states(draw, hello, boundary):
    """Any state of a run at a boundary."""
    indices = draw(st.sets(st.integers(0, len(hello.sites)), max_size=4))
    seeds = [draw(seed_states(index)) for index in sorted(indices)]
    sites = draw(st.sets(st.integers(0, len(hello.sites)), max_size=4))
    return make_state(
        boundary,
        seeds,
        step=draw(st.integers(0, 4000)),
        epoch=draw(st.none() | st.floats(0, 20)),
        train_loss=draw(numbers),
        validation_loss=draw(numbers),
        gradient_norm=draw(numbers),
        flops_per_sample=draw(maybe),
        parameters_added=draw(st.integers(0, 3000)),
        sites=tuple(
            SiteHealth(index=i, effective_rank=draw(numbers), saturation=draw(st.none() | st.floats(0, 1)))
            for i in sorted(sites)
        ),
    )


@st.composite
def histories(draw, length=6):
    """A run and its states in order."""
    hello = draw(hellos())
    boundaries = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=length)))
    return hello, [draw(boundary_states(hello, boundary)) for boundary in boundaries]


def with_state(hello, controller_state):
    """The same run, opened again."""
    return replace(hello, controller_state=controller_state)
