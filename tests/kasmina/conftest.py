"""Fixtures of the runtime's tests."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and results do not depend on the machine's load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _libraries_out_of_sight() -> Iterator[None]:
    """The collector need not look through half a million objects of imported libraries at each graft of a test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
