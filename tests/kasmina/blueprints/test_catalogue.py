"""The promises of the shipped templates: silent birth, living gradient, safety, causality, at every width."""

import pytest
import torch

from esper.kasmina.blueprints import Birth, catalogue
from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.signature import Layout, Signature

WIDTHS = (1, 2, 3, 8, 17, 64)
PAIRS = [(w, w) for w in WIDTHS] + [(1, 17), (3, 8), (8, 3), (17, 2), (64, 1), (2, 64), (8, 17)]
CASES = [(b, layout) for b in catalogue() for layout in b.layouts]
IDS = [f"{b.name}-{layout.value}" for b, layout in CASES]
RANDOM_CASES = [(b.with_birth(Birth.RANDOM), layout) for b, layout in CASES]


def activation_of(layout, width, *, batch=5, seed=0):
    """A reproducible activation of a layout."""
    shape = {"vector": (batch, width), "sequence": (batch, 7, width), "image": (batch, width, 6, 5)}[layout.value]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module_of(blueprint, layout, width_in, width_out, seed=1):
    """A template as a module."""
    return BlueprintModule(blueprint.check(Signature(layout, width_in, width_out)), seed=seed)


def test_the_catalogue_covers_every_layout_and_kind():
    """There are choices for vectors, sequences, images and language models, among them the kinds that users expect."""
    names = {b.name for b in catalogue()}
    expected = "low_rank bottleneck_mlp gated_ffn depthwise_separable dilated_conv squeeze_excitation mini_attention"
    assert {*expected.split(), "norm_linear", "channel_mixer", "causal_conv", "wide_residual"} <= names
    for layout in Layout:
        assert len([b for b in catalogue() if layout in b.layouts]) >= 5
    assert len([b for b in catalogue() if b.causal and Layout.SEQUENCE in b.layouts]) >= 5


@pytest.mark.parametrize(("blueprint", "layout"), CASES, ids=IDS)
def test_birth_is_silent_and_its_gradient_is_alive(blueprint, layout):
    """At every width the output is exactly zero, and every tensor of the outgoing matrix has a gradient to follow."""
    for width_in, width_out in PAIRS:
        module = module_of(blueprint, layout, width_in, width_out)
        x = activation_of(layout, width_in)
        delta = module(x)
        expected = list(x.shape)
        expected[layout.feature_dim] = width_out
        assert expected == list(delta.shape)
        assert torch.count_nonzero(delta) == 0
        (delta * torch.randn_like(delta)).sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
            if name.startswith("out."):
                assert parameter.grad.norm() > 1e-3, (width_in, width_out, name)


@pytest.mark.parametrize(("blueprint", "layout"), CASES, ids=IDS)
def test_a_few_steps_from_birth_every_parameter_learns(blueprint, layout):
    """Once the outgoing matrix has moved, nothing inside is dead, at width 1 as at 17."""
    for width in (1, 17):
        module = module_of(blueprint, layout, width, width)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x = activation_of(layout, width, batch=9)
        target = torch.sin(3 * x) + 0.5
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (module(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        # One token of width 1 looks at keys of one sign: its scores may saturate, the rest must live.
        dead = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert dead == []


@pytest.mark.parametrize(("blueprint", "layout"), RANDOM_CASES, ids=IDS)
def test_random_birth_is_bounded_and_heard(blueprint, layout):
    """Born at random, a module says something, and an input a million times larger does not make it shout."""
    for width in (1, 17):
        module = module_of(blueprint, layout, width, width)
        x = activation_of(layout, width)
        normal, huge = module(x), module(x * 1e6)
        assert torch.isfinite(huge).all()
        assert 0 < normal.abs().max()
        assert huge.abs().max() < 50


@pytest.mark.parametrize(("blueprint", "layout"), RANDOM_CASES, ids=IDS)
def test_modules_are_pure_functions(blueprint, layout):
    """Train and eval mode, a second call and another batch around a sample make no difference; there are no buffers."""
    module = module_of(blueprint, layout, 8, 8)
    x = activation_of(layout, 8)
    first = module.train()(x)
    assert torch.equal(first, module.eval()(x))
    torch.testing.assert_close(first[:2], module(x[:2]))
    assert list(module.buffers()) == []


@pytest.mark.parametrize(("blueprint", "layout"), RANDOM_CASES, ids=IDS)
def test_initial_parameters_follow_the_seed(blueprint, layout):
    """Equal seeds give equal parameters, other seeds others."""
    one, same, other = (module_of(blueprint, layout, 8, 8, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


SEQUENCES = [b.with_birth(Birth.RANDOM) for b in catalogue() if Layout.SEQUENCE in b.layouts]


@pytest.mark.parametrize("blueprint", SEQUENCES, ids=lambda b: b.name)
def test_causal_templates_do_not_leak_the_future(blueprint):
    """Changing later tokens changes earlier outputs exactly where a template does not call itself causal."""
    module = module_of(blueprint, Layout.SEQUENCE, 8, 8)
    x = activation_of(Layout.SEQUENCE, 8)
    changed = x.clone()
    changed[:, 4:] = activation_of(Layout.SEQUENCE, 8, seed=9)[:, 4:]
    leak = (module(x)[:, :4] - module(changed)[:, :4]).abs().max().item()
    assert blueprint.causal == (leak < 1e-6)


def test_context_templates_look_at_neighbours():
    """Templates that are sold as spatial or global see more than one position."""
    for name in ("depthwise_separable", "dilated_conv", "conv_bottleneck", "squeeze_excitation", "mini_attention"):
        blueprint = next(b for b in catalogue() if b.name == name).with_birth(Birth.RANDOM)
        module = module_of(blueprint, Layout.IMAGE, 8, 8)
        x = activation_of(Layout.IMAGE, 8)
        changed = x.clone()
        changed[:, ::2, 3, 2] += 3.0
        assert (module(x) - module(changed))[:, :, 1, 2].abs().max() > 1e-5
