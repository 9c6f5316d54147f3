"""Stands between a seed's kernel and its host: what the host gets is finite and of the right form, or nothing at all.

On a CPU a value can be looked at for nothing: a change that is not finite is dropped, and the host's forward goes on
without the seed. On other devices, and in compiled graphs, nothing waits: the change is masked on the device, and a
sum that stops being finite (`SeedModule.probe`) is read some steps later. Gradients towards the host and of the
seed's parameters are masked in the same way while they flow, before anybody clips or steps with them.

In float16 gradients are left alone: a gradient scaler provokes overflows and skips the step by itself.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina._flight import FLIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Fault", "FaultKind", "Guard", "check_shape", "in_backward"]


_TIMED_EVERY = 8
"""Forwards of which one is timed on a device that runs behind the calling thread."""


class FaultKind(StrEnum):
    """What a kernel did wrong."""

    RAISED = "raised"
    """It raised in its forward, backward or first trial."""
    FORM = "form"
    """Its output or gradient has another shape, element type or device, or is no tensor."""
    NOT_FINITE = "not_finite"
    """Its output is not finite although its input is."""
    GRADIENT = "gradient"
    """Its gradient is not finite although the loss is."""
    DIVERGED = "diverged"
    """The seed's own parameters are not finite: it learnt that, the kernel is not to blame."""
    SLOW = "slow"
    """It takes much longer than the rest of the step, or than it used to."""
    HANG = "hang"
    """A call did not come back in time, or took the process down."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that a kernel did wrong."""

    kind: FaultKind
    text: str
    """One sentence."""


class _Unsound(Exception):
    """Carries a fault out of the change of a seed."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault = fault


def in_backward() -> bool:
    """True inside a backward, where activation checkpointing runs forwards again."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  # has no public name


