"""The kernels of this process: memory, then disk, then the library; verified whenever they move up.

`KernelCache.get` answers from memory alone, in microseconds, and is what a training thread may call.
`KernelCache.obtain` goes all the way and belongs on a background thread::

    cache = KernelCache(directory, fetch=library.download, trust=keys.current)
    pool.submit(cache.obtain, kernel_id, site.signature)     # in the background
    kernel = cache.get(kernel_id)                            # at the boundary: the kernel, or None when not there yet
    with cache.pin(kernel_id): ...                           # in use: never evicted

Several processes may share one directory: entries are immutable, named by their content and renamed into place.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from esper.kasmina.kernels.load import load_kernel
from esper.kasmina.kernels.rejection import KernelCorrupt, KernelUnfit, KernelUntrusted
from esper.kasmina.kernels.signing import SignedVerdict
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from esper.kasmina.kernels.kernel import Kernel
    from esper.kasmina.kernels.signing import TrustStore
    from esper.kasmina.kernels.target import Target
    from esper.kasmina.signature import Signature

__all__ = ["CacheStats", "DiskStore", "Fetched", "KernelCache"]

_log = get_logger("esper.kasmina.cache")
_ABANDONED_AFTER_S = 3600.0


class Fetched(NamedTuple):
    """What the library gives for a kernel id."""

    bundle: bytes
    verdict: SignedVerdict | None


@dataclass(slots=True)
class CacheStats:
    """Counters since the cache was made."""

    hits: int = 0
    """Answered from memory."""
    misses: int = 0
    """Not in memory when asked for."""
    disk_hits: int = 0
    """Loaded from disk."""
    fetches: int = 0
    """Fetched from the library."""
    corrupt: int = 0
    """Disk entries that were dropped because they were not what they claimed to be."""
    evictions: int = 0
    """Kernels dropped from memory for room."""


class DiskStore:
    """Bundles and their verdicts under their digests; crash-safe, bounded, shared between processes.

    Args:
        directory: made when it does not exist.
        limit_bytes: the entries used longest ago go when this is exceeded.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit = limit_bytes
        directory.mkdir(parents=True, exist_ok=True)
        self._drop_abandoned()

    def read(self, kernel_id: str) -> Fetched | None:
        """The entry as it lies there, unverified; None when there is none or it cannot be read."""
        bundle_path, verdict_path = self._paths(kernel_id)
        try:
            verdict = _verdict_from_json(verdict_path.read_text())
            bundle = bundle_path.read_bytes()
            os.utime(bundle_path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Fetched(bundle, verdict)

    def write(self, kernel_id: str, fetched: Fetched) -> None:
        """Keep an entry. A full or failing disk is logged and costs nothing but a later fetch."""
        bundle_path, verdict_path = self._paths(kernel_id)
        if fetched.verdict is None:
            return
        try:
            bundle_path.parent.mkdir(exist_ok=True)
            self._place(verdict_path, _verdict_to_json(fetched.verdict).encode())
            self._place(bundle_path, fetched.bundle)
            self._make_room(keep=bundle_path)
        except OSError as error:
            _log.warning("kernel not kept on disk", kernel_id=kernel_id, error=str(error))

    def drop(self, kernel_id: str) -> None:
        """Forget an entry; nothing happens when there is none."""
        for path in self._paths(kernel_id):
            path.unlink(missing_ok=True)

    def _paths(self, kernel_id: str) -> tuple[Path, Path]:
        digest = kernel_id.removeprefix("sha256:")
        if len(digest) != 64 or digest.strip("0123456789abcdef"):
            raise InvalidInput(f"kernel id: expected sha256: and 64 hexadecimal digits, found {kernel_id!r:.100}")
        folder = self._directory / digest[:2]
        return folder / f"{digest}.kernel", folder / f"{digest}.verdict"

    def _place(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        # The rename itself is durable only when the directory is.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _make_room(self, keep: Path) -> None:
        entries = []
        for path in self._directory.glob("*/*.kernel"):
            with suppress(FileNotFoundError):  # another process made room too
                stat = path.stat()
                entries.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._limit:
                break
            if path != keep:
                self.drop("sha256:" + path.stem)
                total -= size

    def _drop_abandoned(self) -> None:
        """Remove what a process left that was killed while it wrote."""
        for path in self._directory.glob("*/.tmp-*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()


class KernelCache:
    """Thread-safe; one per process.

    Args:
        directory: of the disk entries; None keeps nothing on disk.
        fetch: gets bundle and verdict of a kernel id from the library; called at most once at a time per id.
        trust: the keys believed now; asked on every promotion, so that a revocation counts from then on.
        memory_bytes: kernels used longest ago leave memory when this is exceeded; pinned ones stay.
        disk_bytes: the same for the disk.
        target: this machine; None finds out.
    """

    def __init__(
        self,
        directory: Path | None,
        fetch: Callable[[str], Fetched],
        trust: Callable[[], TrustStore],
        *,
        memory_bytes: int = 512 << 20,
        disk_bytes: int = 8 << 30,
        target: Target | None = None,
    ) -> None:
        self._disk = None if directory is None else DiskStore(directory, disk_bytes)
        self._fetch = fetch
        self._trust = trust
        self._limit = memory_bytes
        self._target = target
        self._lock = threading.Lock()
        self._kernels: OrderedDict[str, Kernel] = OrderedDict()
        self._bytes = 0
        self._pins: Counter[str] = Counter()
        self._flights: dict[str, Future[Kernel]] = {}
        self._stats = CacheStats()

    def get(self, kernel_id: str) -> Kernel | None:
        """The kernel when it is in memory, else None at once: no disk, no network."""
        with self._lock:
            kernel = self._kernels.get(kernel_id)
            if kernel is None:
                self._stats.misses += 1
            else:
                self._stats.hits += 1
                self._kernels.move_to_end(kernel_id)
            return kernel

    def obtain(self, kernel_id: str, signature: Signature | None = None) -> Kernel:
        """The kernel, from wherever it is; threads that want the same one wait for one load.

        Raises:
            KernelRejected: its bytes, its verdict or its signature are not as they must be.
            EsperError: whatever `fetch` raises.
        """
        kernel = self.get(kernel_id)
        if kernel is None:
            with self._lock:
                flight = self._flights.get(kernel_id)
                leader = flight is None
                if flight is None:
                    flight = self._flights[kernel_id] = Future()
            if leader:
                self._fly(kernel_id, flight)
            kernel = flight.result()
        if signature is not None and kernel.signature != signature:
            raise KernelUnfit(kernel_id, [f"its signature is {kernel.signature}, and {signature} is wanted"])
        return kernel

    @contextmanager
    def pin(self, kernel_id: str) -> Iterator[None]:
        """Keep a kernel in memory for the length of a block; see `hold` for uses that are no block."""
        self.hold(kernel_id)
        try:
            yield
        finally:
            self.release(kernel_id)

    def hold(self, kernel_id: str) -> None:
        """Count one user of a kernel; it is not evicted before as many `release` calls."""
        with self._lock:
            self._pins[kernel_id] += 1

    def release(self, kernel_id: str) -> None:
        """Count one user less.

        Raises:
            InvalidInput: nobody holds it.
        """
        with self._lock:
            if self._pins[kernel_id] <= 0:
                raise InvalidInput(f"kernel {kernel_id:.80}: released more often than held")
            self._pins[kernel_id] -= 1
            self._pins += Counter()  # drops the zeros
            self._evict()

    def forget(self, kernel_id: str) -> None:
        """Drop a kernel from memory and disk, pinned or not: it was quarantined, or a seed's reset asks for it."""
        with self._lock:
            kernel = self._kernels.pop(kernel_id, None)
            self._bytes -= 0 if kernel is None else kernel.nbytes
        if self._disk is not None:
            self._disk.drop(kernel_id)

    @property
    def nbytes(self) -> int:
        """Bytes of the kernels in memory."""
        return self._bytes

    @property
    def stats(self) -> CacheStats:
        """A copy of the counters."""
        with self._lock:
            return CacheStats(*(getattr(self._stats, f.name) for f in fields(CacheStats)))

    def __contains__(self, kernel_id: str) -> bool:
        return kernel_id in self._kernels

    def _fly(self, kernel_id: str, flight: Future[Kernel]) -> None:
        try:
            kernel = self._load(kernel_id)
        except BaseException as error:  # noqa: BLE001  # every waiter gets it, whatever it is
            with self._lock:
                del self._flights[kernel_id]
            flight.set_exception(error)
            return
        with self._lock:
            del self._flights[kernel_id]
            self._kernels[kernel_id] = kernel
            self._bytes += kernel.nbytes
            self._evict()
        flight.set_result(kernel)

    def _load(self, kernel_id: str) -> Kernel:
        stored = None if self._disk is None else self._disk.read(kernel_id)
        if stored is not None and self._disk is not None:
            try:
                kernel = self._verified(kernel_id, stored)
            except (KernelCorrupt, KernelUntrusted) as error:
                # The library may have sound bytes, or a verdict by a key that is still trusted.
                _log.warning("kernel dropped from disk", kernel_id=kernel_id, reasons=list(error.reasons))
                self._count("corrupt")
                self._disk.drop(kernel_id)
            else:
                self._count("disk_hits")
                return kernel
        self._count("fetches")
        fetched = self._fetch(kernel_id)
        kernel = self._verified(kernel_id, fetched)
        if self._disk is not None:
            self._disk.write(kernel_id, fetched)
        return kernel

    def _verified(self, kernel_id: str, fetched: Fetched) -> Kernel:
        return load_kernel(fetched.bundle, fetched.verdict, self._trust(), kernel_id, None, self._target)

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self._stats, name, getattr(self._stats, name) + 1)

    def _evict(self) -> None:
        """Make room, oldest use first; the lock is held."""
        for kernel_id in list(self._kernels):
            if self._bytes <= self._limit:
                return
            if not self._pins[kernel_id]:
                self._bytes -= self._kernels.pop(kernel_id).nbytes
                self._stats.evictions += 1


def _verdict_to_json(verdict: SignedVerdict) -> str:
    coded = {key: base64.b64encode(getattr(verdict, key)).decode() for key in ("statement", "signature")}
    return json.dumps(coded | {"key_id": verdict.key_id})


def _verdict_from_json(text: str) -> SignedVerdict:
    document = json.loads(text)
    statement, signature = (base64.b64decode(document[key], validate=True) for key in ("statement", "signature"))
    return SignedVerdict(statement, signature, str(document["key_id"]))
