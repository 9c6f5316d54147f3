"""Where a model can grow."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina import wrap
from esper.kasmina._causal import is_causal
from esper.kasmina._ports import Port, fit
from esper.kasmina._probe import ForwardWatch
from esper.kasmina.control import SiteKind
from esper.kasmina.signature import Layout
from esper.kasmina.sites import Discovery, Selection, Site, discover, observe, site_document, site_from_document
from tests.kasmina.hosts import mlp, small_cnn, small_lstm, small_transformer


def _find(model: nn.Module, *args: Tensor, **options: object) -> Discovery:
    return discover(model, observe(model, args), **options)  # type: ignore[arg-type]


def _site(found: Discovery, name: str, kind: SiteKind) -> Site:
    return next(s for s in found.sites if s.descriptor.name == name and s.descriptor.kind is kind)


def _reason(found: Discovery, name: str) -> str:
    return next(refusal.reason for refusal in found.refusals if refusal.name == name)


def test_mlp() -> None:
    """Layers in series and in parallel, and spans around the narrow layer, with signatures and narrowest widths."""
    found = _find(mlp(), torch.randn(4, 8))
    listed = {
        (s.descriptor.name, s.descriptor.kind.value): (str(s.descriptor.signature), s.descriptor.narrowest_width)
        for s in found.sites
    }
    assert {
        ("first", "series"): ("vector:16->16:float32", 16),
        ("first", "parallel"): ("vector:8->16:float32", 16),
        ("second", "series"): ("vector:1->1:float32", 1),
        ("second", "parallel"): ("vector:16->1:float32", 1),
        ("head", "series"): ("vector:4->4:float32", 4),
        ("head", "parallel"): ("vector:1->4:float32", 4),
        ("first..second", "parallel"): ("vector:8->1:float32", 1),
        ("second..head", "parallel"): ("vector:16->4:float32", 1),
        ("first..head", "parallel"): ("vector:8->4:float32", 1),
    } == listed
    assert list(range(9)) == [site.index for site in found.sites]
    assert sorted(s.descriptor.depth for s in found.sites) == [s.descriptor.depth for s in found.sites]
    span = _site(found, "first..head", SiteKind.PARALLEL).descriptor
    assert ("span", 8 * 16 + 16 + 16 + 1 + 4 + 4) == (span.granularity, span.parameters)


def test_cnn() -> None:
    """Convolutions, norms, residual blocks and spans that end behind a norm; a span into the head pools to a vector."""
    found = _find(small_cnn(), torch.randn(4, 3, 8, 8))
    names = {s.descriptor.name for s in found.sites}
    assert {"0", "0.0", "0.1", "1", "1.conv1..1.norm2", "0..1", "5"} <= names
    assert "image:3->8:float32" == str(_site(found, "0", SiteKind.PARALLEL).descriptor.signature)
    assert "block" == _site(found, "1", SiteKind.SERIES).descriptor.granularity
    assert (4, 4) == _site(found, "1", SiteKind.SERIES).extent
    assert "vector:8->4:float32" == str(_site(found, "1..5", SiteKind.PARALLEL).descriptor.signature)
    norms = [
        s for s in found.sites if s.descriptor.module_type == "BatchNorm2d" and s.descriptor.granularity == "layer"
    ]
    assert {SiteKind.SERIES} == {s.descriptor.kind for s in norms}


def test_transformer() -> None:
    """Attention is one layer whose inner projection, used without a call, is no site of its own."""
    found = _find(small_transformer(), torch.randn(2, 5, 16))
    attention = _site(found, "0.layers.0.self_attn", SiteKind.SERIES).descriptor
    assert ("MultiheadAttention", "sequence:16->16:float32") == (attention.module_type, str(attention.signature))
    assert not [s for s in found.sites if "out_proj" in s.descriptor.name]
    assert "block" == _site(found, "0.layers.1", SiteKind.PARALLEL).descriptor.granularity


def test_lstm() -> None:
    """A recurrent layer grows at the sequence of its tuple; token ids are no input for a branch."""
    found = _find(small_lstm(), torch.randint(0, 11, (4, 6)))
    assert "sequence:16->16:float32" == str(_site(found, "lstm", SiteKind.SERIES).descriptor.signature)
    assert "sequence:12->16:float32" == str(_site(found, "lstm", SiteKind.PARALLEL).descriptor.signature)
    assert [SiteKind.SERIES] == [s.descriptor.kind for s in found.sites if s.descriptor.name == "embed"]


class _Odd(nn.Module):
    """Everything that can not grow, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.varied = nn.PReLU()
        self.unused = nn.Linear(8, 8)
        self.cell = nn.LSTMCell(8, 8)
        self.flat = nn.Linear(8, 8)
        self.silent = _Silent()
        self.packed = nn.GRU(8, 8, batch_first=True)
        self.scripted = torch.jit.script(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.varied(x[:, :4])
        x, _ = self.cell(self.varied(x))
        self.flat(x[0])
        self.silent(x)
        self.packed(nn.utils.rnn.pack_padded_sequence(x[:, None], torch.ones(len(x)), batch_first=True))
        return self.scripted(x)


class _Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> dict[str, int]:
        return {"rows": len(self.act(self.inner(x)))}


def test_refusals_have_reasons() -> None:
    """What can not grow is listed with the reason: other widths, never called, one dimension, no tensor, packed."""
    found = _find(_Odd(), torch.randn(3, 8))
    assert "2 times in one forward, and its output has the shapes (3, 4) and (3, 8)" in _reason(found, "varied")
    assert "not called" in _reason(found, "unused")
    assert "2 to 5" in _reason(found, "flat")
    assert "holds no tensor: it is dict" in _reason(found, "silent")
    assert "packed sequence" in _reason(found, "packed")
    assert "TorchScript" in _reason(found, "scripted")
    assert "inner" not in {r.name for r in found.refusals}
    # A cell gives (h, c): the first is its output.
    assert "vector:8->8:float32" == str(_site(found, "cell", SiteKind.SERIES).descriptor.signature)


def test_nothing_inside() -> None:
    """A model that is one layer, or holds its parameters itself, has no place for a seed, and says so."""
    assert "no module with parameters" in _reason(_find(nn.Linear(3, 3), torch.randn(2, 3)), "")


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.twice(self.twice(x)).view(-1, 1, 4, 2)
        return [self.head(x), self.head(x[:, :, ::2])]


def test_a_module_that_is_called_more_than_once() -> None:
    """It grows where its calls agree on features and samples, whatever the extents, but ends no span."""
    found = _find(_Shared(), torch.randn(3, 8))
    assert "vector:8->8:float32" == str(_site(found, "twice.0", SiteKind.PARALLEL).descriptor.signature)
    assert "image:1->2:float32" == str(_site(found, "head", SiteKind.PARALLEL).descriptor.signature)
    assert not [s for s in found.sites if s.descriptor.granularity == "span"]


class _Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.patches = _Patches()

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(self.norm(self.down(x)))


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv3d(4, 6, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x)).flatten(2).transpose(1, 2)


