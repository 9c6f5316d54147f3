"""Reads the probes of seeds without waiting for a device: a copy is begun, and looked at when it has arrived."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from esper.kasmina._seed import SeedRun

__all__ = ["ProbeReader"]


class ProbeReader:
    """See the module."""

    def __init__(self) -> None:
        self._pending: deque[tuple[list[SeedRun], Tensor, torch.cuda.Event]] = deque()

    def read(self, runs: Sequence[SeedRun]) -> None:
        """Mark the guards of seeds whose probe is not finite any more, and begin the next copies."""
        away: dict[torch.device, list[SeedRun]] = {}
        for run in runs:
            assert run.attachment is not None
            probe = run.attachment.seed.probe
            if probe.device.type == "cuda":
                away.setdefault(probe.device, []).append(run)
            elif not math.isfinite(probe.item()):
                self._mark(run)
        for some in away.values():
            self._send(some)
        while self._pending and self._pending[0][2].query():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            sent, values, _ = self._pending.popleft()
            for run, value in zip(sent, values.tolist(), strict=True):
                if not math.isfinite(value) and run.attachment is not None:
                    self._mark(run)

    def _send(self, runs: list[SeedRun]) -> None:
        probes = torch.stack([run.attachment.seed.probe for run in runs if run.attachment is not None])
        copy = probes.to("cpu", non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves its events untyped
        event.record()
        self._pending.append((runs, copy, event))

    @staticmethod
    def _mark(run: SeedRun) -> None:
        assert run.attachment is not None
        seed = run.attachment.seed
        seed.probe.zero_()
        seed.guard.suspect = max(seed.guard.suspect, 1)
