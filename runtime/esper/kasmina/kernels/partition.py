"""Forward and backward of a blueprint cut from one joint graph, so that the backward does not redo the forward.

``forward(x, *parameters) -> (delta, *saved)`` and ``backward(grad, *recalled, *saved) -> (grad_x, *grad_parameters)``,
where ``recalled`` are those of the forward's own inputs that the backward reads: they are kept as they are instead of
being copied out. Where torch's minimum cut decides that reading a value again from memory costs more than computing it
anew from its neighbours, elementwise work is repeated inside the kernels that need it; products, convolutions and
attention never are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from esper.kasmina.kernels.seam import Seam, answer_with, outputs_of
from esper.kasmina.kernels.tracing import ForwardFunction, anonymous, example_input, example_parameters, free, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import sympy  # type: ignore[import-untyped]  # ships no types
    from torch.export import ExportedProgram

    from esper.kasmina.blueprints.plan import Plan

__all__ = ["Cut", "Halves", "Partitioned", "cut_joint", "export_partitioned"]


class Cut(StrEnum):
    """Where the joint graph is cut."""

    MINIMUM = "minimum"
    """What is saved is least in bytes; elementwise work may be repeated in the backward."""
    EVERYTHING = "everything"
    """What autograd would save is saved; nothing is repeated."""
    NOTHING = "nothing"
    """Nothing is saved, and the backward begins with the whole forward: least memory, most work."""


@dataclass(frozen=True, slots=True)
class Halves:
    """A joint graph that was cut."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    seam: Seam


@dataclass(frozen=True, slots=True)
class Partitioned:
    """The two halves as programs for the compiler."""

    forward: ExportedProgram
    backward: ExportedProgram
    recalled: tuple[int, ...]
    """Positions among the inputs of the forward of those that the backward takes."""


def cut_joint(plan: Plan, cut: Cut, device: str = "cpu") -> Halves:
    """Trace forward and backward of a plan together and cut them."""
    with quiet():
        joint, fakes, symbols = _joint(plan, _inputs(plan, device))
        forward, backward = _CUTS[cut](joint, fakes, num_fwd_outputs=1)
    return Halves(forward, backward, Seam(forward, backward, symbols))


def export_partitioned(plan: Plan, cut: Cut = Cut.MINIMUM, device: str = "cpu") -> Partitioned:
    """Both halves as exported programs with free batch, sequence and spatial extents.

    Raises:
        InternalError: a value between the halves has extents that no input shows; reason NOT_PARTITIONED.
    """
    inputs, extents = _inputs(plan, device), free(plan)
    halves = cut_joint(plan, cut, device)
    seam = halves.seam
    by_symbol = {symbol: extents[dim] for symbol, dim in seam.symbols.items()}
    first, second = _First(halves.forward, seam), _Second(halves.backward, seam)
    static = (None,) * (len(inputs) - 1)
    with quiet():
        ahead = torch.export.export(first, tuple(inputs), dynamic_shapes=((extents, *static),))
        with torch.no_grad():
            delta, *saved = first(*inputs)
        taken = [torch.zeros_like(delta), *(inputs[index] for index in seam.recalled), *saved]
        shapes = [
            extents,
            *(extents if index == 0 else None for index in seam.recalled),
            *(value.dynamic(by_symbol) for value in seam.saved),
        ]
        back = torch.export.export(second, tuple(taken), dynamic_shapes=(tuple(shapes),))
    return Partitioned(anonymous(ahead), anonymous(back), seam.recalled)


def _inputs(plan: Plan, device: str) -> list[Tensor]:
    return [example_input(plan).to(device), *(p.to(device) for p in example_parameters(plan))]


def _joint(plan: Plan, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor], dict[sympy.Symbol, int]]:
    """The joint graph with its fake inputs, and which dimension of the input each symbol is."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    extents = free(plan)

    def fake(value: Tensor, dynamic: Mapping[int, object]) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(value.dim())]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)).requires_grad_()

    fakes = [fake(inputs[0], extents), *(fake(value, {}) for value in inputs[1:])]
    function = ForwardFunction(plan)

    def compute(*values: Tensor) -> tuple[Tensor]:
        # torch takes no outputs here that are views of what was computed on the way.
        return (function(*values).clone(),)

    with mode:
        joint = aot_export_joint_simple(compute, tuple(fakes), trace_joint=True, decompositions=select_decomp_table())
    assert isinstance(joint, fx.GraphModule)
    _without_clone(joint)
    sizes: Sequence[Any] = fakes[0].shape
    return joint, fakes, {sizes[dim].node.expr: dim for dim in extents}


def _save_nothing(
    joint: fx.GraphModule, _inputs: object, *, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A partition function like torch's own."""
    halves = []
    for keep in (slice(0, num_fwd_outputs), slice(num_fwd_outputs, None)):
        half = copy.deepcopy(joint)
        # The joint graph takes its arguments in two lists.
        half.graph.set_codegen(fx.graph.CodeGen())
        answer_with(half, outputs_of(half)[keep])
        halves.append(half)
    for unused in [n for n in halves[0].graph.nodes if n.op == "placeholder" and n.name.startswith("tangents")]:
        halves[0].graph.erase_node(unused)
    halves[0].recompile()
    return halves[0], halves[1]


_CUTS: Mapping[Cut, Callable[..., tuple[fx.GraphModule, fx.GraphModule]]] = {
    Cut.MINIMUM: min_cut_rematerialization_partition,
    Cut.EVERYTHING: default_partition,
    Cut.NOTHING: _save_nothing,
}


def _without_clone(joint: fx.GraphModule) -> None:
    cloned = outputs_of(joint)[0]
    assert cloned.target is torch.ops.aten.clone.default
    cloned.replace_all_uses_with(cloned.all_input_nodes[0])
    joint.graph.erase_node(cloned)
    joint.recompile()


class _First(nn.Module):
    def __init__(self, graph: fx.GraphModule, seam: Seam) -> None:
        super().__init__()
        self._graph = graph
        self._seam = (seam,)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        seam, outputs = self._seam[0], self._graph(*inputs)
        sizes = seam.sizes(inputs[0])
        saved = (form.leave(value, sizes) for form, value in zip(seam.saved, outputs[1:], strict=True))
        return (outputs[0] if seam.delta_dense else outputs[0].contiguous(), *saved)


class _Second(nn.Module):
    def __init__(self, graph: fx.GraphModule, seam: Seam) -> None:
        super().__init__()
        self._graph = graph
        self._seam = (seam,)

    def forward(self, *taken: Tensor) -> tuple[Tensor, ...]:
        grads = self._graph(*self._seam[0].arguments(taken[0], taken[1:]))
        dense = self._seam[0].grads_dense
        return tuple(grad if one else grad.contiguous() for grad, one in zip(grads, dense, strict=True))
