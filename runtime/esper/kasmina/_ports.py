"""How the tensors of a host map to the canonical order of a layout, and back.

Legend: N batch, C features, T positions, H W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from esper.kasmina.signature import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Port", "first_tensor", "fit", "replace_first", "why_no_tensor"]

_BY_RANK = {2: Layout.VECTOR, 3: Layout.SEQUENCE, 4: Layout.IMAGE}


@dataclass(frozen=True, slots=True)
class Port:
    """Where batch and features stand in a tensor of the host; the other dimensions keep their order.

    ``Port(Layout.SEQUENCE, feature_dim=1)`` is (N, C, T) of a one-dimensional convolution, ``Port(Layout.IMAGE, 3)`` an
    image with channels last, ``Port(Layout.SEQUENCE, 2, batch_dim=1)`` is (T, N, C).
    """

    layout: Layout
    feature_dim: int
    batch_dim: int = 0

    @classmethod
    def of_rank(cls, rank: int, *, features_last: bool, batch_dim: int = 0) -> Port:
        """The port of a tensor of 2 to 4 dimensions."""
        return cls(_BY_RANK[rank], rank - 1 if features_last or rank == 2 else 1, batch_dim)

    @property
    def _order(self) -> tuple[int, ...]:
        rest = [d for d in range(self.layout.rank) if d not in {self.batch_dim, self.feature_dim}]
        order = [self.batch_dim, *rest]
        order.insert(self.layout.feature_dim, self.feature_dim)
        return tuple(order)

    def canonical(self, x: Tensor) -> Tensor:
        """A view in the order of the layout: (N, C), (N, T, C) or (N, C, H, W)."""
        order = self._order
        return x if order == tuple(range(len(order))) else x.permute(order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        order = self._order
        if order == tuple(range(len(order))):
            return x
        return x.permute(tuple(order.index(d) for d in range(len(order))))

    def canonical_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` in the order of the layout."""
        return tuple(shape[d] for d in self._order)

    def document(self) -> list[Any]:
        """As JSON types."""
        return [self.layout.value, self.feature_dim, self.batch_dim]

    @classmethod
    def from_document(cls, document: list[Any]) -> Port:
        """Read `document`."""
        return cls(Layout(document[0]), int(document[1]), int(document[2]))


def fit(x: Tensor, source: Layout, target: Layout, extent: tuple[int, ...]) -> Tensor:
    """Bring a canonical `x` to the layout and extent of `y`: average pooling down, nearest neighbour up.

    Args:
        x: in the order of `source`.
        source: layout of `x`.
        target: layout of `y`; VECTOR, or that of `x`.
        extent: positions of `y`: (), (T,) or (H, W).
    """
    if target is Layout.VECTOR:
        return x if source is Layout.VECTOR else x.mean(dim=1 if source is Layout.SEQUENCE else (2, 3))
    if target is Layout.SEQUENCE:
        if x.shape[1] == extent[0]:
            return x
        return _resize(x.transpose(1, 2), extent).transpose(1, 2)
    return x if tuple(x.shape[2:]) == extent else _resize(x, extent)


def _resize(x: Tensor, extent: tuple[int, ...]) -> Tensor:
    if any(want > have for want, have in zip(extent, x.shape[2:], strict=True)):
        return functional.interpolate(x, size=list(extent), mode="nearest")
    if len(extent) == 1:
        return functional.adaptive_avg_pool1d(x, extent)
    return functional.adaptive_avg_pool2d(x, (extent[0], extent[1]))


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that counts as a module's input: the first positional one, else the first named one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def why_no_tensor(output: Any) -> str:
    """Empty where `output` is a tensor, or a tuple that begins with one; else the reason."""
    packed = (output, output[0]) if isinstance(output, tuple) and output else (output,)
    if any(isinstance(part, PackedSequence) for part in packed):
        return "its output is a packed sequence"
    if isinstance(output, Tensor) or (isinstance(output, tuple) and output and isinstance(output[0], Tensor)):
        head = output if isinstance(output, Tensor) else output[0]
        return "its output is a nested tensor" if head.is_nested else ""
    return f"its output is no tensor and no tuple that begins with one, but {type(output).__name__}"


def output_tensor(output: Any) -> Tensor:
    """The tensor of an output that `why_no_tensor` accepts."""
    head = output if isinstance(output, Tensor) else output[0]
    assert isinstance(head, Tensor)
    return head


def replace_first(output: Any, y: Tensor) -> Any:
    """`output` with its tensor replaced by `y`; the rest of a tuple (states, attention weights) is kept."""
    if isinstance(output, Tensor):
        return y
    rest = (y, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else rest


def parameter_dtype(module: nn.Module, y: torch.dtype) -> str:
    """Element type that a newborn's parameters should have: that of the site's, not that of autocast's outputs."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return str(parameter.dtype).removeprefix("torch.")
    return str(y).removeprefix("torch.")
