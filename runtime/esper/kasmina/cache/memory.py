"""Bundles in memory, compressed: between the loaded kernels and the disk, and all there is where there is no disk.

A portable bundle shrinks to about a fifth, so that a kernel which had to leave can come back without the library.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import zstandard

from esper.kasmina.cache.bundles import Fetched
from esper.kasmina.cache.policy import GreedyDual

if TYPE_CHECKING:
    from esper.kasmina.kernels.signing import SignedVerdict

__all__ = ["CompressedBundles"]

_LEVEL = 3
"""Of zstd: half a gigabyte per second on one core; higher ones are slower and save little more."""


class _Packed(NamedTuple):
    data: bytes
    size: int
    verdict: SignedVerdict | None


class CompressedBundles:
    """A bounded number of compressed bytes. Thread-safe; compresses and expands outside its lock.

    Args:
        capacity: compressed bytes; what stays is decided by `GreedyDual`.
    """

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        self._packed: dict[str, _Packed] = {}
        self._policy = GreedyDual(capacity)

    def read(self, kernel_id: str) -> Fetched | None:
        """The entry, unverified; None when there is none or it does not expand to what it was."""
        with self._lock:
            packed = self._packed.get(kernel_id)
            self._policy.touch(kernel_id)
        if packed is None:
            return None
        bundle = _expanded(packed)
        if bundle is None:
            self.drop(kernel_id)
            return None
        return Fetched(bundle, packed.verdict)

    def write(self, kernel_id: str, fetched: Fetched) -> None:
        """Offer an entry; the policy may decline it."""
        with self._lock:
            if kernel_id in self._packed or self._policy.capacity == 0:
                return
        data = zstandard.ZstdCompressor(level=_LEVEL).compress(fetched.bundle)
        with self._lock:
            self._packed[kernel_id] = _Packed(data, len(fetched.bundle), fetched.verdict)
            self._let_go(self._policy.put(kernel_id, len(data)))

    def drop(self, kernel_id: str) -> None:
        """Forget an entry; nothing happens when there is none."""
        with self._lock:
            self._policy.remove(kernel_id)
            self._packed.pop(kernel_id, None)

    def resize(self, capacity: int) -> None:
        """Shrink at once, or allow growth again."""
        with self._lock:
            self._let_go(self._policy.settle(capacity))

    @property
    def nbytes(self) -> int:
        """Compressed bytes."""
        return self._policy.size

    def __contains__(self, kernel_id: str) -> bool:
        return kernel_id in self._packed

    def _let_go(self, kernel_ids: list[str]) -> None:
        for kernel_id in kernel_ids:
            del self._packed[kernel_id]


def _expanded(packed: _Packed) -> bytes | None:
    try:
        # A damaged frame may name any size, and as much memory would be taken for it.
        if zstandard.frame_content_size(packed.data) != packed.size:
            return None
        return zstandard.ZstdDecompressor().decompress(packed.data)
    except zstandard.ZstdError:
        return None