def test_volumes_are_images_with_folded_positions() -> None:
    """(N, C, D, H, W) grows like an image (N, C, D, H * W); between a volume and a sequence there is no branch."""
    found = _find(_Volumes(), torch.randn(2, 1, 4, 6, 8))
    site = _site(found, "down", SiteKind.PARALLEL)
    assert ("image:1->4:float32", Port(Layout.IMAGE, 1, 0, 1)) == (str(site.descriptor.signature), site.y)
    assert ((2, 1, 4, 48), (2, 4, 2, 12)) == (site.x_shape, site.y_shape)
    kinds = {s.descriptor.kind for s in found.sites if s.descriptor.name == "patches"}
    assert {SiteKind.SERIES} == kinds


class _Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3, padding=1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_conv1d_is_a_sequence_with_features_first() -> None:
    """(N, C, T) is a sequence whose features stand second; a block takes the order of its nearest layer."""
    found = _find(_Conv1d(), torch.randn(2, 4, 10))
    block = _site(found, "body", SiteKind.PARALLEL)
    assert ("sequence:4->6:float32", Port(Layout.SEQUENCE, 1)) == (str(block.descriptor.signature), block.y)
    assert (5,) == block.extent


def test_sequence_first() -> None:
    """A module that puts positions first grows with samples and positions told apart; where that is unclear, not."""
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(layer, nn.Linear(8, 3))
    found = _find(model, torch.randn(7, 2, 8))
    assert Port(Layout.SEQUENCE, 2, 1) == _site(found, "0", SiteKind.SERIES).y
    assert (2, 7, 8) == _site(found, "0", SiteKind.SERIES).y_shape
    assert "told apart" in _reason(found, "1")


def test_channels_last_image() -> None:
    """A linear layer over four dimensions has its features last."""
    found = _find(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5)), torch.randn(2, 4, 4, 3))
    site = _site(found, "0", SiteKind.PARALLEL)
    assert ("image:3->5:float32", (2, 5, 4, 4)) == (str(site.descriptor.signature), site.y_shape)


def test_select_limit_and_documents() -> None:
    """Patterns and limits choose densely indexed sites, and a site survives its JSON form."""
    model, x = small_cnn(), torch.randn(2, 3, 8, 8)
    chosen = _find(model, x, select=Selection(model, ["1", "2.*"])).sites
    assert {"1", "2.conv1", "2.norm1", "2.conv2", "2.norm2"} <= {s.descriptor.name for s in chosen}
    assert list(range(len(chosen))) == [s.index for s in chosen]
    limited = _find(model, x, max_sites=3)
    assert 3 == len(limited.sites)
    assert "limit of 3" in limited.refusals[-1].reason
    for site in _find(model, x).sites:
        assert site == site_from_document(site_document(site))


