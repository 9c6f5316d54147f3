"""CIFAR-10 from its binary files: 10,000 records a file, each one byte of label and 3,072 bytes of pixels (CHW).

The folder is what ``cifar-10-binary.tar.gz`` unpacks to. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from esper.mesh.errors import Conflict, Corrupt
from esper.tolaria.data.base import Batch, ImageDataset, generator, shifted
from esper.tolaria.data.files import TEST_FILE, TRAIN_FILES, find_cifar10

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from esper.tolaria.config import Cifar10Data

__all__ = ["Cifar10", "read_file"]

_RECORD = 1 + 3 * 32 * 32
_MEAN = (0.4914, 0.4822, 0.4465)
_DEVIATION = (0.2470, 0.2435, 0.2616)


def read_file(path: Path) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], bytes]:
    """Records of one file, (N, 3073) bytes, and the digest of the file.

    Raises:
        Corrupt: DATA_CORRUPT, the file is not a whole number of records or holds a label above 9.
    """
    raw = path.read_bytes()
    if not raw or len(raw) % _RECORD:
        raise Corrupt(
            f"{path.name}: expected a whole number of records of {_RECORD} bytes, found {len(raw)} bytes",
            reason="DATA_CORRUPT",
        )
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, _RECORD)
    if records[:, 0].max() > 9:
        raise Corrupt(f"{path.name}: expected labels 0 to 9, found {records[:, 0].max()}", reason="DATA_CORRUPT")
    return records, hashlib.sha256(raw).digest()


def _tensors(records: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Batch:
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32)) / 255.0
    mean, deviation = torch.tensor(_MEAN).view(1, 3, 1, 1), torch.tensor(_DEVIATION).view(1, 3, 1, 1)
    return (pixels - mean) / deviation, torch.from_numpy(records[:, 0].astype(np.int64))


class Cifar10(ImageDataset):
    """The images; validation is cut from the training files, the test file is left alone until the end."""

    def __init__(self, config: Cifar10Data, seed: int) -> None:
        folder = find_cifar10(config.dir)
        files = [read_file(folder / name) for name in (*TRAIN_FILES, TEST_FILE)]
        records = np.concatenate([data for data, _ in files[:-1]])
        if config.validation_images >= len(records):
            raise Conflict(
                f"data.validation_images: expected fewer than the {len(records)} training images, found "
                f"{config.validation_images}",
                reason="DATA_TOO_SMALL",
            )
        order = torch.randperm(len(records), generator=generator("cifar10-split", config.split_seed)).numpy()
        train, validation = order[: -config.validation_images], order[-config.validation_images :]
        super().__init__(
            _tensors(records[train]),
            _tensors(records[validation]),
            _tensors(files[-1][0]),
            batch_size=config.batch_size,
            eval_batch_size=config.eval_batch_size,
            seed=seed,
            digest="sha256:" + hashlib.sha256(b"".join(raw for _, raw in files)).hexdigest(),
        )
        self._config = config

    def augment(self, x_NCHW: Tensor, random: torch.Generator) -> Tensor:  # noqa: N803  # shape suffix
        """Mirrored by half, then shifted; the gap is filled with the mean colour."""
        if self._config.flip:
            mirrored = torch.rand(len(x_NCHW), generator=random) < 0.5
            x_NCHW = torch.where(mirrored[:, None, None, None], x_NCHW.flip(3), x_NCHW)  # noqa: N806  # shape suffix
        return shifted(x_NCHW, self._config.shift_pixels, random, 0.0)
