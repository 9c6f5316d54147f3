"""Modules that kernels give: equal to the plain torch reference, trainable, copyable, and careful with their input."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from esper.kasmina.blueprints import Birth, catalogue, get
from esper.kasmina.kernels import Compiled, Kernel, Target, Tier, kernel_id_of, load_exported
from esper.kasmina.kernels.build import build
from esper.kasmina.kernels.pace import Pace, Shape
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import Conflict, InvalidInput
from tests.kasmina.kernels.kernel_checks import assert_same_mathematics, kernel_of, shapes_of

CASES = [(b, layout) for b in catalogue() for layout in b.layouts]


@pytest.mark.parametrize(("blueprint", "layout"), CASES, ids=[f"{b.name}-{x.value}" for b, x in CASES])
def test_portable_kernels_compute_what_the_blueprint_says(blueprint, layout):
    """Output and gradients of the exported graph equal the eager module's for free batch and extents."""
    bundle = build(blueprint.with_birth(Birth.RANDOM), Signature(layout, 8, 12), Tier.PORTABLE)
    kernel = load_exported(bundle, kernel_id_of(bundle))
    for shape in shapes_of(layout, 8):
        assert_same_mathematics(kernel.instantiate(), torch.randn(shape), 1e-6)


def test_images_in_channels_last_order_can_be_trained_on(run_python):
    """One that needs no gradient is as good as any: in a process of its own, since torch would end it."""
    run_python("""
import torch
from esper.kasmina.blueprints import Birth, get
from esper.kasmina.signature import Layout, Signature
from tests.kasmina.kernels.kernel_checks import kernel_of
module = kernel_of(get("low_rank").with_birth(Birth.RANDOM), Signature(Layout.IMAGE, 8, 8)).instantiate()
x = torch.randn(2, 8, 5, 6)
for delta in (module, module.eager()):
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        delta.zero_grad()
        delta(x.to(memory_format=order)).square().sum().backward()
        found.append([p.grad.clone() for p in delta.parameters()])
    for plain, last in zip(*found):
        torch.testing.assert_close(plain, last)
""")


def test_zero_birth_survives_the_build():
    """A kernel of a template adds exactly nothing at birth and has a gradient to follow."""
    module = kernel_of(get("gated_ffn"), Signature(Layout.SEQUENCE, 8, 8)).instantiate()
    delta = module(torch.randn(2, 5, 8))
    assert torch.count_nonzero(delta) == 0
    delta.sum().backward()
    assert module.get_parameter("out.weight").grad.norm() > 1e-3


@pytest.fixture(scope="module")
def kernel():
    """A portable bottleneck MLP, born at random."""
    return kernel_of(get("bottleneck_mlp").with_birth(Birth.RANDOM), Signature(Layout.VECTOR, 8, 8))


def test_parameters_have_the_names_of_the_blueprint(kernel):
    """Optimizers and checkpoints see plain parameters named after nodes."""
    names = ["norm.weight", "norm.bias", "down.weight", "down.bias", "out.weight", "out.bias"]
    assert names == list(kernel.instantiate().state_dict())
    assert all(type(p) is torch.nn.Parameter for p in kernel.instantiate().parameters())


def test_every_instance_owns_its_parameters(kernel):
    """Training one seed leaves another of the same kernel, and the kernel itself, as they were."""
    one, other = kernel.instantiate(), kernel.instantiate()
    with torch.no_grad():
        one.get_parameter("out.weight").add_(1.0)
    assert torch.equal(other.get_parameter("out.weight"), kernel.instantiate().get_parameter("out.weight"))
    assert not torch.equal(one.get_parameter("out.weight"), other.get_parameter("out.weight"))


def test_compiled_code_is_for_its_own_kind_of_device(kernel):
    """Tensors that live elsewhere than the compiled code reads run plain torch; a kernel may serve both."""
    called = []

    def forward(inputs):
        called.append(inputs[0].device.type)
        return [inputs[0].new_zeros(inputs[0].shape)]

    compiled = compiled_as(kernel, Compiled(forward, forward, ()))
    assert (3, 8) == compiled.instantiate("meta")(torch.zeros(3, 8, device="meta")).shape
    assert [] == called
    compiled.instantiate()(torch.zeros(3, 8))
    assert ["cpu"] == called


def compiled_as(kernel, compiled):
    """The kernel with these functions as its compiled ones."""
    return Kernel(
        kernel_id=kernel.id,
        manifest=replace(kernel.manifest, tier=Tier.STANDARD, target=str(Target.here())),
        plan=kernel.plan,
        parameters=dict(kernel.instantiate().named_parameters()),
        compiled=compiled,
        nbytes=0,
    )


def marking(called):
    """Functions that say that they were called; what they give is a third of the right thing."""

    def forward(inputs):
        called.append("forward")
        return [inputs[0] / 3]

    def backward(taken):
        called.append("backward")
        return [taken[0] / 3, *(torch.zeros_like(p) for p in taken[1:])]

    return forward, backward


