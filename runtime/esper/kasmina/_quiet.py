"""Runs something on the host that must leave no trace: flags, buffers and every random state come back."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["evaluating", "preserved_random_state", "untouched"]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give back the state of torch's (CPU and initialised CUDA), NumPy's and Python's generators."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # validation code of users draws from it
    running = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    devices = list(range(torch.cuda.device_count())) if running else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  # likewise


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give back the training flag of every module, the values of all buffers, and random state."""
    flags = [(module, module.training) for module in model.modules()]
    # Those on the meta device hold no values.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        with preserved_random_state():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for buffer, value in buffers:
                # Comparing first keeps the version counter, and with it any graph that saved the buffer.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`untouched`, in evaluation mode and without gradients: for forwards that nobody asked for."""
    with untouched(model), torch.no_grad():
        model.eval()
        yield
