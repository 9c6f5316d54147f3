"""Blend and health in one."""

import pytest
import torch
from torch.testing import assert_close

from esper.kasmina import ops
from esper.kasmina.ops import _blend, _blend_health, _health


def _inputs(dtype=torch.float64, shape=(2, 3, 2, 2)):
    torch.manual_seed(0)
    y, first, second = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    return y, first, second, torch.rand(2, dtype=dtype, requires_grad=True)


def _operator(y, first, second, alphas):
    return torch.ops.esper.blend_health(y, [first, second], alphas, 1, 0.0, 8, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_are_what_each_alone_is(dtype):
    """The blended values bit for bit, and the statistics of exactly these."""
    y, first, second, alphas = _inputs(dtype)
    out, found = ops.blend_health(y, [first, second], alphas, feature_dim=1, eps=0.1, seed=3)
    assert torch.equal(out, ops.blend(y, [first, second], alphas))
    alone = ops.health(out, feature_dim=1, eps=0.1, seed=3)
    for ours, theirs in zip(found, alone, strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(
        _operator(y, first, second, alphas)[1:], ops.health(out, feature_dim=1, buckets=8), strict=True
    ):
        assert_close(ours, theirs)


def test_without_seeds_the_output_is_only_measured():
    """A site that is dormant has its health, too."""
    y, *_ = _inputs()
    out, found = ops.blend_health(y, [], [], feature_dim=1)
    assert out is y
    assert_close(found.mean, y.mean((0, 2, 3)).float())


def test_gradients_pass_through_the_blend_alone():
    """To first and second order; statistics are constants."""
    inputs = _inputs(shape=(2, 3))
    assert torch.autograd.gradcheck(lambda *a: _operator(*a)[0], inputs)
    assert torch.autograd.gradgradcheck(lambda *a: _operator(*a)[0], inputs)
    assert not any(tensor.requires_grad for tensor in _operator(*inputs)[1:])


def test_the_operator_passes_opcheck():
    """Schema, fake, autograd and tracing agree with what the operator does."""
    y, first, second, alphas = _inputs(torch.float32)
    torch.library.opcheck(torch.ops.esper.blend_health.default, (y, [first, second], alphas, 1, 0.0, 8, 0))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, d, e, a: ops.blend_health(y, [d, e], a, feature_dim=1),
        lambda y, d, e, a: (_operator(y, d, e, a)[0], None),
    ],
)
def test_a_compiled_graph_has_no_break(function):
    """Forward and backward, by the public function and by the operator."""
    inputs = _inputs(torch.float32)
    run = torch.compile(lambda *a: function(*a)[0], backend="aot_eager", fullgraph=True)
    expected = ops.blend(inputs[0], inputs[1:3], inputs[3])
    out = run(*inputs)
    assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert_close(found, torch.autograd.grad(expected.square().sum(), inputs))


@pytest.fixture
def _as_on_cuda(monkeypatch):
    """Public functions go through the operators, as they do on a CUDA device."""
    for module in (_blend, _health, _blend_health):
        monkeypatch.setattr(module, "use_kernels", lambda *_x: True)
    monkeypatch.setattr(_blend, "LEAST_ELEMENTS", 0)


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_public_functions_call_the_operators(compiled):
    """The way that a device takes, alone and in a compiled graph: values, statistics, gradients."""
    inputs = _inputs(torch.float32)

    def run(y, first, second, alphas):
        blended = ops.blend(y, [first, second], alphas)
        out, found = ops.blend_health(blended, [first], alphas[:1], feature_dim=1)
        return out, found.variance, ops.health(out, feature_dim=1).variance

    out, variance, again = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(*inputs)
    y, first, second, alphas = inputs
    expected = _blend.reference(_blend.reference(y, [first, second], alphas), [first], alphas)
    assert_close(out, expected)
    assert_close(variance, expected.var((0, 2, 3), correction=0))
    assert_close(again, variance)
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert_close(found, torch.autograd.grad(expected.square().sum(), inputs))
