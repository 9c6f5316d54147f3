"""Which implementation a tensor gets: Triton on CUDA, plain torch everywhere else.

Triton is looked for, never imported, until the first kernel is launched: a host without a GPU does not pay for it.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

__all__ = ["cdiv", "on_device", "power_of_2", "transformed", "use_kernels"]

# A constant of the module: compiled graphs read it without a break.
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_log = get_logger("esper.kasmina.ops")


def use_kernels(x: Tensor, *others: Tensor) -> bool:
    """True where x lives on a CUDA device and Triton is installed; where only Triton lacks, that is said once.

    Transforms of functions and tensors of kinds of their own, which may come with `others` too, go through plain torch:
    an operator that is registered in Python has no rules for them, and forward-mode derivatives would silently be zero.
    """
    if not x.is_cuda:
        return False
    if torch.compiler.is_compiling():
        return _HAVE_TRITON
    if not _HAVE_TRITON:
        _say_once()
        return False
    return all(type(tensor) in _PLAIN and not transformed(tensor) for tensor in (x, *others))


def transformed(x: Tensor) -> bool:
    """True inside ``torch.func`` (vmap, grad, jvp) and in forward-mode differentiation."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)  # noqa: SLF001  # has no public name
    return wrapped or forward_ad._current_level >= 0  # noqa: SLF001  # nor has this


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