class Guard:
    """Of one seed.

    Args:
        parameters: of the seed's module; their gradients are looked at from now on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.kernel_id = ""
        """For the flight recorder."""
        self.fault: Fault | None = None
        """What was wrong with the change; the host runs without the seed until it is cleared."""
        self.fresh = False
        """The fault is of the step that is going on."""
        self.suspect = 0
        """Steps for which a gradient that was not finite has waited for a judgement, from 1; 0 where there is none."""
        self.spent_s = 0.0
        """Time of the forwards since it was last taken, as the calling thread saw it."""
        self.behind = False
        """True where the device runs behind the calling thread, whose time says little."""
        self.events: list[tuple[Any, Any]] = []
        """Beginning and end of forwards there, some of them, until their time is known."""
        self.reported = False
        """What is wrong was told already."""
        self._forwards = 0
        self._probe: Tensor | None = None
        self._scaled = False
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._gradient)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        # A copy of the host runs the copied seed with the judgement so far, and is judged by nobody.
        copy = Guard(())
        copy.kernel_id, copy.fault = self.kernel_id, self.fault
        memo[id(self)] = copy
        return copy

    @property
    def shut(self) -> bool:
        """Whether the host runs without the seed; a forward that is run again in a backward does what it did."""
        return self.fault is not None and (torch.compiler.is_compiling() or not (self.fresh and in_backward()))

    def run(self, delta: nn.Module, features: Tensor, probe: Tensor) -> Tensor:
        """``delta(features)``, made harmless.

        Args:
            delta: the seed's module.
            features: what it is given.
            probe: takes a sum that is not finite once an output was not, where the device is not waited for.

        Raises:
            _Unsound: the output has no right form, or is not finite.
        """
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                plain: Tensor = delta(features)
                return plain
            return _masked(delta(_Gate.apply(features)), probe)  # type: ignore[no-untyped-call]  # torch ships it untyped
        self._probe = probe
        given = self._timed(delta, self._gated(features))
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.device != features.device:
            raise _Unsound(Fault(FaultKind.FORM, f"expected floating-point numbers, found {_form(given)}"))
        found = given
        if not found.is_cpu:
            return _masked(found, probe)
        # What is run again in a backward must do again exactly what the forward did.
        if in_backward() or _finite(found.detach()):
            return found
        if not bool(torch.isfinite(features).all()):
            # The host's own fault: its loss will tell.
            return found
        raise _Unsound(Fault(FaultKind.NOT_FINITE, "its output is not finite, its input is"))

    def _timed(self, delta: nn.Module, features: Tensor) -> object:
        training = torch.is_grad_enabled()
        event = _event() if features.is_cuda and training and self._due() else None
        began = time.perf_counter()
        outer = FLIGHT.enter(self.kernel_id, "forward")
        try:
            return delta(features)
        finally:
            FLIGHT.leave(outer)
            if training:
                # Others, of a validation, have no step that they could be too long for.
                self.spent_s += time.perf_counter() - began
            if event is not None:
                self.events.append((event, _event()))

    def _due(self) -> bool:
        """Whether this forward is timed on the device."""
        self.behind = True
        self._forwards += 1
        return self._forwards % _TIMED_EVERY == 1

    def _gated(self, features: Tensor) -> Tensor:
        self._scaled = features.dtype is torch.float16 or (
            torch.is_autocast_enabled(kind := "cpu" if features.is_cpu else "cuda")
            and torch.get_autocast_dtype(kind) is torch.float16
        )
        if self._scaled or not (features.requires_grad and torch.is_grad_enabled()):
            return features
        # Another name for the same values: the hook must see the seed's part of the gradient, not the host's.
        alias = features.view_as(features)
        alias.register_hook(self._gradient)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return alias

    def _gradient(self, gradient: Tensor) -> Tensor | None:
        """Hook at what the seed gives gradients to."""
        if self._scaled:
            return None
        if not gradient.is_cpu:
            if self._probe is not None and self._probe.device == gradient.device:
                self._probe.add_(_total(gradient))
            return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        if _finite(gradient):
            return None
        self.suspect = max(self.suspect, 1)
        return torch.zeros_like(gradient)

    def failed(self, error: Exception) -> None:
        """The change was not made, for this reason."""
        if isinstance(error, _Unsound):
            self.fault = error.fault
        else:
            self.fault = Fault(FaultKind.RAISED, f"{type(error).__name__}: {error}")
        self.fresh = True

    def repeats(self, error: Exception) -> bool:
        """Whether an error inside a backward is what the forward of the same step met with, and let pass."""
        known = self.fault.text if self.fresh and self.fault is not None else None
        return known is not None and known in {str(error), f"{type(error).__name__}: {error}"}

    def clear(self) -> None:
        """Begin anew: the kernel runs another way now."""
        self.fault, self.fresh, self.suspect, self.reported = None, False, 0, False

    def take_spent(self) -> tuple[float, bool]:
        """Seconds of the training forwards since the last call, and whether the device's own time is among them.

        Nothing waits for a device: its time is that of a forward some steps ago.
        """
        spent, self.spent_s = self.spent_s, 0.0
        known = not self.behind
        while self.events and self.events[0][1].query():
            begin, end = self.events.pop(0)
            spent, known = max(spent, begin.elapsed_time(end) / 1e3), True
        return spent, known


def check_shape(delta: Tensor, y: Tensor) -> None:
    """Refuse a change that is not of the host's shape.

    Raises:
        _Unsound: it is not.
    """
    if delta.shape != y.shape:
        found = f"expected a change of the shape {tuple(y.shape)}, found {tuple(delta.shape)}"
        raise _Unsound(Fault(FaultKind.FORM, found))


class _Gate(torch.autograd.Function):
    """Passes values on as they are, and gradients where they are finite: for compiled graphs, which take no hooks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # torch gives it
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004  # torch gives it
        if gradient.dtype is torch.float16:
            return gradient
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def _masked(found: Tensor, probe: Tensor) -> Tensor:
    total = _total(found.detach())
    probe.add_(total)
    return torch.where(torch.isfinite(total), found, 0.0)


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)


def _finite(x: Tensor) -> bool:
    """Whether all values are finite; True where no value can be read (batched and fake tensors)."""
    try:
        # A sum is read once and tells nearly always; one that overflows is looked into.
        return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
    except RuntimeError:
        return True


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves its events untyped
    event.record()
    return event


def _form(found: object) -> str:
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')} on {found.device}"
    return type(found).__name__
