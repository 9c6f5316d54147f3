"""`KernelCache`: loaded kernels, compressed bundles, disk, library; verified whenever something moves up."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from esper.kasmina.cache.disk import DiskStore
from esper.kasmina.cache.memory import CompressedBundles
from esper.kasmina.cache.policy import GreedyDual
from esper.kasmina.cache.pressure import Allowance, allowance, available_share
from esper.kasmina.cache.stats import CacheStats
from esper.kasmina.kernels.rejection import KernelCorrupt, KernelUnfit, KernelUntrusted
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from esper.kasmina.cache.bundles import Fetched
    from esper.kasmina.kernels.kernel import Kernel
    from esper.kasmina.kernels.signing import TrustStore
    from esper.kasmina.kernels.target import Target
    from esper.kasmina.signature import Signature

__all__ = ["LOADED_OVERHEAD_BYTES", "KernelCache"]

_log = get_logger("esper.kasmina.cache")
LOADED_OVERHEAD_BYTES = 128 << 10
"""What a loaded kernel holds besides the bytes of its bundle: the objects of its graph. Measured as growth of the
process's private memory, the mean over portable kernels of 14 to 26 KB."""


class KernelCache:
    """Thread-safe; one per process. Made without touching torch or the disk.

    Args:
        directory: of the disk entries; None keeps nothing on disk.
        fetch: gets bundle and verdict of a kernel id from the library; called at most once at a time per id.
        trust: the keys believed now; asked on every promotion, so that a revocation counts from then on.
        loaded_bytes: bound of the loaded kernels, bundle and overhead each; what is held stays beyond it.
        memory_bytes: bound of the compressed bundles in memory.
        disk_bytes: bound of the files on disk.
        target: this machine; None finds out.
        available: share of memory that is available now, for `relieve`.
    """

    def __init__(
        self,
        directory: Path | None,
        fetch: Callable[[str], Fetched],
        trust: Callable[[], TrustStore],
        *,
        loaded_bytes: int = 512 << 20,
        memory_bytes: int = 128 << 20,
        disk_bytes: int = 8 << 30,
        target: Target | None = None,
        available: Callable[[], float] = available_share,
    ) -> None:
        self._disk = None if directory is None else DiskStore(directory, disk_bytes)
        self._memory = CompressedBundles(memory_bytes)
        self._fetch = fetch
        self._trust = trust
        self._target = target
        self._configured = (loaded_bytes, memory_bytes)
        self._available = available
        self._allowed = Allowance(1.0, 1.0, ahead=True)
        self._lock = threading.Lock()
        self._kernels: dict[str, Kernel] = {}
        self._policy = GreedyDual(loaded_bytes)
        self._pins: Counter[str] = Counter()
        self._flights: dict[str, Future[Kernel]] = {}
        self._stats = CacheStats()

    def get(self, kernel_id: str) -> Kernel | None:
        """The kernel when it is loaded, else None: microseconds either way, and the only call for a training thread."""
        with self._lock:
            kernel = self._kernels.get(kernel_id)
            if kernel is not None:
                self._stats.hits += 1
                self._policy.touch(kernel_id)
            return kernel

    def obtain(self, kernel_id: str, signature: Signature | None = None) -> Kernel:
        """The kernel, from wherever it is; threads that want the same one wait for one load.

        Raises:
            KernelRejected: its bytes, its verdict or its signature are not as they must be.
            EsperError: whatever `fetch` raises.
        """
        kernel = self.get(kernel_id)
        if kernel is None:
            kernel = self._board(kernel_id)
        if signature is not None and kernel.signature != signature:
            raise KernelUnfit(kernel_id, [f"its signature is {kernel.signature}, and {signature} is wanted"])
        return kernel

    def _board(self, kernel_id: str) -> Kernel:
        """Lead the load of a kernel, or wait for who leads it already."""
        with self._lock:
            # It may have landed since it was looked for: a second load would be for nothing.
            kernel = self._kernels.get(kernel_id)
            if kernel is not None:
                self._stats.hits += 1
                return kernel
            self._policy.touch(kernel_id)
            flight = self._flights.get(kernel_id)
            leader = flight is None
            if flight is None:
                self._stats.misses += 1
                flight = self._flights[kernel_id] = Future()
        if leader:
            self._fly(kernel_id, flight)
        return flight.result()

    @contextmanager
    def pin(self, kernel_id: str) -> Iterator[None]:
        """Keep a kernel loaded for the length of a block; see `hold` for uses that are no block."""
        self.hold(kernel_id)
        try:
            yield
        finally:
            self.release(kernel_id)

    def hold(self, kernel_id: str) -> None:
        """Count one user of a kernel, loaded yet or not; it does not leave before as many `release` calls."""
        with self._lock:
            self._pins[kernel_id] += 1
            self._policy.pin(kernel_id)

    def release(self, kernel_id: str) -> None:
        """Count one user less. May unload kernels, which takes its time: not for a training thread.

        Raises:
            InvalidInput: nobody holds it.
        """
        with self._lock:
            if self._pins[kernel_id] <= 0:
                raise InvalidInput(f"kernel {kernel_id:.80}: released more often than held")
            self._pins[kernel_id] -= 1
            if not self._pins[kernel_id]:
                del self._pins[kernel_id]
                self._policy.unpin(kernel_id)
            unloaded = self._let_go(self._policy.settle())
        del unloaded

    def forget(self, kernel_id: str) -> None:
        """Drop a kernel everywhere, held or not: it was quarantined."""
        with self._lock:
            self._flights.pop(kernel_id, None)  # what lands now is not kept
            self._policy.remove(kernel_id)
            unloaded = self._kernels.pop(kernel_id, None)
        del unloaded
        self._memory.drop(kernel_id)
        if self._disk is not None:
            self._disk.drop(kernel_id)

    def relieve(self) -> None:
        """Look how much memory is available and keep to it, by `esper.kasmina.cache.pressure`.

        Not for a training thread: it reads files and may unload kernels.
        """
        allowed = allowance(self._available())
        if allowed != self._allowed:
            level = _log.info if allowed.loaded == 1.0 else _log.warning
            level("kernel cache resized", **{k: round(float(v), 2) for k, v in allowed._asdict().items()})
        self._allowed = allowed
        loaded_bytes, memory_bytes = self._configured
        self._memory.resize(int(memory_bytes * allowed.compressed))
        with self._lock:
            unloaded = self._let_go(self._policy.settle(int(loaded_bytes * allowed.loaded)))
        del unloaded

    @property
    def roomy(self) -> bool:
        """False where memory was so scarce at the last look that nothing should be fetched ahead."""
        return self._allowed.ahead

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded kernels, each its bundle and `LOADED_OVERHEAD_BYTES`."""
        return self._policy.size

    @property
    def compressed_nbytes(self) -> int:
        """Bytes of the compressed bundles in memory."""
        return self._memory.nbytes

    @property
    def disk_nbytes(self) -> int:
        """Bytes of all files on disk, whichever process wrote them; reads the directory."""
        return 0 if self._disk is None else self._disk.nbytes()

    @property
    def stats(self) -> CacheStats:
        """A copy of the counters."""
        with self._lock:
            return replace(self._stats)

    def __contains__(self, kernel_id: str) -> bool:
        return kernel_id in self._kernels

    def _fly(self, kernel_id: str, flight: Future[Kernel]) -> None:
        try:
            kernel = self._load(kernel_id)
            self.relieve()
        except BaseException as error:  # noqa: BLE001  # every waiter gets it, whatever it is
            with self._lock:
                self._land(kernel_id, flight)
            flight.set_exception(error)
            return
        with self._lock:
            wanted = self._land(kernel_id, flight)
            unloaded = self._take_in(kernel_id, kernel) if wanted else []
        del unloaded
        if not wanted:
            self.forget(kernel_id)
        flight.set_result(kernel)

    def _land(self, kernel_id: str, flight: Future[Kernel]) -> bool:
        """Whether the flight is still the one of its kernel; not so when the kernel was forgotten on the way."""
        if self._flights.get(kernel_id) is not flight:
            return False
        del self._flights[kernel_id]
        return True

    def _take_in(self, kernel_id: str, kernel: Kernel) -> list[Kernel]:
        self._kernels[kernel_id] = kernel
        gone = self._policy.put(kernel_id, kernel.nbytes + LOADED_OVERHEAD_BYTES)
        declined = kernel_id in gone
        self._stats.declined += declined
        self._stats.evictions -= declined  # it is counted as either
        return self._let_go(gone)

    def _let_go(self, kernel_ids: list[str]) -> list[Kernel]:
        """Unlist kernels; the lock is held, so the caller drops what it is given after the lock: unloading is slow."""
        self._stats.evictions += len(kernel_ids)
        return [self._kernels.pop(kernel_id) for kernel_id in kernel_ids]

    def _load(self, kernel_id: str) -> Kernel:
        kernel = self._from_memory(kernel_id) or self._from_disk(kernel_id)
        if kernel is not None:
            return kernel
        self._count("fetches")
        fetched = self._fetch(kernel_id)
        kernel = self._verified(kernel_id, fetched)
        self._memory.write(kernel_id, fetched)
        if self._disk is not None:
            self._disk.write(kernel_id, fetched)
        return kernel

    def _from_memory(self, kernel_id: str) -> Kernel | None:
        stored = self._memory.read(kernel_id)
        return None if stored is None else self._promoted(kernel_id, stored, "memory", self._memory.drop)

    def _from_disk(self, kernel_id: str) -> Kernel | None:
        disk = self._disk
        stored = None if disk is None else disk.read(kernel_id)
        if disk is None or stored is None:
            return None
        kernel = self._promoted(kernel_id, stored, "disk", disk.drop)
        if kernel is not None:
            self._memory.write(kernel_id, stored)
        return kernel

    def _promoted(self, kernel_id: str, stored: Fetched, tier: str, drop: Callable[[str], None]) -> Kernel | None:
        """Verify and load what a tier held; None, and the entry dropped, where it may not be believed."""
        try:
            kernel = self._verified(kernel_id, stored)
        except (KernelCorrupt, KernelUntrusted) as error:
            # Below there may be sound bytes, or a verdict by a key that is still trusted.
            _log.warning("kernel dropped", tier=tier, kernel_id=kernel_id, reasons=list(error.reasons))
            self._count("corrupt")
            drop(kernel_id)
            return None
        self._count(f"{tier}_hits")
        return kernel

    def _verified(self, kernel_id: str, fetched: Fetched) -> Kernel:
        from esper.kasmina.kernels.load import load_kernel  # late: torch is imported by the thread that loads

        return load_kernel(fetched.bundle, fetched.verdict, self._trust(), kernel_id, None, self._target)

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self._stats, name, getattr(self._stats, name) + 1)
