"""Notices that a graft destroys its host, and brings the host back.

The danger of a graft is the next hundred steps, not the insertion. `SpikeDetector` watches the loss of these steps
with the modified z-score of Iglewicz and Hoaglin (*How to Detect and Handle Outliers*, 1993): ``0.6745 * (loss -
median) / MAD`` over the last losses that were no outliers themselves. Median and MAD do not move with the outlier
that they judge. A loss that is not finite counts at once; a high one when it stays high for some steps, since a
single bad batch is no instability. Where a gradient scaler has skipped the step because of it, a loss that is not
finite has done no harm, and counts as a high one.

`HostSnapshot` holds one copy of the host's parameters and buffers and of the optimizer's state: the memory of the host
times two to four (Adam), only while a watch lasts, and not at all above a limit: then a spike takes the newborn out but
can not undo what the host learnt. Steps, schedule and data position are not turned back.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.kasmina._shards import like, own

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.optim import Optimizer

__all__ = ["HostSnapshot", "SpikeDetector"]


class SpikeDetector:
    """Robust outlier detector over the training loss.

    Args:
        threshold: modified z-score from which a loss counts as high. 3.5 is the authors'; a training loss has heavier
            tails than what they had in mind.
        window: losses that are remembered.
        patience: high losses in a row that make a spike.
        minimum: losses needed before a finite one can count as high.
    """

    def __init__(self, *, threshold: float = 8.0, window: int = 64, patience: int = 3, minimum: int = 16) -> None:
        self.threshold = threshold
        self.patience = patience
        self.minimum = minimum
        self._losses: deque[float] = deque(maxlen=window)
        self.armed = False
        """True while a spike would be noticed."""
        self.high = 0
        """High losses in a row that are no spike yet."""
        self.seen = 0
        """Losses taken, armed or not."""

    def arm(self) -> None:
        """Watch from the next loss on."""
        self.armed = True

    def disarm(self) -> None:
        """Stop watching; losses are still remembered."""
        self.armed = False
        self.high = 0

    def score(self, loss: float) -> float:
        """Modified z-score of a loss; infinite where it is not finite, 0 while too few are remembered."""
        if not math.isfinite(loss):
            return math.inf
        if len(self._losses) < self.minimum:
            return 0.0
        values = np.fromiter(self._losses, dtype=np.float64)
        median = float(np.median(values))
        # A loss that hardly moves must not turn rounding noise into a spike.
        deviation = max(float(np.median(np.abs(values - median))), 1e-3 * abs(median), 1e-12)
        return 0.6745 * (loss - median) / deviation

    def update(self, loss: float, *, skipped: bool = False) -> str:
        """Take one loss; returns why it makes a spike, or an empty text.

        Args:
            loss: of the training.
            skipped: True where no optimizer step was done with it.
        """
        self.seen += 1
        if not self.armed:
            if math.isfinite(loss):
                self._losses.append(loss)
            return ""
        score = self.score(loss)
        if score <= self.threshold:
            self._losses.append(loss)
            self.high = 0
            return ""
        self.high += 1
        if (skipped or math.isfinite(loss)) and self.high < self.patience:
            return ""
        count, self.high = self.high, 0
        if not math.isfinite(loss):
            return f"training loss: expected a finite number, found {loss}"
        return (
            f"training loss: expected a z-score up to {self.threshold:g}, found {score:.1f} after {count} high losses"
        )

    def state_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"losses": list(self._losses), "armed": self.armed, "high": self.high, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self.armed, self.high, self.seen = state["armed"], state["high"], state["seen"]


class HostSnapshot:
    """Host parameters, buffers and optimizer state at one instant, by name.

    Args:
        tensors: parameters and buffers by qualified name.
        moments: optimizer state of each parameter by its qualified name.
    """

    def __init__(self, tensors: dict[str, Tensor], moments: dict[str, dict[str, Any]]) -> None:
        self.tensors = tensors
        self.moments = moments

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        moments = (v for state in self.moments.values() for v in state.values() if isinstance(v, Tensor))
        return _bytes([*self.tensors.values(), *moments])

    @classmethod
    def take(cls, model: nn.Module, optimizer: Optimizer, *, max_bytes: int) -> HostSnapshot | None:
        """Copy the present state on its own devices; None where that would take more than `max_bytes`."""
        live = dict(model.named_parameters()) | dict(model.named_buffers())
        states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
        held = [*live.values(), *(v for s in states.values() for v in s.values() if isinstance(v, Tensor))]
        if _bytes(held) > max_bytes:
            return None
        tensors = {name: t.detach().clone() for name, t in live.items()}
        return cls(tensors, {name: {k: _clone(v) for k, v in state.items()} for name, state in states.items()})

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Write everything back in place; what the model got since stays as it is, what it lost is skipped."""
        live = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, value in self.tensors.items():
                if name in live and live[name].shape == value.shape:
                    live[name].copy_(like(value, live[name]))
        for name, parameter in model.named_parameters():
            if name not in self.tensors:
                continue
            parameter.grad = None
            state = self.moments.get(name)
            if state is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = {k: _clone(_fitted(v, parameter)) for k, v in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON types."""
        return {"tensors": self.tensors, "moments": self.moments}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> HostSnapshot:
        """Read `state_dict`."""
        return cls(dict(state["tensors"]), dict(state["moments"]))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(own(t).numel() * t.element_size() for t in tensors)


def _fitted(value: Any, parameter: Tensor) -> Any:
    return like(value, parameter) if isinstance(value, Tensor) else value


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
