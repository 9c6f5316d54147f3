"""A thread for small jobs that must not cost the training thread anything, and copies that it waits for there."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

__all__ = ["HostCopy", "Worker"]


class HostCopy:
    """Tensors on their way to the host; made on the training thread, which does not wait, and awaited on another.

    Copies from a CUDA device go into pinned memory behind what the device has to do before; an event says when they
    are there. Tensors that are on the host already are handed through.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors: list[Tensor] = []
        self._events: dict[torch.device, torch.cuda.Event] = {}
        for tensor in tensors:
            if tensor.is_cuda:
                # torch pins the target of such a copy.
                self._tensors.append(tensor.detach().to("cpu", non_blocking=True))
                self._events[tensor.device] = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves its events untyped
            else:
                self._tensors.append(tensor)
        for device, event in self._events.items():
            event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[Tensor]:
        """The tensors, in order, once all of them are on the host."""
        for event in self._events.values():
            event.synchronize()
        return self._tensors


class Worker:
    """One daemon thread that runs small jobs in order; a full queue sheds the job and counts it.

    Args:
        limit: jobs that may wait.
    """

    def __init__(self, limit: int = 8) -> None:
        # Not `Queue`, whose locks are taken in Python: that costs the training thread more than all the rest of a job.
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._limit = limit
        self._thread: threading.Thread | None = None
        self.shed = 0
        self.failures = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; the thread starts with the first one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="esper-health", daemon=True)
            self._thread.start()
        if self._jobs.qsize() < self._limit:
            self._jobs.put(job)
        else:
            self.shed += 1

    def drain(self, timeout_s: float) -> bool:
        """Wait until what is queued is done; False where that takes longer than `timeout_s`."""
        if self._thread is None:
            return True
        done = threading.Event()
        self._jobs.put(done.set)
        return done.wait(timeout_s)

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread after what is queued; gives up waiting after `timeout_s`."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(timeout_s)
        self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # noqa: BLE001  # statistics must never end the thread that the next ones need
                self.failures += 1
