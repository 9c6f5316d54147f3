"""What a trainer asks of data, and what the kinds of data share: seeded orders, image shifts, batches.

Shapes: images x_NCHW float32, labels y_N int64; text x_NT and y_NT int64 (bytes, the target one position ahead).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batch", "Dataset", "ImageDataset", "cut", "generator", "shifted"]

Batch = tuple["Tensor", "Tensor"]
"""Inputs and targets."""


class Dataset(Protocol):
    """Training batches by position, and the two held-out sets."""

    steps_per_epoch: int
    """Training batches in an epoch."""
    sizes: dict[str, int]
    """Samples per part: train, validation, test."""
    digest: str
    """Of the raw data, ``sha256:...``: two runs with equal digests were given the same data."""

    def train_batch(self, epoch: int, index: int) -> Batch:
        """The `index`-th batch of an epoch, both counted from 0; a pure function of the two and the seed."""

    def validation(self) -> list[Batch]:
        """The batches that decisions are made on; the same at every call."""

    def test(self) -> list[Batch]:
        """The batches that are touched once, after training."""


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on nothing but its key."""
    raw = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(raw[:7], "big"))


def cut(x: Tensor, y: Tensor, size: int) -> list[Batch]:
    """A set as consecutive batches of `size`, the last one shorter."""
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


def shifted(x_NCHW: Tensor, reach: int, random: torch.Generator, fill: float) -> Tensor:  # noqa: N803  # shape suffix
    """Each image moved by -reach to +reach pixels in each direction, the gap filled with `fill`."""
    if reach == 0:
        return x_NCHW
    count, _, height, width = x_NCHW.shape
    padded = F.pad(x_NCHW, (reach,) * 4, value=fill)
    offset = torch.randint(0, 2 * reach + 1, (2, count), generator=random)
    rows = (offset[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (offset[1][:, None] + torch.arange(width))[:, None, None, :]
    channels = torch.arange(x_NCHW.shape[1])[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], channels, rows, columns]


class ImageDataset:
    """Images with labels in three parts; shuffled anew in each epoch.

    Args:
        train: images and labels to learn from.
        validation: to decide on.
        test: to touch once.
        batch_size: images per training batch; an incomplete last batch is left out, so that all steps weigh the same.
        eval_batch_size: images per held-out batch.
        seed: of order and augmentation.
        digest: of the raw data.

    Raises:
        ValueError: fewer training images than one batch.
    """

    def __init__(
        self,
        train: Batch,
        validation: Batch,
        test: Batch,
        *,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        digest: str,
    ) -> None:
        self._x, self._y = train
        self._validation = cut(*validation, eval_batch_size)
        self._test = cut(*test, eval_batch_size)
        self._batch_size = batch_size
        self._seed = seed
        self._order: tuple[int, Tensor] | None = None
        self.digest = digest
        self.sizes = {"train": len(train[1]), "validation": len(validation[1]), "test": len(test[1])}
        self.steps_per_epoch = len(self._y) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data.batch_size: expected at most the {len(self._y)} training images, found {batch_size}"
            )

    def augment(self, x_NCHW: Tensor, random: torch.Generator) -> Tensor:  # noqa: ARG002, N803  # for subclasses; shape suffix
        """Training images as they are seen; unchanged unless a subclass says otherwise."""
        return x_NCHW

    def train_batch(self, epoch: int, index: int) -> Batch:
        """See `Dataset`."""
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self._y), generator=generator("order", self._seed, epoch))
            self._order = (epoch, order)
        chosen = self._order[1][index * self._batch_size : (index + 1) * self._batch_size]
        return self.augment(self._x[chosen], generator("augment", self._seed, epoch, index)), self._y[chosen]

    def validation(self) -> list[Batch]:
        """See `Dataset`."""
        return self._validation

    def test(self) -> list[Batch]:
        """See `Dataset`."""
        return self._test
