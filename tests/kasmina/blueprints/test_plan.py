"""What is known of a blueprint at a site before anything is built: widths, parameters, cost, limits."""

import pytest
import torch
from torch import nn

from esper.kasmina.blueprints import Birth, Blueprint, Limits, catalogue, get, node
from esper.kasmina.blueprints.module import FUNCTIONS, BlueprintModule
from esper.kasmina.blueprints.ops import NOMINAL_EXTENT, OPS
from esper.kasmina.blueprints.structure import _RESERVED
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import InvalidInput


def planned(*nodes, layout=Layout.SEQUENCE, width=8, out=None, limits=None):
    """A plan of these nodes at a width."""
    blueprint = Blueprint(
        name="sample",
        title="A sample",
        description="For tests.",
        layouts=(layout,),
        nodes=nodes,
        birth=Birth.RANDOM,
        causal=False,
    )
    return blueprint.check(Signature(layout, width, width if out is None else out), limits)


@pytest.mark.parametrize("blueprint", catalogue(), ids=lambda b: b.name)
def test_parameters_are_counted_as_torch_counts_them(blueprint):
    """The static count, names and shapes are those of the module that is built."""
    for layout in blueprint.layouts:
        plan = blueprint.check(Signature(layout, 12, 20))
        module = BlueprintModule(plan)
        built = {name: tuple(p.shape) for name, p in module.named_parameters()}
        assert {spec.name: spec.shape for spec in plan.parameter_specs} == built
        assert plan.parameters == sum(p.numel() for p in module.parameters())
        assert plan.flops > 0


def test_flops_of_matrices_and_convolutions():
    """A multiply-add counts two; a pooled value is worked on once per sample."""
    linear = node("out", "linear", "x", features="out")
    assert 2 * 8 * 5 == planned(linear, out=5).flops
    conv = node("out", "conv", "x", features="out", kernel=3)
    assert 2 * 9 * 8 * 5 == planned(conv, layout=Layout.IMAGE, out=5).flops
    assert 2 * 3 * 8 * 5 == planned(conv, out=5).flops
    depthwise = node("out", "conv", "x", features="out", kernel=3, depthwise=True)
    assert 2 * 3 * 8 == planned(depthwise).flops
    pooled = (node("p", "mean_pool", "x"), node("q", "linear", "p", features="in"), node("out", "mul", "x", "q"))
    assert 8 + 2 * 8 * 8 / NOMINAL_EXTENT + 8 == planned(*pooled).flops


def test_depth_is_the_longest_chain():
    """Branches count once, by their longer side."""
    nodes = (node("a", "gelu", "x"), node("b", "gelu", "a"), node("out", "add", "b", "x"))
    assert 3 == planned(*nodes).depth


@pytest.mark.parametrize(
    ("nodes", "layout", "complaint"),
    [
        ((node("out", "linear", "x", features="in - 8"),), Layout.VECTOR, "features = in - 8: expected 1 to"),
        ((node("out", "linear", "x", features="in // (out - 8)"),), Layout.VECTOR, "divisor"),
        ((node("out", "conv", "x", features=8, kernel=4),), Layout.IMAGE, "odd kernel"),
        ((node("out", "conv", "x", features=8, causal=True),), Layout.IMAGE, "causal conv wants a sequence"),
        ((node("out", "conv", "x", features=4, depthwise=True),), Layout.IMAGE, "as many features as its input"),
        (
            (node("a", "linear", "x", features=3), node("out", "add", "x", "a")),
            Layout.VECTOR,
            "one width, found [8, 3]",
        ),
        ((node("p", "mean_pool", "x"), node("out", "mean_pool", "p")), Layout.IMAGE, "found a pooled value"),
        ((node("p", "mean_pool", "x"), node("out", "conv", "p", features=8)), Layout.IMAGE, "found a pooled value"),
        ((node("p", "mean_pool", "x"), node("out", "attention", "p", "p", "p")), Layout.IMAGE, "found a pooled value"),
        ((node("out", "attention", "x", "x", "x", causal=True),), Layout.IMAGE, "causal attention wants a sequence"),
        ((node("out", "attention", "x", "x", "x", heads=3),), Layout.IMAGE, "multiples of heads = 3"),
        (
            (node("q", "linear", "x", features=4), node("out", "attention", "q", "x", "x")),
            Layout.IMAGE,
            "query and key must have one width, found 4 and 8",
        ),
        ((node("out", "mean_pool", "x"),), Layout.IMAGE, "the output must have one vector per position"),
        ((node("out", "linear", "x", features=5),), Layout.VECTOR, "expected 8 output features, found 5"),
    ],
)
def test_shape_mistakes_point_at_the_node(nodes, layout, complaint):
    """What does not fit at this site names the node, the expectation and the finding."""
    with pytest.raises(InvalidInput) as caught:
        planned(*nodes, layout=layout)
    assert caught.value.reason == "BLUEPRINT_INVALID"
    assert complaint in caught.value.public
    assert "'out'" in caught.value.public


