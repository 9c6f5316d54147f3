"""Which tensor of a host's module counts, how it maps to the canonical order of a layout, and back.

Legend: N batch, C features, T positions, H W height and width, D depth or time.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from esper.kasmina.signature import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["MAX_RANK", "Port", "first_tensor", "fit", "output_tensor", "replace_first", "why_no_tensor"]

MAX_RANK = 5
"""Dimensions that a tensor may have where a seed stands: volumes and videos have the most."""
_BY_RANK = {2: Layout.VECTOR, 3: Layout.SEQUENCE, 4: Layout.IMAGE, 5: Layout.IMAGE}
_MAX_DEPTH = 4
"""Containers inside containers in which an output's tensor is looked for."""


@dataclass(frozen=True, slots=True)
class Port:
    """Where batch and features stand in a tensor of the host; the other dimensions keep their order.

    ``Port(Layout.SEQUENCE, feature_dim=1)`` is (N, C, T) of a one-dimensional convolution, ``Port(Layout.IMAGE, 3)`` an
    image with channels last, ``Port(Layout.SEQUENCE, 2, batch_dim=1)`` is (T, N, C), ``Port(Layout.IMAGE, 1, folds=1)``
    a volume (N, C, D, H, W), which a kernel sees as the image (N, C, D, H * W).
    """

    layout: Layout
    feature_dim: int
    batch_dim: int = 0
    folds: int = 0
    """Dimensions beyond those of the layout; their positions are folded into its last dimension."""

    @classmethod
    def of_rank(cls, rank: int, *, features_last: bool, batch_dim: int = 0) -> Port:
        """The port of a tensor of 2 to `MAX_RANK` dimensions."""
        layout = _BY_RANK[rank]
        return cls(layout, rank - 1 if features_last or rank == 2 else 1, batch_dim, rank - layout.rank)

    @property
    def _order(self) -> tuple[int, ...]:
        rank = self.layout.rank + self.folds
        order = [self.batch_dim, *(d for d in range(rank) if d not in {self.batch_dim, self.feature_dim})]
        order.insert(self.layout.feature_dim, self.feature_dim)
        return tuple(order)

    def ordered(self, x: Tensor) -> Tensor:
        """A view in the order of the layout, nothing folded: (N, C, D, H, W) for a volume."""
        order = self._order
        return x if order == tuple(range(len(order))) else x.permute(order)

    def fold(self, x: Tensor) -> Tensor:
        """The dimensions of an `ordered` x beyond those of the layout, folded into its last one."""
        last = self.layout.rank - 1
        return x.flatten(last) if x.dim() > self.layout.rank else x

    def canonical(self, x: Tensor) -> Tensor:
        """In the order of the layout: (N, C), (N, T, C) or (N, C, H, W); a view where nothing is folded."""
        return self.fold(self.ordered(x))

    def restore(self, x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The inverse of `canonical`.

        Args:
            x: in the order of the layout.
            shape: of the host's tensor; asked for where something is folded.
        """
        order = self._order
        if self.folds:
            assert shape is not None
            last = self.layout.rank - 1
            x = x.reshape(*x.shape[:last], *self.ordered_shape(shape)[last:])
        if order == tuple(range(len(order))):
            return x
        return x.permute(tuple(order.index(d) for d in range(len(order))))

    def ordered_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` in the order of the layout, nothing folded."""
        return tuple(shape[d] for d in self._order)

    def canonical_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` in the order of the layout."""
        found, last = self.ordered_shape(shape), self.layout.rank - 1
        return (*found[:last], torch.Size(found[last:]).numel())

    def extent(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Positions of a tensor of `shape`, nothing folded: (), (T,), (H, W) or (D, H, W)."""
        found = list(self.ordered_shape(shape))
        del found[self.layout.feature_dim]
        return tuple(found[1:])

    def document(self) -> list[Any]:
        """As JSON types."""
        return [self.layout.value, self.feature_dim, self.batch_dim, self.folds]

    @classmethod
    def from_document(cls, document: list[Any]) -> Port:
        """Read `document`."""
        return cls(Layout(document[0]), *(int(number) for number in document[1:]))


def fit(x: Tensor, source: Layout, target: Layout, extent: tuple[int, ...]) -> Tensor:
    """Bring an ordered `x` to the layout and extent of `y`: average pooling down, nearest neighbour up.

    Args:
        x: in the order of `source`, nothing folded.
        source: layout of `x`.
        target: layout of `y`; VECTOR, or that of `x`.
        extent: positions of `y`: (), (T,), (H, W) or (D, H, W).
    """
    if target is Layout.VECTOR:
        if source is Layout.VECTOR:
            return x
        return x.mean(dim=1 if source is Layout.SEQUENCE else tuple(range(2, x.dim())))
    if target is Layout.SEQUENCE:
        if x.shape[1] == extent[0]:
            return x
        return _resize(x.transpose(1, 2), extent).transpose(1, 2)
    return x if tuple(x.shape[2:]) == extent else _resize(x, extent)


def _resize(x: Tensor, extent: tuple[int, ...]) -> Tensor:
    if any(want > have for want, have in zip(extent, x.shape[2:], strict=True)):
        return functional.interpolate(x, size=list(extent), mode="nearest")
    pools: tuple[Callable[[Tensor, Any], Tensor], ...] = (
        functional.adaptive_avg_pool1d,
        functional.adaptive_avg_pool2d,
        functional.adaptive_avg_pool3d,
    )
    return pools[len(extent) - 1](x, extent)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that counts as a module's input: the first positional one, else the first named one.

    A module that is given none, but lists or tuples of tensors (the stages of a backbone), is given the first of these.
    Dictionaries are not looked into: which of their tensors belongs to the output is not known.
    """
    values = (*args, *kwargs.values())
    for value in values:
        if isinstance(value, Tensor):
            return value
    for value in values:
        if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
            for part in value:
                if isinstance(part, Tensor):
                    return part
    return None


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Keys and values of a container that a module may give; of anything else, none."""
    if isinstance(value, MutableMapping):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif is_dataclass(value):
        yield from ((f.name, getattr(value, f.name, None)) for f in fields(value))


def _paths(value: Any, depth: int = _MAX_DEPTH) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every tensor and packed sequence of an output with the keys that lead to it, in order."""
    if isinstance(value, Tensor | PackedSequence):
        yield (), value
    elif depth:
        for key, part in _parts(value):
            for path, found in _paths(part, depth - 1):
                yield (key, *path), found


def _path(output: Any) -> tuple[tuple[Any, ...], Any] | None:
    """Where the tensor stands that counts as an output; None where there is no tensor at all.

    It is the first of floating-point numbers with at least two dimensions: a loss in front of it does not count. Where
    none is so, it is the first, for the reason that is given then.
    """
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() >= 2:
        head = output[0]
        if head.is_floating_point():
            return (0,), head
    first = None
    for path, found in _paths(output):
        if isinstance(found, PackedSequence) or (found.is_floating_point() and found.dim() >= 2):
            return path, found
        first = first or (path, found)
    return first


def why_no_tensor(output: Any) -> str:
    """Empty where `output` is a tensor or holds one (tuple, list, dictionary, dataclass); else the reason."""
    found = _path(output)
    if found is None:
        return f"its output holds no tensor: it is {type(output).__name__}"
    if isinstance(found[1], PackedSequence):
        return "its output is a packed sequence"
    return "its output is a nested tensor" if found[1].is_nested else ""


def output_tensor(output: Any) -> Tensor:
    """The tensor of an output that `why_no_tensor` accepts."""
    if isinstance(output, Tensor):
        return output
    found = _path(output)
    assert found is not None
    assert isinstance(found[1], Tensor)
    return found[1]


def replace_first(output: Any, y: Tensor) -> Any:
    """A copy of `output` with its `output_tensor` replaced by `y`; the rest (states, attention weights) is kept."""
    if isinstance(output, Tensor):
        return y
    found = _path(output)
    assert found is not None
    return _put(output, found[0], y)


def _put(value: Any, path: tuple[Any, ...], y: Tensor) -> Any:
    if not path:
        return y
    key, rest = path[0], path[1:]
    if isinstance(value, tuple):
        parts = (*value[:key], _put(value[key], rest, y), *value[key + 1 :])
        return type(value)(*parts) if hasattr(value, "_fields") else parts
    changed = copy.copy(value)
    if isinstance(value, MutableMapping | list):
        changed[key] = _put(value[key], rest, y)
    else:
        # A frozen dataclass is as good as another: the copy is ours.
        object.__setattr__(changed, key, _put(getattr(value, key), rest, y))
    return changed


def parameter_dtype(module: nn.Module, y: torch.dtype) -> str:
    """Element type that a newborn's parameters should have: that of the site's, not that of autocast's outputs."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return str(parameter.dtype).removeprefix("torch.")
    return str(y).removeprefix("torch.")
