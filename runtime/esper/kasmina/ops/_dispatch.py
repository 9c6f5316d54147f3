"""Which implementation a tensor gets: Triton on CUDA, plain torch everywhere else.

Triton is looked for, never imported, until the first kernel is launched: a host without a GPU does not pay for it.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch

from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

__all__ = ["cdiv", "on_device", "power_of_2", "use_kernels"]

# A constant of the module: compiled graphs read it without a break.
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_log = get_logger("esper.kasmina.ops")


def use_kernels(x: Tensor) -> bool:
    """True where x lives on a CUDA device and Triton is installed; where only Triton lacks, that is said once."""
    if not x.is_cuda:
        return False
    if not _HAVE_TRITON and not torch.compiler.is_compiling():
        _say_once()
    return _HAVE_TRITON


@cache
def _say_once() -> None:
    _log.warning("triton is not installed: device operations run unfused in plain torch", hint="pip install triton")


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up."""
    return -(-numerator // denominator)


def power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`: extents of Triton's tiles must be one."""
    return 1 << max(0, value - 1).bit_length()
