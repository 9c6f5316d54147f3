"""Blending of several seeds: values, gradients, compiled graphs."""

import pytest
import torch
from torch.testing import assert_close

from esper.kasmina import ops
from esper.kasmina.ops import _blend


def _inputs(*, seeds=2, dtype=torch.float64, alpha_grad=True, shape=(3, 5)):
    torch.manual_seed(0)
    y = torch.randn(shape, dtype=dtype, requires_grad=True)
    deltas = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(seeds)]
    return y, deltas, torch.rand(seeds, dtype=dtype, requires_grad=alpha_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(dtype):
    """Sums are held in float32, whatever the dtype, which is that of y."""
    y, deltas, alphas = _inputs(seeds=5, dtype=dtype)
    exact = y.double() + sum(a.double() * d.double() for a, d in zip(alphas, deltas, strict=True))
    out = ops.blend(y, deltas, alphas)
    assert dtype is out.dtype
    assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_alphas_may_be_scalars_of_their_own():
    """Each seed owns its alpha; a vector of them means the same, and gradients reach each."""
    y, deltas, alphas = _inputs()
    own = [alpha.detach().clone().requires_grad_() for alpha in alphas]
    ops.blend(y, deltas, own).sum().backward()
    assert_close(ops.blend(y, deltas, own), ops.blend(y, deltas, alphas))
    assert_close([delta.sum() for delta in deltas], [alpha.grad for alpha in own])


def test_without_seeds_nothing_happens():
    """A site whose seeds are all away hands on the very tensor."""
    y, _, _ = _inputs()
    assert ops.blend(y, [], []) is y


@pytest.mark.parametrize(
    ("deltas", "alphas", "said"), [([(4, 5)], 1, "shape"), ([(3, 5)], 2, "one alpha for each"), ([], 1, "one alpha")]
)
def test_what_does_not_fit_is_refused(deltas, alphas, said):
    """A delta never broadcasts, and each has its alpha."""
    y, _, _ = _inputs()
    with pytest.raises(ValueError, match=said):
        ops.blend(y, [torch.ones(shape) for shape in deltas], torch.ones(alphas))


@pytest.mark.parametrize("operator", [torch.ops.esper.blend.default, _blend.reference])
def test_gradients_of_first_and_second_order(operator):
    """To y, every delta and every alpha, by the operator and by the formula."""
    y, deltas, alphas = _inputs(shape=(2, 3))

    def run(y, first, second, alphas):
        return operator(y, [first, second], alphas)

    assert torch.autograd.gradcheck(run, (y, *deltas, alphas))
    assert torch.autograd.gradgradcheck(run, (y, *deltas, alphas))


def test_second_order_where_alpha_is_fixed():
    """A gradient penalty goes through a blend whose alpha does not learn."""
    y, deltas, alphas = _inputs(shape=(2, 3), alpha_grad=False)
    assert torch.autograd.gradgradcheck(lambda y, d: torch.ops.esper.blend(y, [d], alphas[:1]).square(), (y, deltas[0]))


def test_deltas_are_kept_only_where_alpha_learns():
    """Memory: with a fixed alpha the backward needs no activation at all."""
    for learns in (True, False):
        y, deltas, alphas = _inputs(alpha_grad=learns)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape), lambda t: t):
            torch.ops.esper.blend(y, deltas, alphas)
        assert (y.shape in kept) is learns


@pytest.mark.parametrize("alpha_grad", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_the_operators_pass_opcheck(alpha_grad, transposed):
    """Schema, fake, autograd and tracing agree with what the operator does, also for other strides."""
    y, deltas, alphas = _inputs(alpha_grad=alpha_grad, dtype=torch.float32)
    if transposed:
        y = y.detach().T.requires_grad_()
        deltas = [delta.detach().T.contiguous().requires_grad_() for delta in deltas]
    torch.library.opcheck(torch.ops.esper.blend.default, (y, deltas, alphas))
    torch.library.opcheck(torch.ops.esper.blend_backward.default, (y, deltas, alphas))
    torch.library.opcheck(torch.ops.esper.blend_backward.default, (y, [], alphas))


@pytest.mark.parametrize("function", [ops.blend, torch.ops.esper.blend])
def test_a_compiled_graph_has_no_break_and_survives_a_ramp(function):
    """One graph for all alphas, with the gradients of the eager run."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    y, deltas, alphas = _inputs(dtype=torch.float32)
    run = torch.compile(
        lambda y, first, second, alphas: function(y.sin(), [first, second], alphas), backend=backend, fullgraph=True
    )
    for value in (0.1, 0.5, 1.0):
        weights = torch.full_like(alphas, value).requires_grad_()
        found = torch.autograd.grad(run(y, *deltas, weights).square().sum(), (y, *deltas, weights))
        eager = _blend.reference(y.sin(), deltas, weights)
        assert_close(found, torch.autograd.grad(eager.square().sum(), (y, *deltas, weights)))
    assert 1 == len(graphs)


def test_the_operator_is_traced_with_its_backward():
    """AOTAutograd, which every compiler starts from, sees the operator in both directions."""
    y, deltas, alphas = _inputs(dtype=torch.float32)
    run = torch.compile(lambda *a: torch.ops.esper.blend(a[0], list(a[1:3]), a[3]), backend="aot_eager", fullgraph=True)
    inputs = (y, *deltas, alphas)
    found = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    assert_close(found, torch.autograd.grad(_blend.reference(y, deltas, alphas).square().sum(), inputs))
