"""The size of the host's gradient, taken when the optimizer has just stepped: afterwards the loop may clear it.

A hook stands on the optimizer only for a step on which somebody wants to know. It runs after the step, since a step
that is given a closure has no gradient before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina._quiet import harmless
from esper.kasmina._shards import whole
from esper.kasmina._steps import gradient_scale
from esper.kasmina.newborn import host_groups

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

__all__ = ["Gradient", "HostGradient"]


@dataclass(frozen=True, slots=True)
class Gradient:
    """Of one optimizer step, over all parameters of the host that had one."""

    norm: Tensor
    """L2 norm; a device scalar."""
    elements: int

    @property
    def rms(self) -> Tensor:
        """Root mean square per parameter; a device scalar."""
        rms: Tensor = self.norm / self.elements**0.5
        return rms


class HostGradient:
    """Looks at the gradient of the host's own groups on steps for which it was wanted.

    Args:
        optimizer: the host's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._hook: RemovableHandle | None = None
        self._found: Gradient | None = None

    def want(self) -> None:
        """Have the next optimizer step looked at."""
        if self._hook is None:
            self._hook = self._optimizer.register_step_post_hook(harmless(self._look))

    def _look(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        gradients = [p.grad for group in host_groups(self._optimizer) for p in group["params"] if p.grad is not None]
        if gradients:
            norm, scale = whole(torch.nn.utils.get_total_norm(gradients)), gradient_scale(self._optimizer)
            self._found = Gradient(norm if scale is None else norm / scale, sum(g.numel() for g in gradients))

    def take(self) -> Gradient | None:
        """What the last step showed; None where it was not wanted or there was none. The hook goes."""
        found, self._found = self._found, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return found
