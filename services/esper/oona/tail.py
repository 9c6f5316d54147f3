"""The newest events of every partition, kept in memory for those who read along."""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from esper.oona.records import StoredEvent
from esper.oona.sequencer import Chunk

__all__ = ["TailCache"]

_OVERHEAD = 256
"""Bytes that an event costs in memory beside its data, roughly."""


class TailCache:
    """Chunks in the order in which they were stored; the oldest leave first, whoever they belong to.

    Args:
        budget: bytes to keep, roughly; the newest chunk always stays.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._size = 0
        self._order: deque[tuple[list[Chunk], int]] = deque()
        self._chunks: dict[tuple[str, int], list[Chunk]] = {}

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk that follows the one before it in its partition."""
        own = self._chunks.setdefault((chunk.topic, chunk.partition), [])
        cost = chunk.size + _OVERHEAD * len(chunk.ids)
        own.append(chunk)
        self._order.append((own, cost))
        self._size += cost
        while self._size > self._budget and len(self._order) > 1:
            oldest, cost = self._order.popleft()
            del oldest[0]
            self._size -= cost

    def get(self, topic: str, partition: int, offset: int, most: int) -> Sequence[StoredEvent] | None:
        """Up to `most` events of one chunk from an offset on; None when they are not here."""
        own = self._chunks.get((topic, partition))
        if not own or own[0].base > offset:
            return None
        place = len(own) - 1
        if own[place].base > offset:
            place = bisect_right(own, offset, key=_base) - 1
        chunk = own[place]
        begin = offset - chunk.base
        return chunk.events(begin, begin + most) or None


def _base(chunk: Chunk) -> int:
    return chunk.base
