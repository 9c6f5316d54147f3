"""Building: reproducible bytes, refusals before any work, and compiled kernels that can be trained."""

import copy

import pytest
import torch

from esper.kasmina.blueprints import Birth, get
from esper.kasmina.kernels import Target, Tier, kernel_id_of, load_candidate, unpack
from esper.kasmina.kernels.build import build, compiler, limitations
from esper.kasmina.kernels.compiling import compile_program
from esper.kasmina.kernels.tracing import export_forward
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import Conflict, InternalError, InvalidInput
from tests.kasmina.kernels.kernel_checks import assert_same_mathematics, shapes_of

VECTOR = Signature(Layout.VECTOR, 8, 8)
HAS_COMPILER = not limitations(Tier.STANDARD)
needs_compiler = [
    pytest.mark.compiler,
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_COMPILER, reason=", ".join(limitations(Tier.STANDARD)) or "has one"),
]


def test_equal_builds_have_equal_bytes(portable_bundle):
    """A repeated portable build is the same kernel, so that a lost answer costs no second entry in the library."""
    assert portable_bundle == build(get("bottleneck_mlp").with_birth(Birth.RANDOM), VECTOR, Tier.PORTABLE)


def test_the_seed_is_part_of_the_kernel(portable_bundle):
    """Other initial parameters are another kernel."""
    other = build(get("bottleneck_mlp").with_birth(Birth.RANDOM), VECTOR, Tier.PORTABLE, seed=1)
    assert kernel_id_of(other) != kernel_id_of(portable_bundle)


def test_bundles_do_not_name_the_building_machine(portable_bundle):
    """No path of the machine leaks into a portable kernel."""
    assert b"/esper/kasmina" not in portable_bundle


def test_progress_is_told():
    """The caller learns what begins."""
    told = []
    build(get("low_rank"), VECTOR, Tier.PORTABLE, progress=told.append)
    assert ["exporting"] == told


def test_a_blueprint_that_does_not_fit_is_refused_before_any_work():
    """The static check comes first."""
    told = []
    with pytest.raises(InvalidInput, match="expected a layout in"):
        build(get("dilated_conv"), VECTOR, Tier.PORTABLE, progress=told.append)
    assert told == []


def test_nothing_is_compiled_for_another_machine():
    """A foreign target is refused with both names."""
    with pytest.raises(InvalidInput, match=r"expected this machine \(cpu/.*found cpu/riscv64/default/torch-2.13"):
        build(get("low_rank"), VECTOR, Tier.STANDARD, Target("cpu", "riscv64", "default", "2.13"))


def test_without_a_compiler_standard_builds_say_what_is_missing(monkeypatch):
    """The reason is the missing tool; portable builds go on."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Conflict, match=r"needs a C\+\+ compiler"):
        build(get("low_rank"), VECTOR, Tier.STANDARD)
    assert limitations(Tier.PORTABLE) == []
    assert build(get("low_rank"), VECTOR, Tier.PORTABLE)


def test_the_compiler_of_the_environment_is_preferred(tmp_path):
    """CXX is what is asked for first."""
    mine = tmp_path / "my-cxx"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    assert str(mine) == compiler({"CXX": str(mine)})


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler to misuse")
@pytest.mark.compiler
def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    """What the compiler says reaches the author of the blueprint."""
    from torch import _inductor

    def fail(*_args, **_kwargs):
        raise RuntimeError("ld: cannot find -lc10")

    monkeypatch.setattr(_inductor, "aoti_compile_and_package", fail)
    with pytest.raises(InternalError, match="cannot find -lc10") as caught:
        build(get("low_rank"), VECTOR, Tier.STANDARD)
    assert caught.value.reason == "COMPILER_FAILED"


def test_code_that_was_made_for_one_extent_is_no_kernel(monkeypatch):
    """What the compiler takes for constant would be read and written beyond smaller inputs: the build fails instead."""
    from torch import _inductor

    def settle(program, **_):
        x = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"]
        assert int(x.shape[0]) > 0

    monkeypatch.setattr(_inductor, "aoti_compile_and_package", settle)
    program = export_forward(get("low_rank").check(VECTOR))
    with pytest.raises(InternalError, match="the compiler made dimension 0 of x constant"):
        compile_program(program, Target.here(), {})


STANDARD = [
    ("bottleneck_mlp", Layout.VECTOR),
    ("depthwise_separable", Layout.IMAGE),
    ("causal_attention", Layout.SEQUENCE),
]


@pytest.mark.parametrize(
    ("name", "layout"), [pytest.param(*case, marks=needs_compiler, id=case[0]) for case in STANDARD]
)
def test_compiled_kernels_compute_and_train_like_their_blueprint(name, layout):
    """One artifact gives the eager outputs and gradients for every batch and extent, and can be trained."""
    signature = Signature(layout, 16, 12)
    told = []
    bundle = build(get(name).with_birth(Birth.RANDOM), signature, Tier.STANDARD, Target.here(), progress=told.append)
    kernel = load_candidate(bundle, kernel_id_of(bundle), signature)
    assert ["exporting", "compiling"] == told
    assert str(Target.here()) == unpack(bundle).manifest.target
    assert Tier.STANDARD is kernel.running_tier
    for shape in shapes_of(layout, 16):
        assert_same_mathematics(kernel.instantiate(), torch.randn(shape), 5e-5)
    _assert_trains(kernel, shapes_of(layout, 16)[1])
    _assert_robust(kernel, torch.randn(shapes_of(layout, 16)[1]))


def _assert_trains(kernel, shape):
    module = kernel.instantiate()
    x = torch.randn(shape)
    target = torch.randn(module(x).shape)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def _assert_robust(kernel, x):
    module = kernel.instantiate()
    # Memory in another order, frozen parameters, no gradient at all, and a copy.
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    torch.testing.assert_close(module(strided), module(x))
    module.get_parameter("out.weight").requires_grad_(False)  # noqa: FBT003  # torch's own signature
    module(x).sum().backward()
    assert module.get_parameter("out.weight").grad is None
    assert module.get_parameter("out.bias").grad is not None
    with torch.no_grad():
        assert not module(x).requires_grad
        torch.testing.assert_close(copy.deepcopy(module)(x), module(x))
        assert module(x[:0]).shape[0] == 0