def test_half_precision_and_integers() -> None:
    """The signature has the dtype of the site's parameters."""
    found = _find(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(torch.bfloat16), torch.randn(2, 4).bfloat16())
    assert {"bfloat16"} == {s.descriptor.signature.dtype for s in found.sites}


def test_observe_leaves_no_trace() -> None:
    """Observing runs no batch norm, draws no random number, and keeps flags and hooks."""
    model = small_cnn()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    observe(model, (torch.ones(2, 3, 8, 8),))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (True, False) == (model[2].training, model[1].training)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_watch_ends_with_an_exception() -> None:
    """A forward that raises takes its hooks with it and leaves the watch armed for the next one."""
    model = nn.Sequential(nn.Linear(3, 3))
    left: list[object] = []
    watch = ForwardWatch(model, lambda _a, _k: [model[0].register_forward_hook(lambda *_: None)], left.append)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4))
    assert not model[0]._forward_hooks
    assert watch.armed
    with torch.no_grad():
        model(torch.ones(2, 3))
    assert watch.armed
    model(torch.ones(2, 3))
    assert (False, 2) == (watch.armed, len(left))
    assert not model._forward_hooks


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def test_a_branch_is_offered_once() -> None:
    """One around gate and up is the one around up; those from gate and from up to down are one, as is the block's."""

    def spans(model: nn.Module, **options: object) -> set[str]:
        found = _find(model, torch.ones(2, 6), **options).sites
        return {s.descriptor.name for s in found if s.descriptor.granularity == "span"}

    assert {"gate..down"} == spans(_Gated())
    inside = nn.Sequential(_Gated(), nn.ReLU())
    assert not spans(inside)
    assert {"0.gate..0.up", "0.gate..0.down"} == spans(inside, select=lambda site: site.granularity == "span")
    behind_relu = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.ReLU(inplace=True)), nn.ReLU())
    assert {"0.0..0.1"} == spans(behind_relu)


class _Causal(nn.Module):
    def __init__(self, *, causal: bool, form: str = "rows") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 9)
        self.causal, self.form = causal, form

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]) if self.causal else None
        logits = self.head(self.layer(self.embed(tokens), src_mask=mask, is_causal=self.causal))
        forms = {
            "rows": logits,
            "flat": logits.flatten(0, 1),
            "classes first": logits.mT,
            "loss": logits.square().mean(),
        }
        return forms[self.form], None


@pytest.mark.parametrize("form", ["rows", "flat", "classes first"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("samples", "positions"), [(1, 6), (3, 6), (2, 9)])
def test_causality_is_found_by_experiment(causal: bool, form: str, samples: int, positions: int) -> None:
    """A masked model is causal and an unmasked one is not, with logits per position, flattened or classes first.

    Nine positions and nine classes: the shape does not say which is which.
    """
    tokens = (torch.arange(samples * positions).view(samples, positions) * 5 // 3) % 9
    assert causal is is_causal(_Causal(causal=causal, form=form), (tokens,), {})


def test_causality_that_can_not_be_found() -> None:
    """Without positions to look at there is no verdict, and sequences are taken to be causal."""
    tokens = torch.randint(0, 9, (3, 6))
    assert None is is_causal(_Causal(causal=True, form="loss"), (tokens,), {})
    assert None is is_causal(_Causal(causal=True), (tokens[:, :1],), {})
    assert None is is_causal(_Causal(causal=True), (torch.ones(3, 6, dtype=torch.long),), {})
    assert None is is_causal(nn.Flatten(0), (), {})
    for form, causal in (("loss", True), ("rows", False)):
        model = _Causal(causal=False, form=form)
        growth = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=(tokens,))
        found = {s.descriptor.causal for s in growth.sites if s.y.layout is Layout.SEQUENCE}
        assert {causal} == found
        growth.close()


class _EncoderDecoder(nn.Module):
    """Decoder inputs are given, or made of labels that are moved on by one position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.head = nn.Linear(8, 9)

    def forward(self, source: Tensor, target: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if target is None:
            assert labels is not None
            target = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.body(self.embed(source), self.embed(target), tgt_mask=mask))


@pytest.mark.parametrize("name", ["target", "labels"])
@pytest.mark.parametrize("positions", [6, 4])
def test_decoders_behind_an_encoder_are_causal(name: str, positions: int) -> None:
    """That every position sees all of the encoder's input does not let a decoder look ahead in its own."""
    tokens = torch.arange(12).view(2, 6) % 9
    assert is_causal(_EncoderDecoder(), (tokens,), {name: tokens[:, :positions]})


def test_meta_models_are_wrapped() -> None:
    """Sites of a model without memory are found; what an experiment would tell is unknown, so positions are causal."""
    with torch.device("meta"):
        model, tokens = _Causal(causal=False), torch.zeros(2, 6, dtype=torch.long)
        model.register_buffer("seen", torch.zeros(3))
    growth = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=(tokens,))
    assert {True} == {s.descriptor.causal for s in growth.sites if s.y.layout is Layout.SEQUENCE}
    growth.close()


