"""Reads the training loss without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Loss", "LossReader", "scalar"]


@dataclass(frozen=True, slots=True)
class Loss:
    """The training loss of one call of a loop."""

    value: float
    skipped: bool
    """True where no optimizer step was done with its gradients."""


def scalar(loss: Tensor | float) -> Tensor | float:
    """One number of a loss as a loop has it: the mean of a tensor of any shape; the device is not waited for."""
    if not isinstance(loss, Tensor):
        return float(loss)
    # On the fast way of a run: no new tensors for a loss that is one number already.
    return loss if loss.dim() == 0 else loss.detach().float().mean()


class LossReader:
    """Gives back each loss once its copy on the host is there: at once on a CPU, some steps later on a device."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._ready: deque[Loss] = deque()
        self.total = 0.0
        """Sum of what was read since `mean` was last taken."""
        self.count = 0

    def push(self, loss: Tensor | float, skipped: bool | Tensor = False) -> None:
        """Take the loss of one step, as `scalar` gives it.

        Args:
            loss: one number.
            skipped: whether no step was done with it; a number on the device of the loss, above 0 for yes, where
                only that knows.
        """
        if isinstance(loss, Tensor) and loss.device.type == "cuda":
            value = loss.detach().float()
            flag = skipped if isinstance(skipped, Tensor) else torch.full_like(value, float(skipped))
            copy = torch.stack([value, flag.to(value).reshape(())]).to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves its events untyped
            event.record()
            self._pending.append((copy, event))
        else:
            # A plain number has been read from its device: one more answer is there too.
            number = loss.item() if isinstance(loss, Tensor) else loss
            self._ready.append(Loss(number, bool(skipped)))

    def read(self, *, wait: bool = False) -> Iterator[Loss]:
        """The losses whose copies have arrived, in order.

        Args:
            wait: for all of them; at boundaries.
        """
        while self._pending and (wait or self._pending[0][1].query()):  # type: ignore[no-untyped-call]  # likewise
            copy, event = self._pending.popleft()
            event.synchronize()
            self._ready.append(Loss(float(copy[0]), bool(copy[1])))
        while self._ready:
            loss = self._ready.popleft()
            # A loss that overflowed in a step that was skipped for it is no mean's business.
            if math.isfinite(loss.value) or not loss.skipped:
                self.total += loss.value
                self.count += 1
            yield loss

    def mean(self) -> float | None:
        """Mean of what was read since the last call; None where nothing was."""
        result = self.total / self.count if self.count else None
        self.total, self.count = 0.0, 0
        return result
