"""Runs something on the host that must leave no trace: flags, buffers, every random state, and no exception."""

from __future__ import annotations

import functools
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import numpy as np
import torch

from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

__all__ = ["evaluating", "harmless", "preserved_random_state", "untouched"]

_log = get_logger("esper.kasmina.growth")
_P = ParamSpec("_P")
_T = TypeVar("_T")
_said: set[str] = set()


def harmless(hook: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """A hook whose failure is told once and costs the host nothing: it runs inside the user's forward or step."""

    @functools.wraps(hook)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        try:
            return hook(*args, **kwargs)
        except Exception:  # noqa: BLE001  # whatever it is, it must not become the user's
            if hook.__qualname__ not in _said:
                _said.add(hook.__qualname__)
                _log.exception("hook failed", hook=hook.__qualname__)
            return None

    return guarded


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
