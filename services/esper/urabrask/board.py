"""The newest verdicts, for those who watch: bounded, the oldest dropped first."""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from esper.kasmina.kernels.signing import SignedVerdict, Statement
from esper.mesh.streams import BoundedQueue, Overflow

__all__ = ["Board", "Judgement"]

KEPT = 32
"""Verdicts that a new watcher gets first."""
WATCHER_QUEUE = 256
"""Verdicts that may wait for a slow watcher."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict as signed, and what its bytes say."""

    statement: Statement
    signed: SignedVerdict


@dataclass
class Board:
    """Verdicts as they are given. Belongs to one event loop."""

    validated: int = 0
    """Kernels validated since the start."""
    rejected: int = 0
    """Kernels rejected since the start."""
    _kept: deque[Judgement] = field(default_factory=lambda: deque(maxlen=KEPT))
    _watchers: set[BoundedQueue[Judgement]] = field(default_factory=set)

    def post(self, judgement: Judgement) -> None:
        """Count a verdict and tell it to every watcher; never waits."""
        if judgement.statement.passed:
            self.validated += 1
        else:
            self.rejected += 1
        self._kept.append(judgement)
        for queue in self._watchers:
            queue.put(judgement)

    @contextlib.contextmanager
    def watch(self) -> Iterator[BoundedQueue[Judgement]]:
        """A queue that begins with the verdicts kept, oldest first, and goes on with new ones."""
        queue: BoundedQueue[Judgement] = BoundedQueue(WATCHER_QUEUE, Overflow.DROP_OLDEST)
        for judgement in self._kept:
            queue.put(judgement)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)
