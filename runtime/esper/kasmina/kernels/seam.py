"""What passes from a compiled forward to its backward: tensors alone, each with extents that an input shows.

A cut through a joint graph leaves values of three kinds on the backward's side. Inputs of the forward, and views of
them, are not handed over but given again. Values that were computed leave the forward in the order in which they lie in
memory, with products of extents taken apart, because a package takes tensors that are dense and whose extents are each
one free number. Sizes are read off the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]  # ships no types
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from esper.mesh.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Seam", "answer_with", "outputs_of"]

Sizes = dict[sympy.Symbol, Any]
View = Callable[[Tensor, Sizes], Tensor]


@dataclass(frozen=True, slots=True)
class Saved:
    """A value between the halves: how it leaves the forward and how the backward sees it again."""

    shape: tuple[Any, ...]
    """As inside the graphs, in expressions."""
    order: tuple[int, ...]
    """Its dimensions from the outermost in memory to the innermost."""
    factors: tuple[Any, ...]
    """Extents on the way: those of the ordered dimensions, products taken apart, so that each is one free extent."""
    dense: bool
    """Whether the ordered dimensions lie in memory without gaps. Found out once: asked of a tensor with symbolic
    extents the question may become a condition on the input."""

    @classmethod
    def of(cls, fake: Tensor) -> Saved:
        shape = tuple(_expression(size) for size in fake.shape)
        strides = [_hint(stride) for stride in fake.stride()]
        order = tuple(sorted(range(len(shape)), key=lambda dim: -strides[dim]))
        factors: list[Any] = []
        for dim in order:
            factors += shape[dim].as_ordered_factors() if shape[dim].is_Mul else [shape[dim]]
        return cls(shape, order, tuple(factors), _dense(fake.permute(order)))

    def leave(self, value: Tensor, sizes: Sizes) -> Tensor:
        """The value in the order of memory, products taken apart."""
        ordered = value.permute(self.order) if list(self.order) != sorted(self.order) else value
        if not self.dense:
            ordered = ordered.contiguous()
        if len(self.factors) == len(self.shape):
            return ordered
        # Not `view`: merging and parting dimensions with it gives strides of which torch cannot say that they fit.
        return ordered.as_strided(_evaluated(self.factors, sizes), _evaluated(_strides(self.factors), sizes))

    def enter(self, value: Tensor, sizes: Sizes) -> Tensor:
        """The value with the shape that it has inside the graphs."""
        ordered = value
        if len(self.factors) != len(self.shape):
            shape = [self.shape[dim] for dim in self.order]
            ordered = value.as_strided(_evaluated(shape, sizes), _evaluated(_strides(shape), sizes))
        back = [self.order.index(dim) for dim in range(len(self.order))]
        return ordered.permute(back) if back != sorted(back) else ordered

    def dynamic(self, by_symbol: Mapping[sympy.Symbol, Any]) -> dict[int, Any]:
        """The free extents on the way."""
        found = {}
        for dim, factor in enumerate(self.factors):
            if factor.is_Integer:
                continue
            symbols = list(factor.free_symbols)
            offset = factor - symbols[0] if len(symbols) == 1 else None
            if offset is None or not offset.is_Integer:
                raise InternalError(
                    f"a value between forward and backward has the extent {factor}, which no input shows",
                    reason="NOT_PARTITIONED",
                )
            found[dim] = by_symbol[symbols[0]] + int(offset) if offset else by_symbol[symbols[0]]
        return found


class Seam:
    """What passes from the forward to the backward, and how."""

    def __init__(self, forward: fx.GraphModule, backward: fx.GraphModule, symbols: Mapping[sympy.Symbol, int]) -> None:
        self.symbols = dict(symbols)
        inputs = [node for node in forward.graph.nodes if node.op == "placeholder"]
        delta = outputs_of(forward)[0]
        by_name = {node.name: node for node in forward.graph.nodes}
        kept: dict[fx.Node, int] = {}
        self.saved: list[Saved] = []
        self._ways: list[tuple[str, Any]] = []
        recalled: dict[int, None] = {}
        for placeholder in (node for node in backward.graph.nodes if node.op == "placeholder"):
            value = placeholder.meta["val"]
            if placeholder.name.startswith("tangents"):
                self._ways.append(("grad", None))
            elif not isinstance(value, Tensor):
                self._ways.append(("size", _expression(value)))
            else:
                base, steps = _base(by_name[placeholder.name])
                if base.op == "placeholder":
                    recalled[inputs.index(base)] = None
                    self._ways.append(("recalled", (inputs.index(base), steps)))
                    continue
                if base not in kept:
                    kept[base] = len(kept)
                    self.saved.append(Saved.of(base.meta["val"]))
                self._ways.append(("saved", (kept[base], steps)))
        answer_with(forward, [delta, *kept])
        self.recalled = tuple(sorted(recalled))
        self.delta_dense = _dense(delta.meta["val"])
        self.grads_dense = [_dense(node.meta["val"]) for node in outputs_of(backward)]

    def sizes(self, shown: Tensor) -> Sizes:
        """The free extents, as the input or the gradient shows them."""
        return {symbol: shown.shape[dim] for symbol, dim in self.symbols.items()}

    def arguments(self, grad: Tensor, rest: Sequence[Tensor]) -> list[Any]:
        """Those of the backward graph, in its order."""
        sizes = self.sizes(grad)
        held = dict(zip(self.recalled, rest[: len(self.recalled)], strict=True))
        saved = rest[len(self.recalled) :]
        found: list[Any] = []
        for kind, what in self._ways:
            if kind == "grad":
                found.append(grad)
            elif kind == "size":
                found += _evaluated([what], sizes)
            else:
                at, steps = what
                value = held[at] if kind == "recalled" else self.saved[at].enter(saved[at], sizes)
                for step in steps:
                    value = step(value, sizes)
                found.append(value)
        return found


def outputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes that a graph answers with."""
    answer: Any = graph.graph.output_node().args[0]
    return list(answer)


def answer_with(graph: fx.GraphModule, results: Sequence[fx.Node]) -> None:
    """Have a graph answer with these nodes."""
    graph.graph.output_node().args = (tuple(results),)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _base(node: fx.Node) -> tuple[fx.Node, list[View]]:
    """What a value is only another view of, and the way from there: a view costs nothing to take again."""
    steps: list[View] = []
    while node.op != "placeholder" and isinstance(node.target, OpOverload) and node.target.is_view:
        step = _view(node)
        if step is None:
            break
        steps.append(step)
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node, steps[::-1]


def _view(node: fx.Node) -> View | None:
    """Takes a view again; None for one of a kind whose arguments are values of the graph."""
    target: Any = node.target
    if target is torch.ops.aten.view.default:
        shape = [_expression(size) for size in node.meta["val"].shape]
        return lambda value, sizes: value.view(_evaluated(shape, sizes))
    if len(node.all_input_nodes) != 1:
        return None
    arguments, keywords = node.args[1:], dict(node.kwargs)
    return lambda value, _sizes: target(value, *arguments, **keywords)


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _strides(shape: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    strides = [sympy.Integer(1)]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def _dense(fake: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(fake.shape), reversed(fake.stride()), strict=True):
        if _hint(size) != 1 and _hint(stride) != expected:
            return False
        expected *= _hint(size)
    return True


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _evaluated(expressions: Sequence[sympy.Expr], sizes: Sizes) -> list[Any]:
    """Extents as numbers, or as symbols while torch traces."""
    symbols = list(sizes)
    return [
        int(one) if one.is_Integer else sympy.lambdify(symbols, one, modules=[{}])(*sizes.values())
        for one in expressions
    ]
