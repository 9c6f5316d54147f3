"""The operations that a blueprint may use: attributes, shape rule, parameters and cost of each, without torch.

A value that flows between nodes has a feature width, and is either *full* (one vector per position: per sample, token
or pixel) or *pooled* (one vector per sample, extents 1, broadcast where it meets a full one). The module ``module``
beside this one has the torch function of the same name for every entry of `OPS`; a test holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from esper.kasmina.signature import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "NOMINAL_EXTENT",
    "NORM_MIN_FEATURES",
    "OPS",
    "Attribute",
    "Flow",
    "Op",
    "Outcome",
    "ParameterSpec",
    "RuleError",
    "Situation",
]

NOMINAL_EXTENT = 64
"""Positions per sample at which the cost of what depends on their number is counted (8 x 8 pixels, 64 tokens)."""
NORM_MIN_FEATURES = 4
"""Below this width `norm` divides by sqrt(1 + mean square), because a standardised scalar would be constant."""

Init = Literal["zero", "one", "uniform"]


class RuleError(Exception):
    """A node breaks the shape rule of its operation; the text is the expectation and the finding."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Static type of a value inside a module."""

    features: int
    pooled: bool = False


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One trainable tensor of a module."""

    name: str
    """``node.weight`` or ``node.bias``."""
    shape: tuple[int, ...]
    init: Init
    bound: float = 0.0
    """Half width of the interval around zero for ``uniform``."""

    @property
    def elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Attribute:
    """What an attribute of an operation may be."""

    kind: Literal["size", "flag", "choice"]
    default: int | str | bool | None = None
    """None: the attribute must be given."""
    low: int = 1
    high: int = 1 << 20
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Situation:
    """A node where its inputs are known and its sizes are numbers."""

    name: str
    layout: Layout
    inputs: tuple[Flow, ...]
    settings: Mapping[str, int | str | bool]

    def size(self, name: str) -> int:
        """An attribute of kind ``size``."""
        return int(self.settings[name])

    def parameter(self, name: str, shape: tuple[int, ...], init: Init, bound: float = 0.0) -> ParameterSpec:
        """A parameter of this node."""
        return ParameterSpec(f"{self.name}.{name}", shape, init, bound)

    def affine(self, weight: tuple[int, ...], fan_in: int) -> tuple[ParameterSpec, ...]:
        """A weight, and a bias where asked for, as the ``init`` attribute says."""
        init: Init = "zero" if self.settings["init"] == "zero" else "uniform"
        bound = 0.0 if init == "zero" else 1.0 / math.sqrt(fan_in)
        specs = [self.parameter("weight", weight, init, bound)]
        if self.settings["bias"]:
            specs.append(self.parameter("bias", (weight[0],), init, bound))
        return tuple(specs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a node yields."""

    flow: Flow
    flops: float
    """Floating-point operations of the forward per position of a full value; a multiply-add counts two."""
    parameters: tuple[ParameterSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: what it takes and the rule by which its output follows."""

    rule: Callable[[Situation], Outcome]
    arity: tuple[int, int] = (1, 1)
    """Fewest and most inputs."""
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = tuple(Layout)
    looks_ahead: Callable[[Mapping[str, int | str | bool]], bool] = lambda _: False
    """Whether a position of a sequence can see a later one, given the attributes."""


def _share(flow: Flow, flops: float) -> float:
    """Work on a pooled value is done once per sample."""
    return flops / NOMINAL_EXTENT if flow.pooled else flops


def _linear(at: Situation) -> Outcome:
    (x,) = at.inputs
    features = at.size("features")
    # A linear map of an image is a convolution of extent 1, so its weight has the two extents too.
    extent = (1, 1) if at.layout is Layout.IMAGE else ()
    flops = 2.0 * x.features * features
    specs = at.affine((features, x.features, *extent), x.features)
    return Outcome(Flow(features, x.pooled), _share(x, flops), specs)


def _conv(at: Situation) -> Outcome:
    (x,) = at.inputs
    if x.pooled:
        raise RuleError("conv wants one vector per position, found a pooled value")
    kernel, features = at.size("kernel"), at.size("features")
    causal = bool(at.settings["causal"])
    if causal and at.layout is not Layout.SEQUENCE:
        raise RuleError(f"causal conv wants a sequence, found {at.layout.value}")
    if not causal and kernel % 2 == 0:
        raise RuleError(f"conv wants an odd kernel, which keeps the extent, found {kernel}")
    if at.settings["depthwise"] and features != x.features:
        raise RuleError(f"depthwise conv wants as many features as its input has ({x.features}), found {features}")
    fan = 1 if at.settings["depthwise"] else x.features
    taps = (kernel, kernel) if at.layout is Layout.IMAGE else (kernel,)
    reach = math.prod(taps) * fan
    return Outcome(Flow(features), 2.0 * reach * features, at.affine((features, fan, *taps), reach))


def _norm(at: Situation) -> Outcome:
    (x,) = at.inputs
    specs = (at.parameter("weight", (x.features,), "one"), at.parameter("bias", (x.features,), "zero"))
    return Outcome(x, _share(x, 8.0 * x.features), specs if at.settings["affine"] else ())


def _elementwise(cost: float) -> Callable[[Situation], Outcome]:
    def rule(at: Situation) -> Outcome:
        (x,) = at.inputs
        return Outcome(x, _share(x, cost * x.features))

    return rule


def _join(at: Situation) -> Outcome:
    widths = {x.features for x in at.inputs}
    if len(widths) > 1:
        raise RuleError(f"its inputs must have one width, found {[x.features for x in at.inputs]}")
    flow = Flow(widths.pop(), all(x.pooled for x in at.inputs))
    return Outcome(flow, _share(flow, float(flow.features * (len(at.inputs) - 1))))


def _mean_pool(at: Situation) -> Outcome:
    (x,) = at.inputs
    if x.pooled:
        raise RuleError("mean_pool wants one vector per position, found a pooled value")
    return Outcome(Flow(x.features, pooled=True), float(x.features))


def _attention(at: Situation) -> Outcome:
    if any(x.pooled for x in at.inputs):
        raise RuleError("attention wants one vector per position, found a pooled value")
    if at.settings["causal"] and at.layout is not Layout.SEQUENCE:
        raise RuleError(f"causal attention wants a sequence, found {at.layout.value}")
    query, key, value = (x.features for x in at.inputs)
    heads = at.size("heads")
    if query != key:
        raise RuleError(f"query and key must have one width, found {query} and {key}")
    if query % heads or value % heads:
        raise RuleError(f"widths must be multiples of heads = {heads}, found {query} and {value}")
    # Scores, softmax (about five operations a score) and the weighted sum, over a nominal number of positions.
    return Outcome(Flow(value), NOMINAL_EXTENT * (2.0 * query + 5.0 * heads + 2.0 * value))


def _scale(at: Situation) -> Outcome:
    (x,) = at.inputs
    init: Init = "zero" if at.settings["init"] == "zero" else "one"
    return Outcome(x, _share(x, float(x.features)), (at.parameter("weight", (x.features,), init),))


_INIT = Attribute("choice", "uniform", choices=("uniform", "zero"))
_BIAS = Attribute("flag", True)  # noqa: FBT003  # the default of a flag

OPS: Mapping[str, Op] = {
    "linear": Op(_linear, attributes={"features": Attribute("size"), "bias": _BIAS, "init": _INIT}),
    "conv": Op(
        _conv,
        attributes={
            "features": Attribute("size"),
            "kernel": Attribute("size", 3, high=15),
            "dilation": Attribute("size", 1, high=64),
            "depthwise": Attribute("flag", False),  # noqa: FBT003  # the default of a flag
            "causal": Attribute("flag", False),  # noqa: FBT003  # the default of a flag
            "bias": _BIAS,
            "init": _INIT,
        },
        layouts=(Layout.SEQUENCE, Layout.IMAGE),
        looks_ahead=lambda settings: not settings["causal"] and settings["kernel"] != 1,
    ),
    "norm": Op(_norm, attributes={"affine": Attribute("flag", True)}),  # noqa: FBT003  # the default of a flag
    "gelu": Op(_elementwise(8.0)),
    "silu": Op(_elementwise(4.0)),
    "relu": Op(_elementwise(1.0)),
    "tanh": Op(_elementwise(4.0)),
    "sigmoid": Op(_elementwise(4.0)),
    "add": Op(_join, arity=(2, 8)),
    "mul": Op(_join, arity=(2, 2)),
    "mean_pool": Op(_mean_pool, layouts=(Layout.SEQUENCE, Layout.IMAGE), looks_ahead=lambda _: True),
    "attention": Op(
        _attention,
        arity=(3, 3),
        attributes={
            "heads": Attribute("size", 1, high=64),
            "causal": Attribute("flag", False),  # noqa: FBT003  # the default of a flag
        },
        layouts=(Layout.SEQUENCE, Layout.IMAGE),
        looks_ahead=lambda settings: not settings["causal"],
    ),
    "scale": Op(_scale, attributes={"init": Attribute("choice", "one", choices=("one", "zero"))}),
}
"""Every operation by name."""
