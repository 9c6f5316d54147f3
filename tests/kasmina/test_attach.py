"""Seeds in a host: where their modules hang, what they add, and that they leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from esper.kasmina import ops
from esper.kasmina.attach import Attachment, SeedModule, owner_of
from esper.kasmina.control import SiteKind
from esper.kasmina.seeds import Execution
from esper.kasmina.sites import Site, discover, observe
from esper.mesh.errors import Conflict
from tests.kasmina.hosts import TinyDelta, mlp, small_cnn, small_lstm, small_transformer

HOSTS = {
    "mlp": (mlp, lambda: torch.randn(4, 8)),
    "cnn": (small_cnn, lambda: torch.randn(4, 3, 8, 8)),
    "transformer": (small_transformer, lambda: torch.randn(4, 5, 16)),
    "lstm": (small_lstm, lambda: torch.randint(0, 11, (4, 6))),
}


def _sites(model: nn.Module, x: Tensor) -> tuple[Site, ...]:
    return discover(model, observe(model, (x,))).sites


def _attach(model: nn.Module, site: Site, birth: str = "random", alpha: float = 1.0) -> Attachment:
    seed = SeedModule(TinyDelta(site.descriptor.signature, birth), site)
    attachment = Attachment.attach(model, site, seed)
    seed.mode = Execution.BLENDED
    seed.alpha.fill_(alpha)
    return attachment


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_every_site_of_every_host(name: str) -> None:
    """At each site: a silent newborn changes nothing, a loud one does and learns, removing it restores every bit."""
    make, batch = HOSTS[name]
    x = batch()
    for site in _sites(make(), x):
        model = make().eval()
        keys, bare = list(model.state_dict()), model(x)
        silent = _attach(model, site, "zero")
        assert torch.equal(bare, model(x)), site
        silent.detach()
        loud = _attach(model, site)
        y = model(x)
        assert not torch.equal(bare, y), site
        y.sum().backward()
        gradients = [p.grad for p in loud.seed.parameters()]
        assert all(g is not None and torch.isfinite(g).all() and g.any() for g in gradients), site
        assert any(f"esper_seed_{site.index}.delta.up" in key for key in model.state_dict())
        loud.detach()
        assert torch.equal(bare, model(x)), site
        assert keys == list(model.state_dict())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blend_is_what_it_says() -> None:
    """Series adds alpha * delta(y), parallel alpha * delta(x)."""
    for kind in SiteKind:
        model, x = mlp(), torch.randn(4, 8)
        site = next(s for s in _sites(model, x) if s.descriptor.name == "first" and s.descriptor.kind is kind)
        y = model.first(x)
        attachment = _attach(model, site, alpha=0.5)
        delta = attachment.seed.delta(x if kind is SiteKind.PARALLEL else y)
        torch.testing.assert_close(y + 0.5 * delta, model.first(x))
        attachment.seed.enabled = False
        assert torch.equal(y, model.first(x))


def test_host_branch_keeps_its_gradient() -> None:
    """With a zero-output newborn at full alpha the host's gradients are those without it, bit for bit."""
    model, x = mlp(), torch.randn(4, 8)
    model(x).square().sum().backward()
    bare = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first..head")
    _attach(model, site, "zero")
    model(x).square().sum().backward()
    named = dict(model.named_parameters())
    assert all(torch.equal(a, named[n].grad) for a, (n, _) in zip(bare, mlp().named_parameters(), strict=True))


class _Iterating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def test_owner_never_iterates_over_its_children() -> None:
    """A seed hangs at the site's module; below one that iterates over its children, at the first that does not."""
    linear = nn.Linear(2, 2)
    assert linear is owner_of(linear)
    assert linear is owner_of(nn.Sequential(nn.Sequential(linear), nn.ReLU()))
    iterating = _Iterating()
    assert iterating.a is owner_of(iterating)
    with pytest.raises(Conflict, match="does not iterate"):
        owner_of(nn.Sequential())
    model, x = nn.Sequential(_Iterating(), nn.Linear(4, 2)), torch.randn(3, 4)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "0" and s.descriptor.kind is SiteKind.SERIES)
    _attach(model, site)
    assert f"0.a.esper_seed_{site.index}.alpha" in model.state_dict()
    model(x)


def test_name_taken() -> None:
    """A host that has an attribute of the child's name is refused, and nothing is attached."""
    model, x = mlp(), torch.randn(4, 8)
    site = _sites(model, x)[0]
    _attach(model, site)
    with pytest.raises(Conflict, match="expected no attribute esper_seed_0"):
        _attach(model, site)
    assert 1 == sum(len(m._forward_hooks) for m in model.modules())


