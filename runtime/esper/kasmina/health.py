"""Statistics of site outputs from a bounded sample on sampled steps, computed on a thread of their own.

On a sampled step the training thread copies at most `ROWS` rows of a few outputs, their gradients and inputs; no value
is read back, so no device is waited for. On a CUDA device the outputs are not sampled but measured whole there, in one
pass (`ops.health`), together with the blend of a seed where one has just run. Spectra and regressions are taken by a
worker thread (`_spectrum`). Between samples there is no hook on the model. What was not measured is None.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.kasmina._place import ROWS, Place, Taken, rows_of
from esper.kasmina._spectrum import bottleneck, dead_fraction, effective_rank, saturation
from esper.kasmina._worker import HostCopy, Worker
from esper.kasmina.control import SiteHealth
from esper.kasmina.layout import SeedLayout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from esper.kasmina._columns import Columns, Snapshot
    from esper.kasmina._ports import Port
    from esper.kasmina.attach import SeedModule
    from esper.kasmina.sites import Site

__all__ = ["ROWS", "HealthSampler", "HostCopy", "Worker", "bottleneck", "dead_fraction", "effective_rank"]

_GRADIENT_EVERY = 8
"""Samples from one measurement of the host's gradient to the next: it reads every gradient, a sample a few rows."""
_SAVED = ("effective_rank", "dead_fraction", "rows", "site_gradient", "bottleneck")
_MEASURED = ("effective_rank", "dead_fraction", "rows")


class HealthSampler:
    """Measures a rotating choice of site outputs.

    Args:
        model: the host.
        sites: all sites of the run; those with the same output module are measured together.
        worker: runs the linear algebra.
        per_sample: output modules measured on one sampled step.
        statistics: where what is found is written, by the worker alone; None makes a place of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        worker: Worker,
        per_sample: int = 1,
        statistics: Columns | None = None,
    ) -> None:
        self._worker = worker
        self._per_sample = per_sample
        self._sites = {site.index: site for site in sites}
        self.statistics = SeedLayout(max(self._sites, default=-1) + 1).statistics if statistics is None else statistics
        by_target: dict[str, list[Site]] = {}
        for site in sites:
            by_target.setdefault(site.target, []).append(site)
        self._taken: dict[Place, Taken] = {}
        self._places = {name: Place(model, there, self._taken) for name, there in by_target.items()}
        self._order = list(self._places.items())
        self.position = 0
        """Outputs measured so far, in rotation; checkpointed."""
        self._samples = 0
        self._told = 0
        """The last sample that `take` has told of."""

    def due(self, step: int, every: int) -> bool:
        """Whether the forward after `step` is sampled: at first each, with every round over all outputs half as many.

        Growth decides early and wants to know all outputs soon; in the long run one step in `every` is sampled.
        """
        rounds = self.position // max(1, len(self._order))
        return step % min(every, 1 << min(rounds, 30)) == 0

    @property
    def wants_gradient(self) -> bool:
        """Whether the host's gradient is to be measured with the next sample: with the first, and some later ones."""
        return self.position // self._per_sample % _GRADIENT_EVERY == 0

    def install(
        self, blending: Mapping[str, SeedModule] | None = None, *, count: int | None = None, graded: bool = True
    ) -> list[RemovableHandle]:
        """Hooks for the forward that is about to run, at the outputs whose turn it is.

        Args:
            blending: the seed that blends an output last, by the name of the module.
            count: of outputs; None takes ``per_sample``.
            graded: False where no backward will follow.
        """
        total = len(self._order)
        count = min(self._per_sample if count is None else count, total)
        chosen = [self._order[(self.position + i) % total] for i in range(count)]
        turn = self.position // max(1, total) if graded else 0
        self.position += len(chosen)
        self._taken.clear()
        for name, place in chosen:
            place.seed = blending.get(name) if blending else None
        return [handle for _, place in chosen for handle in place.install(turn)]

    def collect(self) -> None:
        """After the sampled step: hand what was taken to the worker."""
        if not self._taken:
            return
        self._samples += 1
        number, taken = self._samples, list(self._taken.items())
        self._taken.clear()
        copies = [HostCopy(sample.tensors()) for _, sample in taken]

        def compute() -> None:
            for (place, sample), copy in zip(taken, copies, strict=True):
                sample.hosted(copy.wait())
                if sample.y is not None or sample.statistics is not None:
                    self._write(place.rows, number, _MEASURED, _measure(place.port, sample))
                elif sample.gradient is not None:
                    self._write(place.rows, number, ("site_gradient",), (_size(place.port, sample),))
                    if sample.site is not None:
                        self._write([sample.site.index], number, ("bottleneck",), (_weigh(place.port, sample),))

        self._worker.submit(compute)

    def _write(self, rows: Sequence[int], number: int, names: Sequence[str], values: Sequence[float | None]) -> None:
        with self.statistics.writing():
            for name, value in zip(names, values, strict=True):
                self.statistics[name][rows] = math.nan if value is None else value
            self.statistics["sample"][rows] = number

    def take(self) -> tuple[SiteHealth, ...]:
        """What was measured since the last call, by site index."""
        seen = self.statistics.snapshot()
        fresh = self._fresh(seen)
        self._told = int(seen["sample"].max(initial=self._told))
        return tuple(_describe(self._sites[row], seen, row) for row in fresh)

    def _fresh(self, seen: Snapshot) -> list[int]:
        return [row for row in np.flatnonzero(seen["sample"] > self._told).tolist() if row in self._sites]

    def document(self) -> dict[str, Any]:
        """As JSON types: the rotation, all that was measured, and of which of it `take` has not told."""
        seen = self.statistics.snapshot()
        measured = [row for row in np.flatnonzero(seen["sample"]).tolist() if row in self._sites]
        return {
            "position": self.position,
            "sites": {str(row): [_known(seen[name][row]) for name in _SAVED] for row in measured},
            "fresh": self._fresh(seen),
        }

    def restore(self, document: dict[str, Any]) -> None:
        """Read `document`; before the worker is given anything. Old ones hold the rotation alone."""
        self.position = document["position"]
        fresh = document.get("fresh", ())
        self._told, self._samples = self._samples + 1, self._samples + 2
        for row, values in document.get("sites", {}).items():
            if int(row) in self._sites:
                self._write([int(row)], self._samples if int(row) in fresh else self._told, _SAVED, values)


