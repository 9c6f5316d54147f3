"""The kernels of this process: loaded, else compressed in memory, else on disk, else in the library.

`KernelCache.get` answers with what is loaded, in microseconds, and is what a training thread may call.
`KernelCache.obtain` goes all the way and belongs on a background thread::

    cache = KernelCache(directory, fetch=library.download, trust=keys.current)
    pool.submit(cache.obtain, kernel_id, site.signature)     # in the background
    kernel = cache.get(kernel_id)                            # at the boundary: the kernel, or None when not there yet
    with cache.pin(kernel_id): ...                           # in use: never unloaded

What stays is decided by `policy`, what memory may be taken by `pressure`; `disk` is shared by all processes that are
given the same directory. Digest and verdict are verified whenever a bundle moves up, from whichever tier.
"""

from __future__ import annotations

from esper.kasmina.cache.bundles import Fetched
from esper.kasmina.cache.disk import DiskStore
from esper.kasmina.cache.stats import CacheStats
from esper.kasmina.cache.tiers import LOADED_OVERHEAD_BYTES, KernelCache

__all__ = ["LOADED_OVERHEAD_BYTES", "CacheStats", "DiskStore", "Fetched", "KernelCache"]
