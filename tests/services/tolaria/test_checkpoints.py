"""Checkpoints: whole or not there."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from esper.kasmina.cache import Fetched
from esper.mesh.errors import Corrupt, NotFound
from esper.tolaria.checkpoints import CheckpointStore, CheckpointWriter, Snapshot, clone_tree
from esper.tolaria.randomness import random_state, restore_random_state, seed_everything
from tests.services.tolaria.conftest import signed

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = "sha256:" + "ab" * 32


def snapshot(boundary: int, step: int = 0, **extra) -> Snapshot:
    """A small one."""
    return Snapshot(
        boundary=boundary, step=step, state={"x": torch.full((3,), float(boundary)), "t": (1, "a", b"z")}, **extra
    )


def test_what_is_written_is_read(tmp_path):
    """Tensors, tuples, texts and bytes come back equal, without pickled code."""
    store = CheckpointStore(tmp_path, 3)
    store.write(snapshot(2, 40))
    found = store.load()
    assert found is not None
    assert (2, 40) == (found.boundary, found.step)
    assert torch.equal(torch.full((3,), 2.0), found.state["x"])
    assert (1, "a", b"z") == found.state["t"]


def test_the_newest_is_loaded_and_the_oldest_go(tmp_path):
    """keep=2 leaves two."""
    store = CheckpointStore(tmp_path, 2)
    for boundary in range(5):
        store.write(snapshot(boundary))
    assert ["b000003-s00000000", "b000004-s00000000"] == store.names()
    assert 4 == store.load().boundary


def test_a_run_without_checkpoints_has_none(tmp_path):
    """None, not an error: it begins at step 0."""
    assert CheckpointStore(tmp_path, 2).load() is None


def test_a_boundary_is_found_or_refused_with_those_that_exist(tmp_path):
    """NOT_FOUND lists what could be resumed from."""
    store = CheckpointStore(tmp_path, 5)
    for boundary in (1, 2, 3):
        store.write(snapshot(boundary))
    assert 2 == store.load(2).boundary
    assert store.has(3)
    assert not store.has(7)
    with pytest.raises(NotFound, match="expected one of 1, 2, 3") as caught:
        store.load(7)
    assert "CHECKPOINT_NOT_FOUND" == caught.value.reason


def test_writing_an_earlier_position_gives_up_the_future(tmp_path):
    """Resuming from boundary 1 makes what came after it another run's."""
    store = CheckpointStore(tmp_path, 5)
    for boundary in (1, 2, 3):
        store.write(snapshot(boundary))
    store.write(snapshot(1, 0))
    assert ["b000001-s00000000"] == store.names()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "format"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    """One flipped bit, and the checkpoint before it is taken."""
    store = CheckpointStore(tmp_path, 5)
    store.write(snapshot(1))
    folder = store.write(snapshot(2))
    state, manifest = folder / "state.pt", folder / "manifest.json"
    raw = state.read_bytes()
    if damage == "flip":
        state.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    elif damage == "truncate":
        state.write_bytes(raw[:100])
    elif damage == "remove":
        state.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    assert 1 == store.load().boundary


def test_when_every_checkpoint_is_damaged_it_says_so(tmp_path):
    """DATA_LOSS with the fault of each, not a silent start from nothing."""
    store = CheckpointStore(tmp_path, 5)
    (store.write(snapshot(1)) / "state.pt").unlink()
    with pytest.raises(Corrupt, match="no whole checkpoint is left") as caught:
        store.load()
    assert "CHECKPOINT_CORRUPT" == caught.value.reason


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    """A half-written folder is neither loaded nor kept."""
    (tmp_path / ".b000009-s00000000.dead").mkdir()
    store = CheckpointStore(tmp_path, 2)
    assert [] == list(tmp_path.iterdir())
    assert store.load() is None


def test_kernels_come_along_once_and_are_linked_afterwards(tmp_path, kernel_cache):
    """The second checkpoint shares the first one's bytes on disk."""
    store = CheckpointStore(tmp_path, 5)
    asked: list[str] = []

    def bundle(kernel_id: str) -> Fetched:
        asked.append(kernel_id)
        return Fetched(b"code", signed(kernel_cache.key, kernel_id))

    store.bundle = bundle
    store.write(snapshot(1, kernels=(KERNEL,)))
    folder = store.write(snapshot(2, kernels=(KERNEL,)))
    assert [KERNEL] == asked
    assert 2 == (folder / ("ab" * 32 + ".kernel")).stat().st_nlink
    found = store.load()
    assert b"code" == found.bundles[KERNEL].bundle
    assert kernel_cache.key.public.key_id == found.bundles[KERNEL].verdict.key_id


def test_without_links_kernels_are_written_again(tmp_path, monkeypatch):
    """A file system without hard links costs space, not the checkpoint."""
    store = CheckpointStore(tmp_path, 5)
    store.bundle = lambda _: Fetched(b"code", None)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store.write(snapshot(1, kernels=(KERNEL,)))
    store.write(snapshot(2, kernels=(KERNEL,)))
    assert b"code" == store.load().bundles[KERNEL].bundle
    assert store.load().bundles[KERNEL].verdict is None


def test_a_kernel_that_is_not_at_hand_is_asked_of_the_library_later(tmp_path):
    """The checkpoint is written all the same and names the kernel."""
    store = CheckpointStore(tmp_path, 5)
    store.write(snapshot(1, kernels=(KERNEL,)))
    found = store.load()
    assert (KERNEL,) == found.kernels
    assert {} == found.bundles


def test_a_full_disk_leaves_the_checkpoints_there_are(tmp_path, monkeypatch):
    """The writer counts the failure and goes on; the next one is written."""
    store = CheckpointStore(tmp_path, 5)
    store.write(snapshot(1))
    writer = CheckpointWriter(store)
    honest = torch.save

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    writer.submit(snapshot(2))
    writer.flush()
    assert 1 == writer.failures
    assert "No space left" in writer.last_error
    assert 1 == store.load().boundary
    assert [] == list(tmp_path.glob(".*"))
    monkeypatch.setattr(torch, "save", honest)
    writer.submit(snapshot(3))
    writer.close()
    assert 3 == store.load().boundary


def test_snapshots_own_their_tensors():
    """Training on does not change what was taken."""
    weight = torch.ones(2)
    taken = clone_tree({"a": [weight, (weight, 1)], "b": "text"})
    weight.zero_()
    assert torch.equal(torch.ones(2), taken["a"][0])
    assert torch.equal(torch.ones(2), taken["a"][1][0])


def test_random_states_travel_through_a_checkpoint(tmp_path: Path):
    """After a restore, Python, NumPy and torch draw what they would have drawn."""
    import random

    seed_everything(7)
    store = CheckpointStore(tmp_path, 1)
    store.write(Snapshot(boundary=0, step=0, state=random_state()))
    drawn = (random.random(), np.random.random(), torch.rand(3))  # noqa: NPY002  # the global one is meant
    restore_random_state(store.load().state)
    again = (random.random(), np.random.random(), torch.rand(3))  # noqa: NPY002  # likewise
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])
