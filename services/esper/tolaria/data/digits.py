"""scikit-learn's bundled digits: 1,797 grey images of 8 x 8 pixels, values scaled to -1 to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from esper.mesh.blobs import digest
from esper.tolaria.data.base import Batch, ImageDataset, shifted

if TYPE_CHECKING:
    from torch import Tensor

    from esper.tolaria.config import DigitsData

__all__ = ["Digits", "split"]

_BACKGROUND = -1.0


def split(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]], config: DigitsData
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Indices of train, validation and test: disjoint, together everything, equal shares of each class."""
    everything = np.arange(len(labels))
    rest, test = train_test_split(
        everything, test_size=config.test_fraction, stratify=labels, random_state=config.split_seed
    )
    share = config.validation_fraction / (1 - config.test_fraction)
    train, validation = train_test_split(
        rest, test_size=share, stratify=labels[rest], random_state=config.split_seed + 1
    )
    return {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}


class Digits(ImageDataset):
    """The images; training ones shifted at random by up to ``data.shift_pixels``."""

    def __init__(self, config: DigitsData, seed: int) -> None:
        raw = load_digits()
        pixels = np.ascontiguousarray(raw.images, dtype=np.float32)
        labels = np.ascontiguousarray(raw.target, dtype=np.int64)
        x = torch.from_numpy(pixels)[:, None] / 8.0 - 1.0
        y = torch.from_numpy(labels)
        parts: dict[str, Batch] = {
            name: (x[torch.from_numpy(index)], y[torch.from_numpy(index)])
            for name, index in split(labels, config).items()
        }
        super().__init__(
            parts["train"],
            parts["validation"],
            parts["test"],
            batch_size=config.batch_size,
            eval_batch_size=config.eval_batch_size,
            seed=seed,
            digest=digest(pixels.tobytes() + labels.tobytes()),
        )
        self._reach = config.shift_pixels

    def augment(self, x_NCHW: Tensor, random: torch.Generator) -> Tensor:  # noqa: N803  # shape suffix
        """Shifted at random, the gap filled with background."""
        return shifted(x_NCHW, self._reach, random, _BACKGROUND)
