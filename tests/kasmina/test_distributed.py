"""Two processes train one model: what is decided once is done by both, and neither waits for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed
import torch.multiprocessing

from esper.kasmina._measure import joined, read_validation
from esper.kasmina.distributed import ALONE
from esper.mesh.errors import Conflict
from tests.kasmina import rank_loops
from tests.kasmina.loops import Run

if TYPE_CHECKING:
    from pathlib import Path


def test_alone_is_as_if_there_were_no_ranks() -> None:
    """One process runs what it is given, and its errors are its own."""
    assert [3] == ALONE.together(lambda: 3)
    assert 3 == ALONE.first(lambda: 3)
    assert [1.0, 2.0] == ALONE.vote([1.0, 2.0]).result()
    with pytest.raises(ZeroDivisionError):
        ALONE.together(lambda: 1 // 0)
    tensor = torch.ones(2)
    ALONE.average([tensor])
    ALONE.spread([tensor])
    assert [1.0, 1.0] == tensor.tolist()


def test_every_batch_counts_once() -> None:
    """Shards are joined in the order of the ranks; what all ranks saw alike is no more data than one saw."""
    one, two = (read_validation({"loss": losses, "accuracy": a}) for losses, a in (([1.0, 2.0], 0.5), ([3.0], 1.0)))
    found = joined([one, two])
    assert ((1.0, 2.0, 3.0), 2.0, 0.75) == (found.losses, found.loss, found.accuracy)
    assert (1.0, 2.0) == joined([one, one]).losses
    numbers = joined([read_validation({"loss": 1.0}), read_validation({"loss": 2.0})])
    assert (None, 1.5) == (numbers.losses, numbers.loss)
    assert 1.5 == joined([read_validation(None), one]).loss


def test_who_began_alone_does_not_go_on_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was wrapped before it had company says so, instead of growing apart from it."""
    run, own = Run(), Run(distributed=False)
    for each in (run, own):
        each.steps(2)
        each.boundary()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(Conflict, match=r"after torch.distributed.init_process_group"):
        run.boundary()
    own.boundary()


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each rank found of each check; the ranks are started once for all."""
    folder = tmp_path_factory.mktemp("ranks")
    context: Any = torch.multiprocessing.start_processes(
        rank_loops.work, (str(folder),), nprocs=rank_loops.SIZE, join=False, start_method="spawn"
    )
    for process in context.processes:
        process.join(270)
        process.kill()
    return folder


@pytest.mark.parametrize("check", [check.__name__ for check in rank_loops.CHECKS])
def test_two_ranks(check: str, findings: Path) -> None:
    """Each check of `rank_loops` says what it claims."""
    for rank in range(rank_loops.SIZE):
        found = findings / f"{check}-{rank}"
        assert found.exists(), f"rank {rank} did not come so far"
        assert "" == found.read_text()
