"""The ids that a topic remembers, so that an event that is published again is not stored again."""

from collections.abc import Mapping

__all__ = ["IdWindow", "from_place", "to_place"]


def to_place(partition: int, offset: int) -> int:
    """Partition (0 to 255) and offset as one number.

    A window holds 100,000 of these, and the garbage collector would walk through as many tuples.
    """
    return offset << 8 | partition


def from_place(place: int) -> tuple[int, int]:
    """Undo `to_place`: (partition, offset)."""
    return place & 255, place >> 8


class IdWindow:
    """Remembers at least the newest `size` ids of a topic, at most twice as many.

    Two generations instead of one ordered dictionary: forgetting costs nothing per event.

    Args:
        size: ids that are remembered for certain; 0 remembers nothing.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._young: dict[str, int] = {}
        self._old: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, event_id: str) -> int | None:
        """Place of an id, or None when it is not in the window."""
        found = self._young.get(event_id)
        return self._old.get(event_id) if found is None else found

    def generations(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """The younger and the older ids with their places, for loops that look up many."""
        return self._young, self._old

    def update(self, positions: Mapping[str, int]) -> None:
        """Remember ids that were stored, newest last."""
        if not self._size:
            return
        self._young.update(positions)
        if len(self._young) >= self._size:
            self._old = self._young
            self._young = {}
