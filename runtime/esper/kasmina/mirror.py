"""Gives devices the state of all seeds: one asynchronous copy per step, and only where something has changed.

Typical use::

    mirror = DeviceMirror(layout)
    mirror.bind(seed)                       # from now on seed.alpha is a view into the mirror on its device
    layout.set_alpha(seed.index, 0.25)      # the host decides
    mirror.push()                           # once per step: nothing waits, all alphas that are due change at once

A seed's alpha stays a 0-dimensional buffer of its own module, so that checkpoints, copies and compiled graphs see what
they always saw; its memory is a place in one array for all seeds of a device. The host says an alpha when it has
changed it, and only then: what a checkpoint was loaded into, or what a blend that is driven on the device writes, is
not overwritten.

On a CUDA device the state travels as one block of bytes through pinned memory that torch's allocator does not give to
anybody else until the copy is done; on the CPU its columns are the host's own memory and nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.kasmina.layout import STATE

if TYPE_CHECKING:
    from esper.kasmina.attach import SeedModule
    from esper.kasmina.layout import SeedLayout

__all__ = ["DeviceMirror"]

_SLOT = 4
"""Elements from one alpha to the next: compiled code may suppose that an input starts at a multiple of 16 bytes."""


def _shares(device: torch.device) -> bool:
    """True where a device computes in the host's own memory."""
    return device.type == "cpu"


class _Side:
    """What one device holds.

    Args:
        layout: the host's side.
        device: where.
    """

    def __init__(self, layout: SeedLayout, device: torch.device) -> None:
        state = layout.state
        self.shared = _shares(device)
        self._host = torch.from_numpy(state.block)
        self._block = self._host if self.shared else torch.empty_like(self._host, device=device)
        self.columns: dict[str, Tensor] = {
            name: self._block[state.places[name]].view(getattr(torch, dtype.__name__.rstrip("_")))
            for name, dtype in STATE.items()
        }
        self.alphas = torch.zeros(len(layout), _SLOT, device=device)
        """What the seeds of this device compute with, in the first of each row."""
        self._first = self.alphas[:, 0]

    def push(self) -> None:
        """Take over the state and the alphas that are due."""
        if not self.shared:
            pinned = torch.empty_like(self._host, pin_memory=self._block.is_cuda).copy_(self._host)
            self._block.copy_(pinned, non_blocking=True)
        due, alpha = self.columns["alpha_due"], self.columns["alpha"]
        with torch.no_grad():
            self._first.copy_(torch.where(due, alpha, self._first))


class DeviceMirror:
    """See the module.

    Args:
        layout: the host's side.
    """

    def __init__(self, layout: SeedLayout) -> None:
        self._layout = layout
        self._sides: dict[torch.device, _Side] = {}
        self._seeds: dict[int, SeedModule] = {}
        self._pushed = -1

    def bind(self, seed: SeedModule) -> None:
        """Give a seed's alpha its place in the mirror of its device; it keeps its value."""
        device = seed.alpha.device
        if device not in self._sides:
            self._sides[device] = _Side(self._layout, device)
        place = self._sides[device].alphas[seed.index, 0]
        with torch.no_grad():
            place.copy_(seed.alpha)
        seed.alpha = place
        self._seeds[seed.index] = seed
        self._pushed = -1

    def release(self, index: int) -> None:
        """Give the alpha of a seed that leaves a memory of its own."""
        seed = self._seeds.pop(index, None)
        if seed is not None:
            seed.alpha = seed.alpha.detach().clone()

    def columns(self, device: torch.device) -> dict[str, Tensor]:
        """The columns of the state on a device that runs a seed, by name, as of the last push."""
        return self._sides[device].columns

    def push(self) -> None:
        """Bring the devices up to date; nothing where nothing has changed or no seed is bound."""
        layout = self._layout
        if self._pushed == layout.changes or not self._seeds:
            return
        due = layout.state["alpha_due"]
        for index, seed in self._seeds.items():
            if due[index] and not self._holds(seed):
                # The loop has moved the model, or taken its buffers for others, since: those are written one by one.
                with torch.no_grad():
                    seed.alpha.fill_(float(layout.alpha[index]))
        for side in self._sides.values():
            side.push()
        layout.alpha_given()
        self._pushed = layout.changes

    def _holds(self, seed: SeedModule) -> bool:
        side = self._sides.get(seed.alpha.device)
        return side is not None and seed.alpha.data_ptr() == side.alphas[seed.index].data_ptr()
