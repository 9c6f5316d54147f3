"""Statistics of site outputs from a bounded sample on sampled steps, computed on a thread of their own.

On a sampled step the training thread copies at most `ROWS` rows of a few sites' outputs and asks for the gradient's
size there; no value is read back, so no device is waited for. Eigenvalues are taken by a worker thread. Between samples
there is no hook on the model. What was not measured is None.

Effective rank (O. Roy, M. Vetterli, *The effective rank*, EUSIPCO 2007) is exp of the entropy of the normalised
eigenvalues of the feature covariance.
"""

from __future__ import annotations

import math
import queue
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esper.kasmina._ports import Port, output_tensor, why_no_tensor
from esper.kasmina._quiet import harmless
from esper.kasmina.control import SiteHealth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from esper.kasmina.sites import Site

__all__ = ["ROWS", "HealthSampler", "Worker", "dead_fraction", "effective_rank"]

ROWS = 256
"""Rows of a sample: samples times positions."""
_BATCH = 32
_POSITIONS = ((), (ROWS // _BATCH,), (2, ROWS // _BATCH // 2))
"""Positions taken of each sample, by dimension: of a vector, a sequence, an image."""


def effective_rank(rows: NDArray[np.float64]) -> float | None:
    """Of (rows, features): between 1 and the number of features; None where nothing varies or a value is not finite."""
    if len(rows) < 2 or not np.isfinite(rows).all():
        return None
    centred = rows - rows.mean(axis=0)
    # The Gram matrix has the same non-zero eigenvalues as the covariance, and is smaller for wide sites.
    gram = centred.T @ centred if centred.shape[1] <= len(centred) else centred @ centred.T
    values = np.clip(np.linalg.eigvalsh(gram), 0.0, None)
    total = values.sum()
    if total <= 0.0:
        return None
    shares = values[values > 1e-12 * total] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def dead_fraction(rows: NDArray[np.float64]) -> float | None:
    """Share of features whose deviation is at most 1e-5 of the largest one's; None for fewer than two rows."""
    if len(rows) < 2 or not np.isfinite(rows).all():
        return None
    deviation = rows.std(axis=0)
    largest = deviation.max()
    return float((deviation <= 1e-5 * largest).mean()) if largest > 0.0 else 1.0


class Worker:
    """One daemon thread that runs small jobs in order; a full queue sheds the job and counts it.

    Args:
        limit: jobs that may wait.
    """

    def __init__(self, limit: int = 8) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(limit)
        self._thread: threading.Thread | None = None
        self.shed = 0
        self.failures = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; the thread starts with the first one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="esper-health", daemon=True)
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.shed += 1

    def drain(self, timeout_s: float) -> bool:
        """Wait until what is queued is done; False where that takes longer than `timeout_s`."""
        if self._thread is None:
            return True
        done = threading.Event()
        try:
            self._jobs.put(done.set, timeout=timeout_s)
        except queue.Full:
            return False
        return done.wait(timeout_s)

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread after what is queued; gives up waiting after `timeout_s`."""
        if self._thread is None:
            return
        try:
            self._jobs.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)
        self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # noqa: BLE001  # statistics must never end the thread that the next ones need
                self.failures += 1


class HealthSampler:
    """Measures a rotating choice of site outputs.

    Args:
        model: the host.
        sites: all sites of the run; those with the same output module are measured together.
        per_sample: output modules measured on one sampled step.
        worker: runs the linear algebra.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], worker: Worker, per_sample: int = 8) -> None:
        self._worker = worker
        self._per_sample = per_sample
        self._by_target: dict[str, list[Site]] = {}
        for site in sites:
            self._by_target.setdefault(site.target, []).append(site)
        self._targets = list(self._by_target)
        self._modules = {name: model.get_submodule(name) for name in self._targets}
        self.position = 0
        """Where the rotation stands; checkpointed."""
        self._taken: dict[str, tuple[Tensor, list[Tensor], int]] = {}
        self._found: dict[str, tuple[float | None, float | None, float | None]] = {}

    def install(self, count: int | None = None) -> list[RemovableHandle]:
        """Hooks for the forward that is about to run, at the outputs whose turn it is.

        Args:
            count: of outputs; None takes ``per_sample``.
        """
        count = min(self._per_sample if count is None else count, len(self._targets))
        chosen = [self._targets[(self.position + i) % len(self._targets)] for i in range(count)]
        self.position = (self.position + count) % max(1, len(self._targets))
        self._taken = {}
        return [self._modules[name].register_forward_hook(self._observe(name)) for name in chosen]

    def _observe(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        port = self._by_target[name][0].y

        @harmless
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if why_no_tensor(output):
                return
            y = output_tensor(output)
            gradients: list[Tensor] = []
            self._taken[name] = (_sample(y, port), gradients, y.numel())
            if y.requires_grad:

                @harmless
                def keep(gradient: Tensor) -> None:
                    gradients.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))

                y.register_hook(keep)  # type: ignore[no-untyped-call]  # torch leaves it untyped

        return hook

    def collect(self) -> None:
        """After the sampled step: hand what was taken to the worker."""
        taken, self._taken = self._taken, {}
        if taken:
            self._worker.submit(lambda: self._compute(taken))

    def _compute(self, taken: dict[str, tuple[Tensor, list[Tensor], int]]) -> None:
        for name, (sample, gradients, size) in taken.items():
            values = _rows(sample, self._by_target[name][0].y).numpy()
            norm = float(gradients[-1]) / size**0.5 if gradients else math.nan
            # A gradient that overflowed under a gradient scaler says nothing.
            self._found[name] = (effective_rank(values), dead_fraction(values), norm if math.isfinite(norm) else None)

    def take(self) -> tuple[SiteHealth, ...]:
        """What was measured since the last call, by site index."""
        found, self._found = self._found, {}
        return tuple(sorted(self._describe(found), key=lambda health: health.index))

    def _describe(self, found: dict[str, tuple[float | None, float | None, float | None]]) -> Iterable[SiteHealth]:
        for name, (rank, dead, gradient) in found.items():
            for site in self._by_target[name]:
                saturation = None if rank is None else min(1.0, rank / site.descriptor.narrowest_width)
                yield SiteHealth(
                    index=site.index,
                    effective_rank=rank,
                    saturation=saturation,
                    dead_fraction=dead,
                    gradient_norm=gradient,
                )

    def document(self) -> dict[str, Any]:
        """As JSON types: the rotation, and what was measured since the last boundary."""
        return {"position": self.position, "found": {name: list(values) for name, values in self._found.items()}}

    def restore(self, document: dict[str, Any]) -> None:
        """Read `document`."""
        self.position = document["position"]
        self._found = {name: (v[0], v[1], v[2]) for name, v in document["found"].items() if name in self._by_target}


def _sample(y: Tensor, port: Port) -> Tensor:
    """Evenly spaced samples and positions of y, copied, in the order of y: one slice, one copy."""
    spread = iter(_POSITIONS[port.layout.rank - 2])
    index = []
    for dim, size in enumerate(y.shape):
        if dim == port.feature_dim:
            index.append(slice(None))
        else:
            wanted = _BATCH if dim == port.batch_dim else next(spread, 1)
            index.append(slice(None, None, -(-size // wanted)))
    return y[tuple(index)].detach().clone()


def _rows(sample: Tensor, port: Port) -> Tensor:
    """(rows, features) of a sample, in float64 on the host."""
    features = sample.movedim(port.feature_dim, -1)
    return features.reshape(-1, features.shape[-1]).to("cpu", torch.float64)
