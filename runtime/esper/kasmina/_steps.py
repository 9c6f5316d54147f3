"""Knows whether the optimizer has really stepped: a gradient scaler skips steps whose gradients overflowed.

Most skipped steps never reach the optimizer (`torch.amp.GradScaler` does not call it), nor do the micro-batches of an
accumulated one. Fused optimizers are called all the same and skip on the device, by ``optimizer.found_inf``; on a CPU
that is read, elsewhere it travels with the loss of the step and is known some steps later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from esper.kasmina._quiet import harmless

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["StepWatch", "gradient_scale"]


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """What the gradients are still multiplied by while this optimizer steps; None where they are what they say.

    A gradient scaler leaves the division to a fused optimizer, and says so by an attribute while that steps.
    """
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


class StepWatch:
    """Counts calls of a loop as steps only where the optimizer has stepped.

    Args:
        optimizer: the host's; one hook stands on it until `close`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(harmless(self._stepped))
        self._done = False
        self.seen = False
        """True once a step was seen."""
        self.doubt: Tensor | None = None
        """Above 0 on its device where the last step was skipped there after all; None where that is no question."""

    def _stepped(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self.seen, self._done, self.doubt = True, True, None
        found = getattr(self._optimizer, "found_inf", None)
        if isinstance(found, Tensor):
            if found.device.type == "cpu":
                self._done = not found.item()
            else:
                self.doubt = found.detach().clone()

    def take(self) -> bool:
        """Whether a step was done since the last call."""
        done, self._done = self._done, False
        if not done:
            self.doubt = None
        return done

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()
