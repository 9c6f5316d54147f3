"""Which partition an event belongs to: a stable function of its key, so that order per key survives restarts."""

from zlib import crc32

__all__ = ["partition_of"]


def partition_of(key: str, event_id: str, partitions: int) -> int:
    """The partition (0 to `partitions` - 1) of an event.

    Events of one key share a partition for ever; events without a key are spread by their id. CRC-32 is the same on
    every machine and in every process, unlike Python's `hash`.
    """
    return crc32((key or event_id).encode()) % partitions
