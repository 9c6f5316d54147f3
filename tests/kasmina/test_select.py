"""Choosing sites by name, type and function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.kasmina import wrap
from esper.kasmina.control import SiteKind
from esper.mesh.errors import InvalidInput
from tests.kasmina.hosts import MLP, mlp, small_cnn, small_transformer


def _names(model: nn.Module, x: torch.Tensor, **options: object) -> set[str]:
    growth = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=(x,), **options)
    growth.close()
    return {site.descriptor.name for site in growth.sites}


X, IMAGE = torch.randn(4, 8), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("first", {"first"}),
        (["first", "h*"], {"first", "head"}),
        ("first..head", {"first..head"}),
        (["first", "second"], {"first", "second"}),
        (nn.Linear, {"first", "second", "head"}),
        ((nn.Conv2d, nn.Linear, "second..head"), None),
        (lambda site: site.narrowest_width == 1 and site.kind is SiteKind.SERIES, {"second"}),
        (["head", lambda site: site.granularity == "span"], {"head", "first..second", "second..head", "first..head"}),
    ],
)
def test_chosen(sites: object, expected: set[str] | None) -> None:
    """A pattern, a type, a predicate, or several of them; a span is chosen by name, or where both ends are."""
    if expected is None:
        with pytest.raises(InvalidInput, match=r"found Conv2d, of which it has none; it has Linear \(3\)"):
            _names(mlp(), X, sites=sites)
    else:
        assert expected == _names(mlp(), X, sites=sites)


def test_last_parts_and_exclusions() -> None:
    """A pattern also matches the last parts of names, as adapter libraries have it; exclusions take away."""
    assert {"1.conv1", "2.conv1"} == _names(small_cnn(), IMAGE, sites="conv1")
    assert {"1.conv1", "1.conv1..1.norm1"} >= _names(small_cnn(), IMAGE, sites=["conv1"], exclude="2.*")
    layers = _names(small_transformer(), torch.randn(2, 5, 16), sites="linear*", exclude=[nn.LayerNorm, "layers.0.*"])
    assert {"0.layers.1.linear1", "0.layers.1.linear2", "0.layers.1.linear1..0.layers.1.linear2"} == layers
    convolutions = _names(small_cnn(), IMAGE, exclude=(nn.BatchNorm2d, lambda site: site.granularity != "layer"))
    assert not [name for name in convolutions if "norm" in name or ".." in name]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("secnd", r"found 'secnd', which matches none; close to it are second; the model has first, second, head"),
        (["first", "encoder.*"], r"'encoder\.\*', which matches none"),
        ("first..tail", r"'first\.\.tail', which matches none"),
        (int, "types of modules, found int"),
        (nn.Conv2d, r"found Conv2d, of which it has none; it has Linear \(3\)"),
        ([3], "patterns, module types or predicates, found 3"),
    ],
)
@pytest.mark.parametrize("argument", ["sites", "exclude"])
def test_what_does_not_exist(argument: str, sites: object, message: str) -> None:
    """A selector that matches nothing is an error at once, which says what did not match and what there is."""
    model = mlp()
    with pytest.raises(InvalidInput, match=f"wrap {argument}: .*{message}"):
        wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), **{argument: sites})


class _Unused(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


def test_what_can_not_grow(capfd: pytest.CaptureFixture[str]) -> None:
    """Chosen modules that can not grow are named with reasons: in an error where none is left, else in the log."""
    with pytest.raises(InvalidInput, match=r"'spare' chose no site \(spare: it was not called"):
        _names(_Unused(), X, sites="spare")
    with pytest.raises(InvalidInput, match="a predicate chose no site"):
        _names(mlp(), X, sites=lambda site: site.depth > 2)
    assert {"first"} == _names(_Unused(), X, sites=["first", "spare"])
    assert "it was not called" in capfd.readouterr().err


def test_refusals_of_whole_models() -> None:
    """A model that runs no hooks is refused at once."""
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="TorchScript"):
        wrap(scripted, torch.optim.SGD(scripted.parameters(), lr=0.1))