def test_compiled_code_runs_where_it_was_measured_to_be_fast(kernel):
    """Each input takes the path that was faster at the nearest measured shape, training and inference apart."""
    called = []
    pace = Pace([Shape(8, step=1.2, forward=0.9), Shape(256, step=0.8, forward=1.3)])
    module = compiled_as(kernel, Compiled(*marking(called), tuple(range(1, 7)), pace)).instantiate()
    plain = kernel.instantiate()
    for rows, training, expected in (
        (4, True, []),
        (4, False, ["forward"]),
        (200, True, ["forward", "backward"]),
        (200, False, []),
    ):
        called.clear()
        x = torch.randn(rows, 8)
        with torch.set_grad_enabled(training):
            y = module(x)
            if training:
                y.sum().backward()
        assert expected == called, (rows, training)
        if not expected:
            assert torch.equal(plain(x), y)


def test_frozen_modules_infer(kernel):
    """Where nothing wants a gradient the forward alone is asked for, and no graph is kept."""
    called = []
    module = compiled_as(kernel, Compiled(*marking(called), ())).instantiate().requires_grad_(requires_grad=False)
    assert not module(torch.randn(2, 8)).requires_grad
    assert ["forward"] == called


def test_another_kernel_of_the_blueprint_takes_over(kernel):
    """Parameters stay the objects that they are; a kernel of anything else is refused."""
    called = []
    module = kernel.instantiate()
    parameters = list(module.parameters())
    module.use(compiled_as(kernel, Compiled(*marking(called), tuple(range(1, 7)))))
    module(torch.randn(3, 8)).sum().backward()
    assert ["forward", "backward"] == called
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    for other in (
        kernel_of(get("bottleneck_mlp"), Signature(Layout.VECTOR, 8, 8)),
        kernel_of(get("bottleneck_mlp").with_birth(Birth.RANDOM), Signature(Layout.VECTOR, 8, 9)),
    ):
        with pytest.raises(Conflict, match="expected one of blueprint"):
            module.use(other)


def test_a_seed_draws_other_initial_parameters(kernel):
    """Instances may start elsewhere, reproducibly."""
    one, same, other = kernel.instantiate(seed=7), kernel.instantiate(seed=7), kernel.instantiate()
    assert torch.equal(one.get_parameter("down.weight"), same.get_parameter("down.weight"))
    assert not torch.equal(one.get_parameter("down.weight"), other.get_parameter("down.weight"))


def test_copies_share_code_and_nothing_else(kernel):
    """Deepcopy gives independent parameters on the same kernel; state_dict carries values over."""
    module = kernel.instantiate()
    copied = copy.deepcopy(module)
    assert module.kernel is copied.kernel
    with torch.no_grad():
        copied.get_parameter("out.bias").fill_(3.0)
    assert not torch.equal(module.get_parameter("out.bias"), copied.get_parameter("out.bias"))
    module.load_state_dict(copied.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(module(x), copied(x))


def test_kernels_are_not_pickled(kernel):
    """A pickle would carry machine code past the verification: the error says what to do instead."""
    with pytest.raises(TypeError, match="load it again by id"):
        pickle.dumps(kernel)


def test_export_needs_no_esper(kernel, tmp_path):
    """The eager twin exports to a plain torch program that predicts identically."""
    module = kernel.instantiate()
    x = torch.randn(4, 8)
    program = torch.export.export(module.eager(), (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize(
    "x", [torch.randn(8), torch.randn(2, 9), torch.randn(2, 3, 8), torch.zeros(2, 8, dtype=torch.long)]
)
def test_an_input_of_another_kind_is_refused_in_words(kernel, x):
    """Compiled code never sees memory that it was not made for."""
    with pytest.raises(InvalidInput, match=r"expected an input for vector:8->8:float32, found"):
        kernel.instantiate()(x)


def test_an_empty_batch_gives_an_empty_answer(kernel):
    """No samples, no delta."""
    assert (0, 8) == kernel.instantiate()(torch.randn(0, 8)).shape


def test_autocast_and_half_inputs_are_answered_in_their_own_type(kernel):
    """Inside autocast the kernel computes in its own precision and answers in that of its input."""
    module, x = kernel.instantiate(), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), kernel.instantiate()(x))
        assert torch.bfloat16 == module(x.bfloat16()).dtype
    assert torch.bfloat16 == module(x.bfloat16()).dtype


def test_kernels_say_what_they_are(kernel):
    """Printed models name blueprint, signature, tier and digest."""
    assert "Kernel(bottleneck_mlp vector:8->8:float32 portable sha256:" in repr(kernel.instantiate())


def test_other_precisions_are_built(kernel):
    """A float64 signature gives float64 parameters and output."""
    double = kernel_of(get("low_rank"), Signature(Layout.VECTOR, 8, 8, "float64")).instantiate()
    assert torch.float64 == double(torch.randn(3, 8, dtype=torch.float64)).dtype