def test_deepcopy_runs_its_own_seed() -> None:
    """A copied model answers through the copied seed: changing the copy does not change the original."""
    model, x = mlp().eval(), torch.randn(4, 8)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first..head")
    attachment = _attach(model, site)
    twin = copy.deepcopy(model)
    before = model(x)
    with torch.no_grad():
        twin.get_submodule(f"head.esper_seed_{site.index}").alpha.zero_()
    assert torch.equal(before, model(x))
    assert not torch.equal(before, twin(x))
    attachment.detach()
    assert not torch.equal(before, model(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("target", ["0", "0.layers.0", "0.layers.1.self_attn", "0.layers.1.linear2"])
def test_fast_paths_of_attention(target: str) -> None:
    """In evaluation, with and without padding, a seed inside a transformer runs, and the fast path is back after it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    model = nn.Sequential(encoder).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    site = next(s for s in _sites(model, x) if s.descriptor.name == target and s.descriptor.kind is SiteKind.SERIES)
    with torch.no_grad():
        bare, padded = encoder(x), encoder(x, src_key_padding_mask=padding)
        attachment = _attach(model, site)
        assert not torch.allclose(bare, encoder(x), atol=1e-4)
        grown = encoder(x, src_key_padding_mask=padding)
        assert not torch.allclose(padded[1, :4], grown[1, :4], atol=1e-4)
        attachment.detach()
        assert torch.equal(bare, encoder(x))
        assert torch.equal(padded, encoder(x, src_key_padding_mask=padding))


def test_isolated_seed_is_not_seen() -> None:
    """In isolation outputs and gradients are the host's own, while features, output and gradient are captured."""
    model, x = mlp(), torch.randn(6, 8)
    model(x).square().sum().backward()
    bare, gradients = model(x), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    site = next(s for s in _sites(model, x) if s.descriptor.name == "second" and s.descriptor.kind is SiteKind.PARALLEL)
    attachment = _attach(model, site)
    seed = attachment.seed
    seed.mode = Execution.ISOLATED
    output = model(x)
    assert torch.equal(bare, output)
    output.square().sum().backward()
    host = [p.grad for name, p in model.named_parameters() if "esper" not in name]
    assert all(torch.equal(a, b) for a, b in zip(gradients, host, strict=True))
    assert seed.capture is not None
    assert (6, 16) == tuple(seed.capture.features.shape)
    assert torch.equal(model.second(torch.relu(model.first(x))), seed.capture.y)
    assert seed.capture.gradient is not None
    assert not seed.capture.gradient.requires_grad
    seed.capture = None
    with torch.no_grad():
        model(x)
    assert seed.capture is None


def test_captures_are_bounded() -> None:
    """No more elements than allowed are kept of a forward, but at least one sample."""
    model, x = mlp(), torch.randn(64, 8)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first" and s.descriptor.kind is SiteKind.SERIES)
    seed = SeedModule(TinyDelta(site.descriptor.signature, "random"), site, capture_elements=48)
    Attachment.attach(model, site, seed)
    seed.mode = Execution.ISOLATED
    model(x).sum().backward()
    assert seed.capture is not None
    assert (3, 16) == tuple(seed.capture.features.shape)


def test_autocast() -> None:
    """Under autocast the newborn computes and the output keeps the type that the host gives it."""
    model, x = mlp(), torch.randn(4, 8)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first..head")
    _attach(model, site)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.bfloat16 is model(x).dtype


def test_compiled_without_graph_breaks() -> None:
    """With dynamo in full-graph mode a seed adds no break, and a ramp of alpha no recompilation."""
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        counts.append(len(graph.graph.nodes))
        return graph

    model, x = mlp(), torch.randn(4, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    bare = compiled(x)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first..head")
    attachment = _attach(model, site)
    for step in range(10):
        attachment.seed.alpha.fill_(step / 10)
        torch.testing.assert_close(model(x), compiled(x))
    assert 2 == len(counts)
    attachment.detach()
    assert torch.equal(bare, compiled(x))
    _attach(model, site)
    torch.testing.assert_close(model(x), compiled(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_a_cpu_the_blend_is_plain_torch(dtype: torch.dtype) -> None:
    """``y + alpha * delta`` bit for bit, in the types of the host, with and without its size being measured."""
    model, x = mlp().to(dtype), torch.randn(4, 8, dtype=dtype)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first" and s.descriptor.kind is SiteKind.SERIES)
    y = model.first(x)
    seed = _attach(model, site, alpha=0.3).seed
    expected = y + (seed.delta(y) * seed.alpha).to(dtype)
    assert torch.equal(expected, model.first(x))
    seed.measuring = True
    assert torch.equal(expected, model.first(x))
    change = torch.linalg.vector_norm((seed.delta(y) * seed.alpha).float()) / y.float().norm()
    torch.testing.assert_close(change, seed.ratio, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=0.0)


def test_on_a_device_blend_and_sample_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels run, the blended output's statistics come with it when they are due, once, and not without."""
    model, x = mlp(), torch.randn(6, 8)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first" and s.descriptor.kind is SiteKind.SERIES)
    seed = _attach(model, site).seed
    plain = model.first(x)
    monkeypatch.setattr(ops, "use_kernels", lambda *_tensors: True)
    assert torch.equal(plain, model.first(x))
    assert seed.take_found() is None
    seed.sampling = 128
    blended = model.first(x)
    found = seed.take_found()
    assert found is not None
    torch.testing.assert_close(blended.mean(0), found.mean)
    torch.testing.assert_close(blended.norm(), found.norm)
    model.first(x)
    assert seed.take_found() is None
    seed.sampling = 128
    model.first(x)
    copy.deepcopy(model)


def test_transforms_and_higher_derivatives() -> None:
    """vmap, per-sample gradients, forward mode and higher derivatives go through a grown site."""
    model, x = mlp(), torch.randn(5, 8)
    site = next(s for s in _sites(model, x) if s.descriptor.name == "first..head")
    _attach(model, site)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    step = 1e-3
    torch.testing.assert_close((model(x + step) - model(x - step)) / (2 * step), tangent, rtol=1e-2, atol=1e-2)
    points = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(points).square().sum(), points, create_graph=True)
    first.square().sum().backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()
