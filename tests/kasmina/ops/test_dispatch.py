"""Which implementation runs, and what is imported for it."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from esper.kasmina import ops
from esper.kasmina.ops import _dispatch
from esper.kasmina.ops._plane import Cut, Plane, contiguous_like, dense
from esper.kasmina.ops._sketch import bucket_of_rows


def test_triton_is_not_imported_before_a_kernel_is_launched(run_python):
    """Neither by the runtime nor by its operations on a CPU."""
    run_python(
        "import sys, torch, esper.kasmina, esper.kasmina.growth\n"
        "from esper.kasmina import ops\n"
        "ops.blend_health(torch.ones(2, 3), [torch.ones(2, 3)], torch.ones(1))\n"
        "assert 'triton' not in sys.modules"
    )


def test_a_cpu_runs_plain_torch():
    """Whether Triton is installed or not."""
    assert not _dispatch.use_kernels(torch.ones(2))


def test_a_missing_triton_is_said_once(monkeypatch, capsys):
    """On CUDA the runtime works without it, slower, and does not repeat itself."""
    monkeypatch.setattr(_dispatch, "_HAVE_TRITON", False)
    _dispatch._say_once.cache_clear()
    tensor = SimpleNamespace(is_cuda=True)
    assert [False, False] == [_dispatch.use_kernels(tensor), _dispatch.use_kernels(tensor)]
    assert 1 == capsys.readouterr().err.count("triton is not installed")


@st.composite
def _dense(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    x = torch.randn([shape[d] for d in order]).permute(inverse)
    return x, draw(st.integers(0, len(shape) - 1))


@settings(max_examples=80, deadline=None)
@given(_dense(), st.sampled_from([2, 8]))
def test_a_dense_tensor_is_seen_without_copying(drawn, buckets):
    """In any order of dimensions: the rows of the view are those of the tensor, and every row has one bucket."""
    x, dim = drawn
    assert dense(x) is x
    plane = Plane.of(x, dim)
    rows = plane.view(x).reshape(-1, plane.features)
    expected = x.movedim(dim, -1).reshape(-1, plane.features)
    assert_close(rows.sort(dim=0).values, expected.sort(dim=0).values)
    assert plane.view(x).data_ptr() == x.data_ptr()
    cut = Cut.of(plane, buckets)
    assert cut.parts == cut.blocks or cut.parts % buckets == 0
    assert cut.block_rows * cut.per_outer >= plane.rows
    assert bucket_of_rows(plane, buckets, x.device).max() < buckets


@pytest.mark.parametrize("rows", [1, 100, 10**6, 10**8])
@pytest.mark.parametrize(("features", "stride"), [(1, 1), (96, 1), (70_000, 1), (96, 49), (2048, 49)])
def test_a_cut_keeps_its_bounds(rows, features, stride):
    """Counts of blocks fit into 16 bits, tiles into registers, and launches are wide where there is enough to do."""
    inner = stride if stride > 1 else rows
    outer = rows if stride > 1 else 1
    plane = Plane(outer, inner, features, features * inner, 1 if stride > 1 else features, stride)
    cut = Cut.of(plane, 128)
    assert cut.block_rows * cut.block_features <= 2048
    assert -(-cut.blocks // cut.parts) <= 32_767
    assert cut.parts <= 65_535, "the second dimension of a grid has 16 bits"
    programs = cut.parts * -(-features // cut.block_features)
    assert programs >= min(1024, cut.blocks // 16)


def test_deltas_take_the_order_of_the_output():
    """A delta in another memory format is brought into that of y, and only then copied."""
    y = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    delta = torch.randn(2, 3, 4, 5)
    assert contiguous_like(delta, y).stride() == y.stride()
    assert_close(contiguous_like(delta, y), delta)
    assert contiguous_like(y, y) is y


@pytest.mark.gpu
def test_no_call_waits_for_the_device():
    """Torch raises at any synchronisation; forward, backward and all properties pass."""
    x = torch.randn(64, 256, 28, 28, device="cuda", requires_grad=True)
    deltas = [torch.randn_like(x, requires_grad=True) for _ in range(2)]
    alphas = torch.full((2,), 0.5, device="cuda", requires_grad=True)

    def everything():
        ops.blend(x, deltas, alphas).sum().backward()
        out, found = ops.blend_health(x, deltas, alphas, feature_dim=1)
        out.sum().backward()
        for value in vars(ops.Health).values():
            if isinstance(value, property):
                value.fget(found)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_public_functions_agree_on_both_devices():
    """A tensor large enough for the kernels gives on CUDA what plain torch gives on the CPU, compiled or not."""
    torch.manual_seed(0)
    x, delta, alpha = torch.randn(64, 128, 16, 16), torch.randn(64, 128, 16, 16), torch.rand(1)
    expected, health = ops.blend_health(x, [delta], alpha, feature_dim=1)
    on_device = (x.cuda(), [delta.cuda()], alpha.cuda())
    for run in (ops.blend_health, torch.compile(ops.blend_health, fullgraph=True)):
        out, found = run(*on_device, feature_dim=1)
        assert_close(out.cpu(), expected)
        for ours, theirs in zip(found, health, strict=True):
            assert_close(ours.cpu(), theirs, rtol=1e-4, atol=2e-3)
    assert_close(ops.blend(*on_device).cpu(), expected)


def test_transforms_are_told_from_plain_tensors():
    """Kernels have no rules for ``torch.func`` and forward mode; what runs under them runs plain torch."""
    seen = []

    def look(x):
        seen.append(_dispatch.transformed(x))
        return x.sum()

    x = torch.ones(2, 3)
    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        look(x)
    assert [False, True, True, True, True] == seen
