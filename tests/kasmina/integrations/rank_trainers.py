"""What each of two processes does that train one model by Lightning's own DistributedDataParallel."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.kasmina.hosts import TinyKernel, vector
from tests.kasmina.integrations import test_lightning as lightning
from tests.kasmina.integrations.script import KERNEL, Script

EPOCHS, EARLY = 5, 2


def a_trainer(rank: int, size: int) -> None:
    """A seed is grafted and kept on all ranks, the same bits on each, and the same again after a resumption."""
    # As a launcher would have started this process.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as own, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders: list[Any] = [own]
        dist.broadcast_object_list(folders)
        mine = _trained(Path(folders[0]), size)
        found: list[Any] = [None] * size
        dist.all_gather_object(found, mine)
    assert all(other == mine for other in found)
    whole, resumed = mine
    assert (1, size) == whole[:2]
    assert whole == resumed


def _trained(folder: Path, size: int) -> list[Any]:
    """A whole training, and one that goes on from an early epoch."""
    found = []
    for path in (None, folder / f"epoch={EARLY - 1}.ckpt"):
        plane, host = Script(), lightning.Host()
        # Only the first rank opens the plane; each fetches kernels of its own.
        plane.kernels[KERNEL] = TinyKernel(KERNEL, vector(8, 4))
        callback = lightning._callback(plane)
        options: dict[str, Any] = {"devices": size, "strategy": "ddp"}
        if path is None:
            keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
            options |= {"callbacks": [keep], "enable_checkpointing": True}
        trainer = lightning._trainer(folder, callback, EPOCHS, **options)
        trainer.fit(host, *lightning._loaders(), ckpt_path=path)
        growth = callback.growth
        values = [value.double().sum().item() for value in host.state_dict().values()]
        found.append((len(growth.life.fossilized), growth.ranks.size, values))
    return found
