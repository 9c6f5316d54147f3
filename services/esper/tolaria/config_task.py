"""The sections of a configuration that say what learns what: data and hosts, and how every section refuses a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from esper.mesh.errors import InvalidInput

__all__ = [
    "MAX_CONTEXT",
    "Cifar10Data",
    "ConvHost",
    "Data",
    "DigitsData",
    "Host",
    "ResidualHost",
    "StdlibData",
    "TransformerHost",
    "at_least",
    "fraction",
    "need",
]


MAX_CONTEXT = 256
"""Positions that a transformer host can tell apart."""


def need(condition: bool, text: str, path: str) -> None:
    """Refuse a configuration with one sentence."""
    if not condition:
        raise InvalidInput(text, reason="OVERRIDE_INVALID", metadata={"path": path})


def fraction(value: float, path: str) -> None:
    """Between 0 and 1, both excluded."""
    need(0.0 < value < 1.0, f"{path}: expected a fraction between 0 and 1, both excluded, found {value}", path)


def at_least(value: float, least: float, path: str) -> None:
    """Not below."""
    need(value >= least, f"{path}: expected at least {least}, found {value}", path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsData:
    """scikit-learn's bundled 1,797 images of digits, 8 x 8 pixels, in three parts with equal shares of each class."""

    kind: Literal["digits"] = "digits"
    """Which data; constant."""
    validation_fraction: float = 0.2
    """Share of the images that decisions are made on."""
    test_fraction: float = 0.25
    """Share of the images that are touched once, at the very end."""
    split_seed: int = 20261123
    """Seed of the split; the same for every run, so that runs are comparable."""
    batch_size: int = 64
    """Images per optimizer step."""
    eval_batch_size: int = 32
    """Images per validation batch; counterfactuals are paired over these batches, so there should be ten or more."""
    shift_pixels: int = 1
    """Each training image is moved by up to this many pixels in each direction, at random; 0 for none."""

    def __post_init__(self) -> None:
        fraction(self.validation_fraction, "data.validation_fraction")
        fraction(self.test_fraction, "data.test_fraction")
        total = self.validation_fraction + self.test_fraction
        need(
            total < 0.9,
            "data: validation_fraction and test_fraction must leave at least a tenth for training, found "
            f"{total:.2f} in all",
            "data.test_fraction",
        )
        _batches(self.batch_size, self.eval_batch_size)
        need(
            0 <= self.shift_pixels <= 3,
            f"data.shift_pixels: expected 0 to 3, found {self.shift_pixels}",
            "data.shift_pixels",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StdlibData:
    """The source of the Python standard library of the interpreter that trains, as bytes; files are split by path."""

    kind: Literal["stdlib"] = "stdlib"
    """Which data; constant."""
    dir: str = ""
    """Folder of the sources; empty for the running interpreter's own. Digests of the text stand in the report."""
    validation_fraction: float = 0.1
    """Share of the files that decisions are made on."""
    test_fraction: float = 0.1
    """Share of the files that are touched once, at the very end."""
    max_bytes: int = 4_000_000
    """Bytes of source read at most, whole files in the order of the digest of their path; bounds memory and time."""
    context: int = 64
    """Bytes per sample; at most `MAX_CONTEXT`."""
    batch_size: int = 16
    """Samples per optimizer step."""
    eval_batch_size: int = 32
    """Samples per validation batch."""
    eval_batches: int = 16
    """Batches of the validation and of the test set: evenly spaced windows, the same at every boundary."""
    steps_per_epoch: int = 200
    """Random windows have no natural epoch; this many steps are called one."""

    def __post_init__(self) -> None:
        fraction(self.validation_fraction, "data.validation_fraction")
        fraction(self.test_fraction, "data.test_fraction")
        at_least(self.max_bytes, 10_000, "data.max_bytes")
        need(
            2 <= self.context <= MAX_CONTEXT,
            f"data.context: expected 2 to {MAX_CONTEXT}, found {self.context}",
            "data.context",
        )
        at_least(self.eval_batches, 2, "data.eval_batches")
        at_least(self.steps_per_epoch, 1, "data.steps_per_epoch")
        _batches(self.batch_size, self.eval_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cifar10Data:
    """CIFAR-10 in its binary format (``cifar-10-batches-bin``): five training files and a test file, 32 x 32 colour."""

    kind: Literal["cifar10"] = "cifar10"
    """Which data; constant."""
    dir: str = ""
    """Folder that holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, or the folder above it."""
    validation_images: int = 5_000
    """Images taken from the end of a fixed shuffle of the training files; decisions are made on them."""
    split_seed: int = 20261123
    """Seed of that shuffle; the same for every run."""
    batch_size: int = 128
    """Images per optimizer step."""
    eval_batch_size: int = 250
    """Images per validation batch."""
    shift_pixels: int = 4
    """Each training image is moved by up to this many pixels in each direction, at random; 0 for none."""
    flip: bool = True
    """Half of the training images are mirrored, at random."""

    def __post_init__(self) -> None:
        at_least(self.validation_images, 1, "data.validation_images")
        need(
            0 <= self.shift_pixels <= 8,
            f"data.shift_pixels: expected 0 to 8, found {self.shift_pixels}",
            "data.shift_pixels",
        )
        _batches(self.batch_size, self.eval_batch_size)


def _batches(train: int, evaluate: int) -> None:
    at_least(train, 1, "data.batch_size")
    at_least(evaluate, 1, "data.eval_batch_size")


Data = DigitsData | StdlibData | Cifar10Data
"""Every kind of data; `kind` tells which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvHost:
    """A small convolutional network for 8 x 8 images: stem, a body with a narrow middle, a linear head."""

    kind: Literal["conv"] = "conv"
    """Which host; constant."""
    stem_channels: int = 8
    """Channels after the first convolution."""
    narrow_channels: int = 4
    """Channels in the middle of the body: the part that is too narrow, on purpose or not."""
    body_channels: int = 12
    """Channels after the body."""
    pooled_extent: int = 2
    """Height and width left for the head: 1 averages over the whole image, 2 keeps the quarters apart."""

    def __post_init__(self) -> None:
        for name in ("stem_channels", "narrow_channels", "body_channels"):
            at_least(getattr(self, name), 1, f"host.{name}")
        need(
            self.pooled_extent in {1, 2},
            f"host.pooled_extent: expected 1 or 2, found {self.pooled_extent}",
            "host.pooled_extent",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerHost:
    """A small causal transformer over bytes: embedding, blocks of attention and feed-forward, tied to 256 symbols."""

    kind: Literal["transformer"] = "transformer"
    """Which host; constant."""
    width: int = 32
    """Features per position."""
    depth: int = 2
    """Blocks."""
    heads: int = 2
    """Attention heads; must divide `width`."""
    feed_forward: int = 64
    """Features inside the feed-forward part of a block."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "feed_forward"):
            at_least(getattr(self, name), 1, f"host.{name}")
        need(
            self.width % self.heads == 0,
            f"host.heads: expected a divisor of host.width ({self.width}), found {self.heads}",
            "host.heads",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualHost:
    """A small residual network for 32 x 32 colour images: three stages of two-convolution blocks."""

    kind: Literal["residual"] = "residual"
    """Which host; constant."""
    channels: int = 8
    """Channels of the first stage; doubled at each later one."""
    blocks: int = 1
    """Residual blocks per stage."""

    def __post_init__(self) -> None:
        at_least(self.channels, 1, "host.channels")
        at_least(self.blocks, 1, "host.blocks")


Host = ConvHost | TransformerHost | ResidualHost
"""Every kind of host; `kind` tells which."""
