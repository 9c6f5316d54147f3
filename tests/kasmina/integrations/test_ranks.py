"""Two processes train one model by each framework's own DistributedDataParallel, and grow as one."""

from __future__ import annotations

import importlib.util
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest
import torch.multiprocessing

from tests.kasmina.integrations import rank_trainers

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["lightning", "transformers"]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each rank found; the ranks are started once for all."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [name for name in NAMES if name != "transformers" or importlib.util.find_spec("accelerate")]
    context: Any = torch.multiprocessing.start_processes(
        rank_trainers.work, (str(folder), port, names), nprocs=rank_trainers.SIZE, join=False, start_method="spawn"
    )
    for process in context.processes:
        process.join(240)
        process.kill()
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_grow_as_one(name: str, findings: Path) -> None:
    """A seed is grafted and kept on both, the same bits on each, and the same again after a resumption."""
    if name == "transformers":
        pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install 'esper[transformers]'")
    first, second = (json.loads((findings / f"{name}-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    whole, resumed = first
    assert (1, 2) == (whole["fossilized"], whole["ranks"])
    assert whole["values"] == resumed["values"]
