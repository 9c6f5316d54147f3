"""What each of two processes does that train one model by a framework's own DistributedDataParallel."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.kasmina.hosts import TinyKernel, vector
from tests.kasmina.integrations.script import KERNEL, Script

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 2
EPOCHS, EARLY = 5, 2


def _plane(site: str) -> Script:
    plane = Script(site)
    # Only the first rank opens the plane; each fetches kernels of its own.
    plane.kernels[KERNEL] = TinyKernel(KERNEL, vector(8, 4))
    return plane


def by_lightning(folder: Path) -> list[Any]:
    """A whole training, and one that goes on from its second epoch."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.kasmina.integrations import test_lightning as lightning

    found = []
    for path in (None, folder / f"epoch={EARLY - 1}.ckpt"):
        callback, host = lightning._callback(_plane("first..head")), lightning.Host()
        options: dict[str, Any] = {"devices": SIZE, "strategy": "ddp"}
        if path is None:
            keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
            options |= {"callbacks": [keep], "enable_checkpointing": True}
        trainer = lightning._trainer(folder, callback, EPOCHS, **options)
        trainer.fit(host, *lightning._loaders(), ckpt_path=path)
        found.append(_facts(callback, host))
    return found


def by_transformers(folder: Path) -> list[Any]:
    """Likewise."""
    from tests.kasmina.integrations import test_transformers as transformers

    found = []
    for path in (None, folder / f"checkpoint-{4 * EARLY}"):
        callback, host = transformers._callback(_plane("net")), transformers.Host()
        options = {"num_train_epochs": EPOCHS, "save_strategy": "epoch" if path is None else "no"}
        trainer = transformers._trainer(folder, host, callback, ddp_backend="gloo", **options)
        trainer.train(resume_from_checkpoint=None if path is None else str(path))
        found.append(_facts(callback, host))
    return found


def _facts(callback: Any, host: torch.nn.Module) -> dict[str, Any]:
    growth = callback.growth
    return {
        "fossilized": len(growth.life.fossilized),
        "steps": growth.steps,
        "ranks": growth.ranks.size,
        "values": [value.double().sum().item() for value in host.state_dict().values()],
    }


def work(rank: int, folder: str, port: int, names: list[str]) -> None:
    """As a launcher would start it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HF_HUB_OFFLINE": "1",
    }
    for name in names:
        inner = Path(folder) / name
        inner.mkdir(exist_ok=True)
        by: Callable[[Path], list[Any]] = globals()[f"by_{name}"]
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(by(inner)))
    torch.distributed.destroy_process_group()
