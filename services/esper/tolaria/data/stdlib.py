"""The Python standard library's own source as bytes, split by file, so that no file is in two parts."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from esper.mesh.errors import Conflict
from esper.tolaria.data.base import Batch, cut, generator

if TYPE_CHECKING:
    from torch import Tensor

    from esper.tolaria.config import StdlibData

__all__ = ["StdlibText", "find_sources", "part_of"]

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"})


def find_sources(folder: str) -> tuple[Path, list[Path]]:
    """The root and its source files in the order of the digest of their relative path.

    Raises:
        Conflict: DATA_MISSING, no source file is there.
    """
    root = Path(folder).expanduser() if folder else Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts) and path.is_file()
    ]
    if not files:
        raise Conflict(
            f"no Python source below {root}: expected the standard library there; give a folder of *.py files as the "
            "override data.dir",
            reason="DATA_MISSING",
        )
    return root, sorted(files, key=lambda path: _path_digest(root, path))


def _path_digest(root: Path, path: Path) -> bytes:
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()


def part_of(relative_path: str, config: StdlibData) -> str:
    """Which part a file belongs to; depends on its path alone, so that it never moves from one part to another."""
    raw = hashlib.sha256(b"part/" + relative_path.encode()).digest()
    position = int.from_bytes(raw[:8], "big") / 2**64
    if position < config.test_fraction:
        return "test"
    return "validation" if position < config.test_fraction + config.validation_fraction else "train"


class StdlibText:
    """Windows of bytes: random ones to learn from, evenly spaced ones to judge on."""

    def __init__(self, config: StdlibData, seed: int) -> None:
        root, files = find_sources(config.dir)
        texts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
        total = 0
        for path in files:
            text = path.read_bytes()
            if total + len(text) > config.max_bytes:
                continue
            total += len(text)
            texts[part_of(path.relative_to(root).as_posix(), config)].append(text)
        joined = {name: b"\n".join(parts) for name, parts in texts.items()}
        for name, text in joined.items():
            if len(text) <= config.context + 1:
                raise Conflict(
                    f"the {name} part of {root} has {len(text)} bytes: expected more than data.context + 1 = "
                    f"{config.context + 1}",
                    reason="DATA_MISSING",
                )
        self._config = config
        self._seed = seed
        self._text = {name: _tensor(text) for name, text in joined.items()}
        self.digest = "sha256:" + hashlib.sha256(b"\0".join(joined.values())).hexdigest()
        self.sizes = {name: len(text) for name, text in joined.items()}
        self.steps_per_epoch = config.steps_per_epoch

    def _windows(self, part: str, starts: Tensor) -> Batch:
        index = starts[:, None] + torch.arange(self._config.context + 1)
        window = self._text[part][index].long()
        return window[:, :-1], window[:, 1:]

    def train_batch(self, epoch: int, index: int) -> Batch:
        """See `Dataset`."""
        random = generator("window", self._seed, epoch, index)
        last = len(self._text["train"]) - self._config.context - 1
        return self._windows("train", torch.randint(0, last, (self._config.batch_size,), generator=random))

    def _spaced(self, part: str) -> list[Batch]:
        count = self._config.eval_batches * self._config.eval_batch_size
        last = len(self._text[part]) - self._config.context - 1
        starts = torch.linspace(0, last, count, dtype=torch.float64).long()
        return cut(*self._windows(part, starts), self._config.eval_batch_size)

    def validation(self) -> list[Batch]:
        """See `Dataset`."""
        return self._spaced("validation")

    def test(self) -> list[Batch]:
        """See `Dataset`."""
        return self._spaced("test")


def _tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
