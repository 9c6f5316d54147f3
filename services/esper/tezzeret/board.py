"""What the forge does, for those who watch: the last step of each build under way, then each step as it happens."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from esper.mesh.streams import BoundedQueue, Overflow
from esper.tezzeret.orders import Phase, Step

__all__ = ["Board"]

WATCHER_QUEUE = 1024
"""Steps that a watcher may be behind before it loses the oldest."""


@dataclass
class Board:
    """Steps of builds. Belongs to one event loop."""

    succeeded: int = 0
    """Builds that succeeded since the start."""
    failed: int = 0
    """Attempts that failed since the start."""
    _under_way: dict[str, Step] = field(default_factory=dict)
    _watchers: set[BoundedQueue[Step]] = field(default_factory=set)

    def post(self, step: Step) -> None:
        """Note a step and tell it to every watcher; never waits."""
        if step.phase.final:
            self._under_way.pop(step.order.build_id, None)
            self.succeeded += step.phase is Phase.SUCCEEDED
            self.failed += step.phase is Phase.FAILED
        else:
            self._under_way[step.order.build_id] = step
        for queue in self._watchers:
            queue.put(step)

    def abandon(self, build_id: str) -> None:
        """Forget a build that somebody else will do: its lease was lost, or the forge drains."""
        self._under_way.pop(build_id, None)

    @contextlib.contextmanager
    def watch(self) -> Iterator[BoundedQueue[Step]]:
        """A queue that begins with the last step of each build under way."""
        queue: BoundedQueue[Step] = BoundedQueue(WATCHER_QUEUE, Overflow.DROP_OLDEST)
        for step in self._under_way.values():
            queue.put(step)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)