def test_one_mistake_does_not_hide_an_independent_one_nor_breed_others():
    """Two wrong branches are two problems; what only follows from them is none."""
    nodes = (
        node("a", "linear", "x", features="in - 8"),
        node("b", "linear", "x", features="in - 9"),
        node("out", "add", "a", "b"),
    )
    with pytest.raises(InvalidInput) as caught:
        planned(*nodes)
    assert ["a", "b"] == [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize("limits", [Limits(depth=1), Limits(parameters=10), Limits(flops=10)])
def test_limits_are_enforced(limits):
    """Depth, parameters and FLOPs have a ceiling."""
    with pytest.raises(InvalidInput, match="expected at most"):
        get("bottleneck_mlp").check(Signature(Layout.VECTOR, 8, 8), limits)


def test_a_layout_that_is_not_promised_is_refused():
    """An image template does not serve vectors."""
    with pytest.raises(InvalidInput, match="expected a layout in"):
        get("dilated_conv").check(Signature(Layout.VECTOR, 8, 8))


def test_every_operation_can_be_computed():
    """The static rules and the torch functions are about the same operations."""
    assert set(OPS) == set(FUNCTIONS)


def test_reserved_names_cover_the_attributes_of_a_module():
    """No node can shadow what torch.nn.Module or our modules on it define."""
    public = {name for name in {*dir(nn.Module), *vars(nn.Module())} if not name.startswith("_")}
    assert public <= _RESERVED
    assert {"kernel", "plan", "eager"} <= _RESERVED


OPERATIONS = {
    "linear": (Layout.VECTOR, nn.Linear(8, 8), {}),
    "conv": (Layout.IMAGE, nn.Conv2d(8, 8, 3, padding=2, dilation=2), {"dilation": 2}),
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_weighted_operations_are_those_of_torch(op):
    """A node computes what torch's own layer computes with the same weights."""
    layout, reference, attributes = OPERATIONS[op]
    plan = planned(node("out", op, "x", features="out", **attributes), layout=layout)
    module = BlueprintModule(plan, parameters={f"out.{k}": v for k, v in reference.named_parameters()})
    x = torch.randn((5, 8) if layout is Layout.VECTOR else (2, 8, 9, 7))
    torch.testing.assert_close(module(x), reference(x))


@pytest.mark.parametrize(
    ("op", "reference"),
    [("relu", torch.relu), ("tanh", torch.tanh), ("silu", nn.functional.silu), ("gelu", nn.functional.gelu)],
)
def test_activations_are_those_of_torch(op, reference):
    """Elementwise nodes compute the function of their name."""
    x = torch.randn(3, 8)
    torch.testing.assert_close(BlueprintModule(planned(node("out", op, "x"), layout=Layout.VECTOR))(x), reference(x))


@pytest.mark.parametrize("layout", Layout)
def test_narrow_norms_keep_the_magnitude_that_standardising_would_erase(layout):
    """At width 1 the norm still tells 0.1 from 0.5, and is bounded for huge inputs, with and without affine."""
    shape = {"vector": (1, 1), "sequence": (1, 1, 1), "image": (1, 1, 1, 1)}[layout.value]
    for affine in (True, False):
        norm = BlueprintModule(planned(node("out", "norm", "x", affine=affine), layout=layout, width=1))
        small, larger, huge = (norm(torch.full(shape, v)).item() for v in (0.1, 0.5, 1e6))
        assert small < larger < huge <= 1


def test_scale_multiplies_features():
    """A scale has one weight per feature, in every layout."""
    weight = torch.arange(8.0)
    for layout, shape in ((Layout.SEQUENCE, (8,)), (Layout.IMAGE, (8, 1, 1))):
        module = BlueprintModule(planned(node("out", "scale", "x"), layout=layout), parameters={"out.weight": weight})
        x = torch.randn((2, 3, 8) if layout is Layout.SEQUENCE else (2, 8, 3, 3))
        torch.testing.assert_close(module(x), x * weight.view(shape))