def test_classifiers_are_not_causal() -> None:
    """Where the output has no positions, later positions may be seen; so may the features of a vector."""
    assert False is is_causal(small_lstm(), (torch.randint(0, 11, (4, 6)),), {})
    assert False is is_causal(mlp(), (torch.randn(4, 8),), {})


def test_causal_sites() -> None:
    """In a causal model every sequence site is causal, and one that changes the number of positions is refused."""
    found = _find(_Causal(causal=True), torch.randint(0, 9, (2, 5)), causal=True)
    assert {True} == {s.descriptor.causal for s in found.sites}
    strided = _find(_Conv1d(), torch.randn(2, 4, 10), causal=True)
    assert [SiteKind.SERIES] == [s.descriptor.kind for s in strided.sites if s.descriptor.name == "body.2"]


@pytest.mark.parametrize(
    ("port", "shape"),
    [
        (Port(Layout.VECTOR, 1), (2, 5)),
        (Port(Layout.SEQUENCE, 2), (2, 3, 5)),
        (Port(Layout.SEQUENCE, 1), (2, 5, 3)),
        (Port(Layout.SEQUENCE, 2, 1), (3, 2, 5)),
        (Port(Layout.IMAGE, 1), (2, 5, 3, 4)),
        (Port(Layout.IMAGE, 3), (2, 3, 4, 5)),
        (Port(Layout.IMAGE, 1, folds=1), (2, 5, 3, 4, 6)),
        (Port(Layout.IMAGE, 4, folds=1), (2, 3, 4, 6, 5)),
    ],
)
def test_ports_invert(port: Port, shape: tuple[int, ...]) -> None:
    """Canonical puts batch first and features where the layout has them; restore undoes it."""
    x = torch.randn(shape)
    canonical = port.canonical(x)
    assert (2, 5) == (canonical.shape[0], canonical.shape[port.layout.feature_dim])
    assert tuple(canonical.shape) == port.canonical_shape(shape)
    assert torch.equal(x, port.restore(canonical, shape))
    assert port == Port.from_document(port.document())


def test_fit() -> None:
    """X is averaged down or repeated up to the extent of y, and over all positions for a vector."""
    image, sequence = torch.randn(2, 3, 8, 6), torch.randn(2, 8, 3)
    assert torch.equal(image, fit(image, Layout.IMAGE, Layout.IMAGE, (8, 6)))
    pooled = fit(image, Layout.IMAGE, Layout.IMAGE, (4, 3))
    torch.testing.assert_close(nn.functional.avg_pool2d(image, 2), pooled)
    assert (2, 3, 16, 12) == tuple(fit(image, Layout.IMAGE, Layout.IMAGE, (16, 12)).shape)
    torch.testing.assert_close(sequence.view(2, 4, 2, 3).mean(2), fit(sequence, Layout.SEQUENCE, Layout.SEQUENCE, (4,)))
    torch.testing.assert_close(image.mean((2, 3)), fit(image, Layout.IMAGE, Layout.VECTOR, ()))
    torch.testing.assert_close(sequence.mean(1), fit(sequence, Layout.SEQUENCE, Layout.VECTOR, ()))
    volume = torch.randn(2, 3, 4, 6, 8)
    pooled = fit(volume, Layout.IMAGE, Layout.IMAGE, (2, 3, 4))
    torch.testing.assert_close(nn.functional.avg_pool3d(volume, 2), pooled)
    assert (2, 3, 8, 6, 8) == tuple(fit(volume, Layout.IMAGE, Layout.IMAGE, (8, 6, 8)).shape)
    torch.testing.assert_close(volume.mean((2, 3, 4)), fit(volume, Layout.IMAGE, Layout.VECTOR, ()))


def test_discovery_is_quick() -> None:
    """Hundreds of modules are listed well within a second, and nothing is copied."""
    model = nn.Sequential(*(small_cnn(i)[1] for i in range(60)))
    calls = observe(model, (torch.randn(2, 8, 4, 4),))
    start = time.perf_counter()
    found = discover(model, calls)
    assert time.perf_counter() - start < 5.0
    assert len(found.sites) > 400