def _measure(port: Port, taken: Taken) -> tuple[float | None, ...]:
    """In the order of `_MEASURED`; on the worker's thread."""
    if taken.statistics is not None:
        values, dead = taken.statistics.sketch.double().numpy(), _known(float(taken.statistics.still_fraction))
    else:
        assert taken.y is not None
        values = rows_of(taken.y, port)
        dead = dead_fraction(values)
    total = taken.shape.numel() // taken.shape[port.feature_dim]
    return effective_rank(values), dead, min(len(values), total)


def _size(port: Port, taken: Taken) -> float | None:
    """Root mean square of the gradient; None where it overflowed under a gradient scaler, which says nothing."""
    if taken.norm is not None:
        size = float(taken.norm.norm / taken.norm.finite.sum().sqrt())
        return size if not taken.norm.nonfinite else None
    assert taken.gradient is not None
    size = float(np.sqrt(np.square(rows_of(taken.gradient, port)).mean()))
    return size if math.isfinite(size) else None


def _weigh(port: Port, taken: Taken) -> float | None:
    """The score of a branch; on the worker's thread."""
    parts = [rows_of(part, port) for part in (taken.branch, taken.own, taken.gradient) if part is not None]
    return bottleneck(*parts) if len(parts) == 3 else None


def _describe(site: Site, seen: Snapshot, row: int) -> SiteHealth:
    rank = _known(seen["effective_rank"][row])
    return SiteHealth(
        index=site.index,
        effective_rank=rank,
        saturation=saturation(rank, site.descriptor.narrowest_width, int(seen["rows"][row])),
        dead_fraction=_known(seen["dead_fraction"][row]),
        gradient_norm=_known(seen["site_gradient"][row]),
        bottleneck=_known(seen["bottleneck"][row]),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
