"""What growth owes to a host under ``torch.compile``: graphs that go when hooks do, eager forwards, taps.

By default dynamo does not look at hooks again once a graph is made. That is what a dormant host wants, since looking
costs every step. So growth never relies on it: whenever hooks come or go, the graphs go too (`forget_graphs`), and
hooks that only look stand on the model while an eager forward runs (`eagerly`). The number of graphs alive is
therefore that of the host alone, however many seeds come and go, and dynamo's recompile limit is no nearer.

A compiled graph can not hand a gradient out by a tensor hook; `tap` does it by an operator of its own.
"""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = [
    "Tapped",
    "compiler_loaded",
    "eagerly",
    "forget_graphs",
    "inner_module",
    "is_compiled",
    "register_tap",
    "tap",
]


def compiler_loaded() -> bool:
    """Whether anything can have been compiled in this process; asking does not load the compiler, which takes long."""
    return "torch._dynamo" in sys.modules


def inner_module(model: nn.Module) -> nn.Module:
    """The user's module where `model` is what ``torch.compile(module)`` returned; `model` itself otherwise."""
    if not compiler_loaded():
        return model
    from torch._dynamo.eval_frame import OptimizedModule

    while isinstance(model, OptimizedModule):
        model = model._orig_mod  # noqa: SLF001  # its only name
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `model`, or a part of it, is known to be compiled: in place, or by ``torch.compile`` around it.

    A function around it that is compiled can not be known.
    """
    if not compiler_loaded():
        return False
    from torch._dynamo.eval_frame import OptimizedModule

    modules = list(model.modules())
    if any(m._compiled_call_impl is not None or isinstance(m, OptimizedModule) for m in modules):  # noqa: SLF001  # set by Module.compile
        return True
    return any(type(h) is dict and h.get("_orig_mod") is model for h in gc.get_referrers(model))


def forget_graphs() -> None:
    """Have every compiled function of this process compiled anew when it is next called: hooks have changed."""
    if compiler_loaded():
        torch.compiler.reset()


def eagerly() -> AbstractContextManager[Any]:
    """Run what is compiled as plain Python, so that hooks see it; graphs stay as they are, and none is made."""
    return torch.compiler.set_stance("force_eager") if compiler_loaded() else nullcontext()


class Tapped(Protocol):
    """Who looks at a tensor inside a compiled graph."""

    def tapped(self, y: Tensor, features: Tensor) -> None:
        """Values of the forward; not to be kept without copying."""

    def tapped_gradient(self, gradient: Tensor) -> None:
        """Gradient of the loss at `y`, in the backward of that forward."""


_taps: WeakValueDictionary[int, Tapped] = WeakValueDictionary()
_handles = count(1)


def register_tap(who: Tapped) -> int:
    """A handle for `tap`; a number, so that graphs can hold it. `who` is not kept alive."""
    handle = next(_handles)
    _taps[handle] = who
    return handle


@torch.library.custom_op("esper::tap", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _tap(y: Tensor, features: Tensor, handle: int) -> Tensor:
    if (who := _taps.get(handle)) is not None:
        who.tapped(y, features)
    # An operator must not return what it was given.
    return y.clone()


@_tap.register_fake
def _tap_fake(y: Tensor, features: Tensor, handle: int) -> Tensor:  # noqa: ARG001  # the schema's names
    return torch.empty_like(y)


@torch.library.custom_op("esper::tap_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _tap_backward(gradient: Tensor, handle: int) -> Tensor:
    if (who := _taps.get(handle)) is not None:
        who.tapped_gradient(gradient)
    return gradient.clone()


@_tap_backward.register_fake
def _tap_backward_fake(gradient: Tensor, handle: int) -> Tensor:  # noqa: ARG001  # the schema's names
    return torch.empty_like(gradient)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:  # noqa: ARG001  # the schema's names
    ctx.handle = inputs[2]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.esper.tap_backward(gradient, ctx.handle), None, None


_tap.register_autograd(_gradient, setup_context=_setup)


def tap(y: Tensor, features: Tensor, handle: int) -> Tensor:
    """`y` in value and gradient; what passes is shown to the one who registered `handle`."""
    result: Tensor = torch.ops.esper.tap(y, features, handle)
    return result
