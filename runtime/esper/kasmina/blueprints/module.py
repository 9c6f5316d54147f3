"""A planned blueprint as a plain ``torch.nn.Module``: the eager reference that every compiled kernel is judged against.

The module is a pure function of its input and its parameters: no buffers, no dropout, no difference between train and
eval. Shapes: vector (N, C), sequence (N, T, C), image (N, C, H, W), C being ``in_features`` and then ``out_features``::

    module = BlueprintModule(blueprint.check(signature), seed=0)
    delta = module(x)
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from torch import Tensor, nn

from esper.kasmina.blueprints.ir import INPUT
from esper.kasmina.blueprints.ops import NORM_MIN_FEATURES
from esper.kasmina.signature import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from esper.kasmina.blueprints.ops import ParameterSpec
    from esper.kasmina.blueprints.plan import Plan, PlannedNode

__all__ = [
    "FUNCTIONS",
    "BlueprintModule",
    "Call",
    "ParameterGroup",
    "in_order",
    "initial_parameters",
    "interpret",
    "register",
    "torch_dtype",
]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a signature's dtype name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def initial_parameters(plan: Plan, seed: int) -> dict[str, Tensor]:
    """Parameters at birth by name, a deterministic function of the plan and the seed, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch_dtype(plan.signature.dtype)
    return {spec.name: _initial(spec, generator).to(dtype) for spec in plan.parameter_specs}


def _initial(spec: ParameterSpec, generator: torch.Generator) -> Tensor:
    if spec.init == "zero":
        return torch.zeros(spec.shape)
    if spec.init == "one":
        return torch.ones(spec.shape)
    return (torch.rand(spec.shape, generator=generator) * 2 - 1) * spec.bound


class ParameterGroup(nn.Module):
    """Holds the parameters of one node, so that they are named ``node.weight`` and ``node.bias``."""

    def extra_repr(self) -> str:
        """Names and shapes of the parameters."""
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())


