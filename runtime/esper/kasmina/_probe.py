"""Watches one forward of a model without effect: which module was called when, with what, giving what.

Hooks stand on the model's inner modules only while that one forward runs, and only where gradients are enabled: the
fast paths of attention, which look for hooks, are not taken then anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from esper.kasmina._ports import first_tensor, output_tensor, why_no_tensor
from esper.kasmina._quiet import harmless

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle

__all__ = ["Call", "ForwardWatch", "Recorder", "Spec"]


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Spec:
        """That of `x`."""
        return cls(tuple(x.shape), x.dtype)


@dataclass(slots=True)
class Call:
    """What was seen of one module."""

    start: int = -1
    """Position of the first call's beginning among all beginnings and ends."""
    end: int = -1
    calls: int = 0
    forms: list[tuple[Spec | None, Spec | None]] = field(default_factory=list)
    """Input and output of each call, the same only once; None where it is no tensor."""
    why: str = ""
    """Why an output is no tensor; empty where each call gave one."""
    source: tuple[int, int] | None = None
    """Number and version of the tensor that the first call was given: the same ones, the same tensor."""
    result: tuple[int, int] | None = None
    """Those of the tensor that the first call gave."""
    running: list[Spec | None] = field(default_factory=list)
    """Inputs of the calls that have begun and not ended, outermost first."""

    @property
    def x(self) -> Spec | None:
        """Input of the first call."""
        return self.forms[0][0] if self.forms else None

    @property
    def y(self) -> Spec | None:
        """Output of the first call."""
        return self.forms[0][1] if self.forms else None


class Recorder:
    """Collects a `Call` for every module of a model during one forward."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, Call] = {}
        self._model = model
        self._clock = 0
        # By identity and without keeping them: a tensor that is gone leaves its memory, not its number, to others.
        self._numbers = WeakIdKeyDictionary()

    def install(self) -> list[RemovableHandle]:
        """Put the observing hooks on every module but the model itself; compiled by TorchScript they take none."""
        handles = []
        for name, module in self._model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                call = self.calls[name] = Call()
                handles.append(module.register_forward_pre_hook(self._before(call), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(call)))
        return handles

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _number(self, x: Tensor) -> tuple[int, int]:
        # What is written in place is another tensor; those of inference mode do not count their versions.
        version = 0 if x.is_inference() else x._version  # noqa: SLF001  # has no public name
        return self._numbers.setdefault(x, self._clock), version  # type: ignore[no-untyped-call]  # torch leaves it so

    def _before(self, call: Call) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        @harmless
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.calls += 1
            if call.calls == 1:
                call.start = self._tick()
            x = first_tensor(args, kwargs)
            if call.calls == 1 and x is not None:
                call.source = self._number(x)
            call.running.append(None if x is None or x.is_nested else Spec.of(x))

        return hook

    def _after(self, call: Call) -> Callable[[nn.Module, Any, Any], None]:
        @harmless
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call.end = self._tick()
            why = why_no_tensor(output)
            call.why = call.why or why
            y = None if why else output_tensor(output)
            if call.calls == 1 and y is not None:
                call.result = self._number(y)
            form = (call.running.pop(), None if y is None else Spec.of(y))
            if form not in call.forms:
                call.forms.append(form)

        return hook


class ForwardWatch:
    """Arms the model's next forward with gradients enabled: `enter` installs hooks, `leave` follows when it is over.

    The hooks that `enter` returns are removed as soon as that forward ends, also when it raises; then `leave` gets
    None and the watch stays armed for the next one.

    Args:
        model: whose forward to watch.
        enter: called with the forward's arguments, returns the hooks to remove.
        leave: called with the output, or None after an exception.
        graded: False watches any forward, of a validation too.
    """

    def __init__(
        self,
        model: nn.Module,
        enter: Callable[[tuple[Any, ...], Mapping[str, Any]], list[RemovableHandle]],
        leave: Callable[[Any], None],
        *,
        graded: bool = True,
    ) -> None:
        self._graded = graded
        self._enter = enter
        self._leave = leave
        self._inner: list[RemovableHandle] = []
        self._running = False
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def armed(self) -> bool:
        """True until a forward was watched, or the watch was disarmed."""
        return bool(self._handles)

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or (self._graded and not torch.is_grad_enabled()) or self._running:
            return
        self._running = True
        self._inner = harmless(self._enter)(args, kwargs) or []

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # In this order: a graph must not depend on what only an uncompiled forward knows.
        if torch.compiler.is_compiling() or not self._running:
            return
        self._running = False
        self._clear()
        if output is not None:
            self.disarm()
        harmless(self._leave)(output)

    def _clear(self) -> None:
        for handle in self._inner:
            handle.remove()
        self._inner = []

    def disarm(self) -> None:
        """Remove every hook."""
        self._clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []
