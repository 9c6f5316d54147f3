"""Forward and backward cut from one graph: the same mathematics, with nothing heavy done twice."""

from collections import Counter

import pytest
import torch

from esper.kasmina.blueprints import Birth, catalogue, get
from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.kernels.partition import Cut, cut_joint, export_partitioned
from esper.kasmina.signature import Layout, Signature
from tests.kasmina.kernels.kernel_checks import shapes_of

CASES = [(b, b.layouts[0]) for b in catalogue()]
PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"


def plan_of(blueprint, layout):
    """At unequal widths."""
    return blueprint.with_birth(Birth.RANDOM).check(Signature(layout, 16, 12))


def operations(graph):
    """How often each operation is called."""
    return Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize(("blueprint", "layout"), CASES, ids=[f"{b.name}-{x.value}" for b, x in CASES])
def test_the_backward_does_not_redo_the_forward(blueprint, layout):
    """It multiplies twice for each product of the forward, once per convolution and attention, and that is all."""
    halves = cut_joint(plan_of(blueprint, layout), Cut.MINIMUM)
    ahead, back = operations(halves.forward), operations(halves.backward)
    products = sum(ahead[name] for name in PRODUCTS)
    assert 2 * products == sum(back[name] for name in PRODUCTS)
    assert 0 == back["aten.convolution.default"] == back[ATTENTION]
    assert ahead["aten.convolution.default"] == back["aten.convolution_backward.default"]
    assert ahead[ATTENTION] == back[ATTENTION.replace(".default", "_backward.default")]
    assert products or ahead["aten.convolution.default"]


def test_saving_nothing_redoes_it():
    """The count above tells the two apart."""
    halves = cut_joint(plan_of(get("bottleneck_mlp"), Layout.VECTOR), Cut.NOTHING)
    back = operations(halves.backward)
    assert 2 * 2 + 1 == sum(back[name] for name in PRODUCTS)
    assert () == tuple(halves.seam.saved)


# Others are compiled in test_build.py.
TRADED = [
    ("gated_ffn", Layout.SEQUENCE, Cut.MINIMUM),
    ("squeeze_excitation", Layout.IMAGE, Cut.EVERYTHING),
    ("causal_conv", Layout.SEQUENCE, Cut.MINIMUM),
    ("bottleneck_mlp", Layout.VECTOR, Cut.NOTHING),
]


@pytest.mark.parametrize(("name", "layout", "cut"), TRADED, ids=[f"{n}-{c}" for n, _, c in TRADED])
def test_both_halves_compute_what_the_blueprint_says(name, layout, cut):
    """Output and gradients of the exported halves equal the eager module's for free batch and extents."""
    plan = plan_of(get(name), layout)
    halves = export_partitioned(plan, cut)
    # Guards say what was assumed of example inputs, such as more than one row; what must hold is what is computed.
    forward, backward = (half.module(check_guards=False) for half in (halves.forward, halves.backward))
    module = BlueprintModule(plan, seed=1)
    for shape in shapes_of(layout, 16):
        x = torch.randn(shape, requires_grad=True)
        expected = module(x)
        grad = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, [x, *module.parameters()], grad)
        with torch.no_grad():
            inputs = [x, *module.parameters()]
            delta, *saved = forward(*inputs)
            found = backward(grad, *(inputs[index] for index in halves.recalled), *saved)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        # A package takes tensors that are dense.
        assert all(tensor.is_contiguous() for tensor in (delta, *saved, *found))
