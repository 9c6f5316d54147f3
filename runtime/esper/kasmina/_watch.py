"""Keeps the way back open after each graft: a snapshot of the host of its own, and a window of its own.

A window lasts until the graft's ramp is complete and `Config.watch_steps` further optimizer steps are done; steps are
counted, not losses. A spike is blamed on every graft whose window is open, and the host goes back to before the first
of them. A seed that stays must never be turned back by the windows of others, so when one is kept (its window ends
well, or it becomes FOSSILIZED), what the others would go back to is taken anew: the network was sound just then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper.kasmina.spikes import HostSnapshot, SpikeDetector

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from torch import nn
    from torch.optim import Optimizer

    from esper.kasmina.config import Config

__all__ = ["GraftWatch"]


@dataclass(slots=True)
class _Window:
    left: int
    """Optimizer steps until it closes, once the ramp is complete."""
    snapshot: HostSnapshot | None
    """Where the host goes back to; None where it was too large."""


class GraftWatch:
    """The open windows of one host, in the order of the grafts.

    Args:
        model: the host.
        optimizer: the host's.
        config: options.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: Config) -> None:
        self.detector = SpikeDetector(threshold=config.spike_threshold, patience=config.spike_patience)
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._open: dict[int, _Window] = {}

    def __contains__(self, seed: object) -> bool:
        return seed in self._open

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds whose window is open, in the order of their grafts."""
        return tuple(self._open)

    @property
    def snapshot(self) -> HostSnapshot | None:
        """What a spike now would restore: the host before the first graft whose window is open."""
        return next((window.snapshot for window in self._open.values()), None)

    def begin(self, seed: int) -> None:
        """Open the window of a graft that is about to happen."""
        self._open[seed] = _Window(self._config.watch_steps, self._take())
        self.detector.arm()

    def forget(self, seed: int) -> None:
        """Close the window of a seed that is taken out."""
        if self._open.pop(seed, None) is not None and not self._open:
            self.detector.disarm()

    def fossilized(self, seed: int) -> None:
        """Close the window of a seed that is the host's own now; no other window may turn back what it was kept for."""
        self.forget(seed)
        self._renew(self._open)

    def step(self, ramping: Container[int]) -> None:
        """Count an optimizer step; windows of the seeds in `ramping` stay whole.

        A window does not close while high losses might still become a spike.
        """
        for seed, window in list(self._open.items()):
            if seed in ramping:
                continue
            window.left -= 1
            if window.left <= 0 and not self.detector.high:
                # Older windows would go back to a host that this seed has never lived in.
                older = self.seeds[: self.seeds.index(seed)]
                without = [other for other, entry in self._open.items() if entry.snapshot is None]
                self.forget(seed)
                self._renew({*older, *without} - {seed})

    def _renew(self, seeds: Iterable[int]) -> None:
        windows = [self._open[seed] for seed in seeds]
        for window in windows:
            window.snapshot = None
        fresh = self._take() if windows else None
        for window in windows:
            window.snapshot = fresh

    def _take(self) -> HostSnapshot | None:
        held = sum(snapshot.bytes for snapshot in self._held())
        return HostSnapshot.take(self._model, self._optimizer, max_bytes=max(0, self._config.snapshot_max_bytes - held))

    def _held(self) -> list[HostSnapshot]:
        """The snapshots, each once: several windows may share one."""
        return list({id(w.snapshot): w.snapshot for w in self._open.values() if w.snapshot is not None}.values())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON types."""
        held = self._held()
        places = {id(snapshot): place for place, snapshot in enumerate(held)}
        windows = [
            {"seed": seed, "left": w.left, "snapshot": None if w.snapshot is None else places[id(w.snapshot)]}
            for seed, w in self._open.items()
        ]
        return {
            "detector": self.detector.state_dict(),
            "windows": windows,
            "snapshots": [snapshot.state_dict() for snapshot in held],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.detector.load_state_dict(state["detector"])
        held = [HostSnapshot.from_state_dict(snapshot) for snapshot in state["snapshots"]]
        self._open = {
            window["seed"]: _Window(window["left"], None if window["snapshot"] is None else held[window["snapshot"]])
            for window in state["windows"]
        }