def register(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Give a module parameters by dotted name (copies), one `ParameterGroup` per node."""
    for name, value in parameters.items():
        group, leaf = name.rsplit(".", 1)
        if not hasattr(module, group):
            module.add_module(group, ParameterGroup())
        module.get_submodule(group).register_parameter(leaf, nn.Parameter(value.detach().clone()))


class BlueprintModule(nn.Module):
    """Interprets a plan node by node.

    Args:
        plan: the blueprint at a signature.
        seed: of the random parameters; ignored where `parameters` are given.
        parameters: values by name, copied.
    """

    def __init__(self, plan: Plan, *, seed: int = 0, parameters: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.plan = plan
        values = initial_parameters(plan, seed) if parameters is None else parameters
        register(self, {spec.name: values[spec.name] for spec in plan.parameter_specs})

    def forward(self, x: Tensor) -> Tensor:
        """``delta(x)``; the extents of `x` other than its features are kept."""
        held = {name: group._parameters for name, group in self._modules.items() if group is not None}  # noqa: SLF001  # keeps its order and its None
        return interpret(self.plan, held, x)


def interpret(plan: Plan, parameters: Mapping[str, Mapping[str, Tensor | None]], x: Tensor) -> Tensor:
    """``delta(x)`` of a plan, node by node.

    Args:
        plan: what to compute.
        parameters: by the name of their node, and then by their own.
        x: the input.
    """
    values, layout = {INPUT: in_order(x)}, plan.signature.layout
    for n in plan.nodes:
        held = parameters.get(n.name, _NONE)
        inputs = [values[name] for name in n.inputs]
        values[n.name] = FUNCTIONS[n.op](Call(n, layout, inputs, held.get("weight"), held.get("bias")))
    return values[plan.nodes[-1].name]


def in_order(x: Tensor) -> Tensor:
    """`x`, copied to the order of its dimensions in memory where it is in another.

    On the CPU the backward of group_norm in torch 2.13 ends the process for an input in channels-last order that needs
    no gradient, as images have none.
    """
    # Asked first, so that traces of ordered inputs hold no copy.
    return x if x.is_contiguous() else x.contiguous()


_NONE: Mapping[str, Tensor | None] = MappingProxyType({})


class Call(NamedTuple):
    """One node about to be computed."""

    node: PlannedNode
    layout: Layout
    inputs: list[Tensor]
    weight: Tensor | None
    bias: Tensor | None

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.inputs[0]

    @property
    def held_weight(self) -> Tensor:
        """The weight of an operation that always has one."""
        assert self.weight is not None
        return self.weight


def _linear(at: Call) -> Tensor:
    if at.layout is Layout.IMAGE:
        return F.conv2d(at.x, at.held_weight, at.bias)
    return F.linear(at.x, at.held_weight, at.bias)


def _conv(at: Call) -> Tensor:
    settings = at.node.settings
    dilation = int(settings["dilation"])
    groups = at.node.flow.features if settings["depthwise"] else 1
    reach = dilation * (int(settings["kernel"]) - 1)
    if at.layout is Layout.IMAGE:
        return F.conv2d(at.x, at.held_weight, at.bias, padding=reach // 2, dilation=dilation, groups=groups)
    # All of the padding goes before the first position where later ones must stay unseen.
    left = reach if settings["causal"] else reach // 2
    x_ncl = F.pad(at.x.transpose(1, 2), (left, reach - left))
    return F.conv1d(x_ncl, at.held_weight, at.bias, dilation=dilation, groups=groups).transpose(1, 2)


def _norm(at: Call) -> Tensor:
    features, image = at.node.flow.features, at.layout is Layout.IMAGE
    if features >= NORM_MIN_FEATURES:
        if image:
            return F.group_norm(at.x, 1, at.weight, at.bias)
        return F.layer_norm(at.x, (features,), at.weight, at.bias)
    dims = (1, 2, 3) if image else (-1,)
    normed = at.x * torch.rsqrt(1 + at.x.square().mean(dims, keepdim=True))
    if at.weight is None or at.bias is None:
        return normed
    shape = (1, -1, 1, 1) if image else (-1,)
    return normed * at.weight.view(shape) + at.bias.view(shape)


def _activation(function: Callable[[Tensor], Tensor]) -> Callable[[Call], Tensor]:
    def apply(at: Call) -> Tensor:
        return function(at.x)

    return apply


def _add(at: Call) -> Tensor:
    total = at.x
    for value in at.inputs[1:]:
        total = total + value
    return total


def _mul(at: Call) -> Tensor:
    return at.inputs[0] * at.inputs[1]


def _mean_pool(at: Call) -> Tensor:
    return at.x.mean((2, 3) if at.layout is Layout.IMAGE else (1,), keepdim=True)


def _attention(at: Call) -> Tensor:
    image, heads = at.layout is Layout.IMAGE, int(at.node.settings["heads"])
    tokens = [x.flatten(2).transpose(1, 2) if image else x for x in at.inputs]
    q, k, v = (x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2) for x in tokens)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=bool(at.node.settings["causal"]))
    joined = mixed.transpose(1, 2).flatten(2)
    return joined.transpose(1, 2).reshape(*joined.shape[::2], *at.x.shape[2:]) if image else joined


def _scale(at: Call) -> Tensor:
    return at.x * (at.held_weight.view(1, -1, 1, 1) if at.layout is Layout.IMAGE else at.held_weight)


FUNCTIONS: Mapping[str, Callable[[Call], Tensor]] = {
    "linear": _linear,
    "conv": _conv,
    "norm": _norm,
    "gelu": _activation(F.gelu),
    "silu": _activation(F.silu),
    "relu": _activation(F.relu),
    "tanh": _activation(torch.tanh),
    "sigmoid": _activation(torch.sigmoid),
    "add": _add,
    "mul": _mul,
    "mean_pool": _mean_pool,
    "attention": _attention,
    "scale": _scale,
}
"""The torch function of every operation in `esper.kasmina.blueprints.ops.OPS`."""
