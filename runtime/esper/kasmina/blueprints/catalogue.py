"""The blueprints that ship with Esper; torch-free, submitted to the library by the forge at its start.

All are born at zero output with a living gradient and normalise their input (a newborn without that has destroyed hosts
within a hundred steps). Inner widths are floored, so that a module in a width-1 host still has features to learn with.
Every template also exists born at random: ``get("low_rank").with_birth(Birth.RANDOM)``.
"""

from __future__ import annotations

from functools import cache

from esper.kasmina.blueprints.ir import Birth, Blueprint, Node, node
from esper.kasmina.signature import Layout
from esper.mesh.errors import NotFound

__all__ = ["catalogue", "get"]

_ALL = (Layout.VECTOR, Layout.SEQUENCE, Layout.IMAGE)
_NORM = node("norm", "norm", "x")
_NARROW = "max(min(in, out) // 4, 4)"
_WIDE = "2 * max(in, out)"
# Attention widths are multiples of the two heads.
_TOKEN = "2 * max(min(in, out) // 4, 4)"  # noqa: S105  # a width, no password


def _out(source: str, *, bias: bool = True) -> Node:
    return node("out", "linear", source, features="out", bias=bias, init="zero")


def _template(
    name: str,
    title: str,
    description: str,
    tags: str,
    layouts: tuple[Layout, ...],
    *nodes: Node,
    causal: bool = False,
) -> Blueprint:
    return Blueprint(
        name=name,
        title=title,
        description=description,
        tags=tuple(tags.split()),
        layouts=layouts,
        nodes=nodes,
        birth=Birth.ZERO,
        causal=causal,
    )


def _pointwise() -> tuple[Blueprint, ...]:
    """Modules without mixing of positions: every layout, causal. On images the norm sees all of a sample's pixels."""
    return (
        _template(
            "low_rank",
            "Low-rank adapter",
            "Two thin matrices without a non-linearity: the cheapest way to correct a linear map.",
            "adapter linear",
            _ALL,
            _NORM,
            node("down", "linear", "norm", features=_NARROW, bias=False),
            _out("down", bias=False),
            causal=True,
        ),
        _template(
            "norm_linear",
            "Normalised linear",
            "One full matrix behind a normalisation: adds the capacity of a whole linear layer.",
            "linear",
            _ALL,
            _NORM,
            _out("norm"),
            causal=True,
        ),
        _template(
            "bottleneck_mlp",
            "Bottleneck MLP",
            "Down to a quarter, GELU, and up: the classical adapter.",
            "adapter mlp",
            _ALL,
            _NORM,
            node("down", "linear", "norm", features=_NARROW),
            node("act", "gelu", "down"),
            _out("act"),
            causal=True,
        ),
        _template(
            "wide_mlp",
            "Wide MLP",
            "Up to twice the wider side, GELU, and down: a branch around a narrow layer with room of its own.",
            "mlp wide",
            _ALL,
            _NORM,
            node("up", "linear", "norm", features=_WIDE),
            node("act", "gelu", "up"),
            _out("act"),
            causal=True,
        ),
        _template(
            "gated_ffn",
            "Gated feed-forward",
            "A SiLU-gated feed-forward block: multiplicative features at the cost of a third matrix.",
            "mlp gated",
            _ALL,
            _NORM,
            node("gate", "linear", "norm", features="max(in, out)"),
            node("value", "linear", "norm", features="max(in, out)"),
            node("act", "silu", "gate"),
            node("gated", "mul", "act", "value"),
            _out("gated"),
            causal=True,
        ),
    )


