"""The ids that a topic remembers, so that an event that is published again is not stored again."""

from collections.abc import Mapping

__all__ = ["IdWindow"]


class IdWindow:
    """Remembers at least the newest `size` ids of a topic, at most twice as many.

    Two generations instead of one ordered dictionary: forgetting costs nothing per event.

    Args:
        size: ids that are remembered for certain; 0 remembers nothing.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: dict[str, tuple[int, int]] = {}
        self._old: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, event_id: str) -> tuple[int, int] | None:
        """(partition, offset) of an id, or None when it is not in the window."""
        found = self._young.get(event_id)
        return self._old.get(event_id) if found is None else found

    def update(self, positions: Mapping[str, tuple[int, int]]) -> None:
        """Remember ids that were stored, newest last."""
        if not self._size:
            return
        self._young.update(positions)
        if len(self._young) >= self._size:
            self._old = self._young
            self._young = {}
