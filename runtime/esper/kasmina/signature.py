"""What a kernel maps from and to: the part of a tensor's shape that a compiled module is specific to.

A site and a kernel fit each other when their signatures are equal. Batch, sequence and spatial extents are free::

    Signature(Layout.IMAGE, in_features=16, out_features=32)   # (N, 16, H, W) -> (N, 32, H, W)
    str(signature)                                             # "image:16->32:float32"
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from esper.mesh.errors import InvalidInput

__all__ = ["FLOAT_DTYPES", "MAX_FEATURES", "Layout", "Signature"]

FLOAT_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})
MAX_FEATURES = 1 << 20
_TEXT = re.compile(r"(?P<layout>[a-z]+):(?P<in_>\d+)->(?P<out>\d+):(?P<dtype>[a-z0-9]+)")


class Layout(StrEnum):
    """Order of the dimensions of an activation."""

    VECTOR = "vector"
    """(N, C)"""
    SEQUENCE = "sequence"
    """(N, T, C)"""
    IMAGE = "image"
    """(N, C, H, W)"""

    @property
    def rank(self) -> int:
        """Number of dimensions, the batch included."""
        return {"vector": 2, "sequence": 3, "image": 4}[self.value]

    @property
    def feature_dim(self) -> int:
        """Index of the feature (channel) dimension."""
        return {"vector": 1, "sequence": 2, "image": 1}[self.value]


@dataclass(frozen=True, slots=True, order=True)
class Signature:
    """Layout, feature widths and dtype of a module ``delta: x -> y``; every other extent is dynamic.

    Raises:
        InvalidInput: a width outside 1..2**20 or a dtype that is not a floating-point type.
    """

    layout: Layout
    in_features: int
    """Width of the feature dimension of the input."""
    out_features: int
    """Width of the feature dimension of the output."""
    dtype: str = "float32"
    """Element type of input, output and parameters."""

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            width = getattr(self, name)
            if not 1 <= width <= MAX_FEATURES:
                raise InvalidInput(f"signature {name}: expected 1 to {MAX_FEATURES}, found {width}")
        if self.dtype not in FLOAT_DTYPES:
            raise InvalidInput(f"signature dtype: expected one of {sorted(FLOAT_DTYPES)}, found {self.dtype!r}")

    def __str__(self) -> str:
        return f"{self.layout.value}:{self.in_features}->{self.out_features}:{self.dtype}"

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Read the form that ``str()`` writes.

        Raises:
            InvalidInput: the text has another form, or its parts are out of bounds.
        """
        match = _TEXT.fullmatch(text)
        if match is None or match["layout"] not in set(Layout):
            raise InvalidInput(f"signature: expected like 'image:16->32:float32', found {text!r}")
        return cls(Layout(match["layout"]), int(match["in_"]), int(match["out"]), match["dtype"])