def _images() -> tuple[Blueprint, ...]:
    return (
        _template(
            "channel_mixer",
            "Channel mixer",
            "Two 1x1 convolutions with a GELU between: mixes channels pixel by pixel.",
            "mlp conv",
            (Layout.IMAGE,),
            _NORM,
            node("up", "linear", "norm", features="2 * in"),
            node("act", "gelu", "up"),
            _out("act"),
        ),
        _template(
            "depthwise_separable",
            "Depthwise-separable convolution",
            "3x3 per channel, GELU, 1x1 across channels: a spatial neighbourhood for few parameters.",
            "conv separable",
            (Layout.IMAGE,),
            _NORM,
            node("depthwise", "conv", "norm", features="in", depthwise=True),
            node("act", "gelu", "depthwise"),
            _out("act"),
        ),
        _template(
            "dilated_conv",
            "Dilated convolution",
            "A 3x3 convolution with holes over a quarter of the channels: a wider view of the image.",
            "conv dilated",
            (Layout.IMAGE,),
            _NORM,
            node("dilated", "conv", "norm", features=_NARROW, dilation=2),
            node("act", "gelu", "dilated"),
            _out("act"),
        ),
        _template(
            "conv_bottleneck",
            "Convolutional bottleneck",
            "1x1 down, 3x3, 1x1 up: the residual block of deep image networks.",
            "conv bottleneck",
            (Layout.IMAGE,),
            _NORM,
            node("down", "linear", "norm", features="max(min(in, out) // 2, 4)"),
            node("down_act", "gelu", "down"),
            node("spatial", "conv", "down_act", features="max(min(in, out) // 2, 4)"),
            node("act", "gelu", "spatial"),
            _out("act"),
        ),
        _template(
            "wide_residual",
            "Wide residual unit",
            "Two full 3x3 convolutions: the most capacity of the image templates, and the highest price.",
            "conv wide",
            (Layout.IMAGE,),
            _NORM,
            node("first", "conv", "norm", features="max(in, out)"),
            node("act", "gelu", "first"),
            node("out", "conv", "act", features="out", init="zero"),
        ),
    )


def _context() -> tuple[Blueprint, ...]:
    """Modules that look at the whole sample: not causal."""
    attention = (
        _NORM,
        node("query", "linear", "norm", features=_TOKEN, bias=False),
        node("key", "linear", "norm", features=_TOKEN, bias=False),
        node("value", "linear", "norm", features=_TOKEN),
    )
    return (
        _template(
            "squeeze_excitation",
            "Squeeze and excitation",
            "Channels are gated by a summary of the whole sample: global context for little work.",
            "attention gated",
            (Layout.SEQUENCE, Layout.IMAGE),
            _NORM,
            node("pool", "mean_pool", "norm"),
            node("squeeze", "linear", "pool", features="max(in // 4, 4)"),
            node("act", "gelu", "squeeze"),
            node("excite", "linear", "act", features="in"),
            node("gate", "sigmoid", "excite"),
            node("gated", "mul", "norm", "gate"),
            _out("gated"),
        ),
        _template(
            "mini_attention",
            "Mini attention",
            "Two narrow heads of self-attention over tokens or pixels: relations at any distance, at quadratic cost.",
            "attention",
            (Layout.SEQUENCE, Layout.IMAGE),
            *attention,
            node("mixed", "attention", "query", "key", "value", heads=2),
            _out("mixed"),
        ),
        _template(
            "causal_attention",
            "Causal mini attention",
            "Two narrow heads of self-attention over the tokens so far: for language models.",
            "attention",
            (Layout.SEQUENCE,),
            *attention,
            node("mixed", "attention", "query", "key", "value", heads=2, causal=True),
            _out("mixed"),
            causal=True,
        ),
    )


def _sequences() -> tuple[Blueprint, ...]:
    return (
        _template(
            "sequence_conv",
            "Depthwise sequence convolution",
            "Five taps per channel around each token, GELU, a matrix across channels.",
            "conv separable",
            (Layout.SEQUENCE,),
            _NORM,
            node("depthwise", "conv", "norm", features="in", kernel=5, depthwise=True),
            node("act", "gelu", "depthwise"),
            _out("act"),
        ),
        _template(
            "causal_conv",
            "Causal depthwise convolution",
            "Four taps per channel over the tokens so far, GELU, a matrix across channels: for language models.",
            "conv separable",
            (Layout.SEQUENCE,),
            _NORM,
            node("depthwise", "conv", "norm", features="in", kernel=4, depthwise=True, causal=True),
            node("act", "gelu", "depthwise"),
            _out("act"),
            causal=True,
        ),
    )


@cache
def catalogue() -> tuple[Blueprint, ...]:
    """Every template, cheap and general ones first."""
    return (*_pointwise(), *_images(), *_context(), *_sequences())


def get(name: str) -> Blueprint:
    """A template by name.

    Raises:
        NotFound: reason BLUEPRINT_NOT_FOUND.
    """
    for blueprint in catalogue():
        if blueprint.name == name:
            return blueprint
    names = ", ".join(blueprint.name for blueprint in catalogue())
    raise NotFound(f"no blueprint {name!r:.80} in the catalogue: expected one of {names}", reason="BLUEPRINT_NOT_FOUND")
