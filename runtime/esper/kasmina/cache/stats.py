"""What a cache counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheStats"]


@dataclass(slots=True)
class CacheStats:
    """Counters since the cache was made."""

    hits: int = 0
    """Answered with a loaded kernel."""
    misses: int = 0
    """Had to be loaded; each is one of the next three, or failed."""
    memory_hits: int = 0
    """Loaded from the compressed bundles in memory."""
    disk_hits: int = 0
    """Loaded from disk."""
    fetches: int = 0
    """Asked of the library."""
    corrupt: int = 0
    """Entries of memory and disk that were dropped because their digest, verdict or key did not hold any more."""
    evictions: int = 0
    """Loaded kernels that left for room."""
    declined: int = 0
    """Kernels that were loaded, given to whoever asked, and not kept, because all that was there was worth more."""
