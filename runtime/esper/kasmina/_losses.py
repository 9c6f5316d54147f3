"""Reads the training loss without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LossReader", "scalar"]


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
        self._ready: deque[float] = deque()
        self.total = 0.0
        """Sum of what was read since `mean` was last taken."""
        self.count = 0

    def push(self, loss: Tensor | float) -> None:
        """Take the loss of one step, as `scalar` gives it."""
        if not isinstance(loss, Tensor):
            self._ready.append(loss)
        elif loss.device.type == "cuda":
            copy = loss.detach().float().to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves its events untyped
            event.record()
            self._pending.append((copy, event))
        else:
            self._ready.append(loss.item())

    def read(self, *, wait: bool = False) -> Iterator[float]:
        """The losses whose copies have arrived, in order.

        Args:
            wait: for all of them; at boundaries.
        """
        while self._pending and (wait or self._pending[0][1].query()):  # type: ignore[no-untyped-call]  # likewise
            copy, event = self._pending.popleft()
            event.synchronize()
            self._ready.append(float(copy))
        while self._ready:
            loss = self._ready.popleft()
            self.total += loss
            self.count += 1
            yield loss

    def mean(self) -> float | None:
        """Mean of what was read since the last call; None where nothing was."""
        result = self.total / self.count if self.count else None
        self.total, self.count = 0.0, 0
        return result
