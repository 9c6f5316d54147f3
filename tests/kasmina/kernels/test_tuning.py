"""Aggressive builds: of several ways to compile, the one that was measured to be the fastest."""

import pytest
import torch

from esper.kasmina.blueprints import Birth, get
from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.kernels import Target, Tier, build, kernel_id_of, tuning, unpack
from esper.kasmina.kernels.pace import Pace, Shape, shape_classes
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import InternalError

BLUEPRINT = get("low_rank").with_birth(Birth.RANDOM)
VECTOR = Signature(Layout.VECTOR, 8, 8)
PLAN = BLUEPRINT.check(VECTOR)
NAMES = [spec.name for spec in PLAN.parameter_specs]


def delta(x, *parameters):
    """The blueprint's function of its inputs."""
    module = BlueprintModule(PLAN)
    return torch.func.functional_call(module, dict(zip(NAMES, parameters, strict=True)), (x,))


def function_of(package):
    """Stands for native code: does its work as often as its package says."""
    half, times = package.decode().split()

    def forward(inputs):
        return [[delta(*inputs) for _ in range(int(times))][-1]]

    def backward(taken):
        grad, *inputs = taken
        wanted = [t.detach().requires_grad_() for t in inputs]
        with torch.enable_grad():
            return list(torch.autograd.grad(delta(*wanted), wanted, grad))

    return forward if half == "forward" else backward


@pytest.fixture
def costs(monkeypatch):
    """How often each variant does the work of the forward; 0: it cannot be compiled."""
    costs = {"minimum": 12, "everything": 40, "autotuned": 1, "recomputed": 0}

    def compile_variant(_plan, _here, variant):
        if not (times := costs[variant.name]):
            raise InternalError("the compiler failed: out of ideas", reason="COMPILER_FAILED")
        return tuning.Attempt(variant, b"forward %d" % times, b"backward 1", tuple(range(1 + len(NAMES))))

    monkeypatch.setattr(tuning, "compile_variant", compile_variant)
    monkeypatch.setattr(tuning, "native", function_of)
    monkeypatch.setattr(tuning, "_MEASURE_S", 0.0)
    monkeypatch.setattr(build, "limitations", lambda _tier: [])
    return costs


def test_the_fastest_variant_is_kept_and_what_was_measured_is_told(costs):
    """The bundle holds the code of the fastest and, for each that could be compiled, its figures at every shape."""
    del costs
    opened = unpack(build.build(BLUEPRINT, VECTOR, Tier.AGGRESSIVE))
    manifest = opened.manifest
    assert (Tier.AGGRESSIVE, str(Target.here()), "autotuned") == (manifest.tier, manifest.target, manifest.variant)
    assert b"forward 1" == opened.members["forward.aoti.pt2"]
    tried = {(trial.variant, trial.positions) for trial in manifest.trials}
    assert {(name, n) for name in ("minimum", "everything", "autotuned") for n in (8, 256, 4096)} == tried
    assert all(trial.ratio > 0 and trial.noise >= 0 for trial in manifest.trials)


def test_when_nothing_can_be_compiled_the_compiler_is_quoted(costs):
    """The first variant's failure is that of the build."""
    costs.update(dict.fromkeys(costs, 0))
    with pytest.raises(InternalError, match="out of ideas"):
        build.build(BLUEPRINT, VECTOR, Tier.AGGRESSIVE)


def test_time_ends_the_search(costs):
    """What was tried until then is enough."""
    del costs
    tried = tuning.variants(PLAN, "cpu")
    manifest = unpack(build.build(BLUEPRINT, VECTOR, Tier.PORTABLE)).manifest
    best, trials = tuning.tune(PLAN, manifest, Target.here(), tried, budget_s=-1.0)
    assert "minimum" == best.variant.name
    assert {"minimum"} == {trial.variant for trial in trials}


def test_images_are_also_tried_with_channels_last():
    """Layouts of memory are worth a trial where there are channels to move."""
    image = get("depthwise_separable").check(Signature(Layout.IMAGE, 8, 8))
    assert "channels_last" in [variant.name for variant in tuning.variants(image, "cpu")]
    assert "channels_last" not in [variant.name for variant in tuning.variants(PLAN, "cpu")]


def test_shape_classes_grow():
    """Wide kernels are judged at fewer positions, and never at the same number twice."""
    for width in (8, 512, 2048):
        plan = get("wide_mlp").check(Signature(Layout.SEQUENCE, width, width))
        positions = [torch.Size(extents).numel() for extents in shape_classes(plan).values()]
        assert sorted(set(positions)) == positions


def test_a_kernel_that_was_not_measured_is_not_believed_to_be_fast():
    """Missing is missing."""
    assert not Pace(()).ever
    assert not Pace(()).chooses(100, training=True)
    assert not Pace([Shape(8, 0.99, 1.01)]).ever
    assert not Pace([Shape(8, 0.9, 1.0, noise=0.5)]).ever
    assert Pace([Shape(8, 0.9, 1.0, noise=0.3)]).chooses(8, training=True)


def test_the_same_arguments_name_the_same_standard_kernel(costs):
    """A standard build takes one way, and measures nothing that would differ the next time."""
    del costs
    bundles = [build.build(BLUEPRINT, VECTOR, Tier.STANDARD) for _ in range(2)]
    assert kernel_id_of(bundles[0]) == kernel_id_of(bundles[1])
    assert ("minimum", ()) == (unpack(bundles[0]).manifest.variant, unpack(bundles[0]).manifest.trials)
