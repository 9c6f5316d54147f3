"""The seam to the bytes of kernels, and its local edition: one file per blob, named by its digest.

A blob is written beside its place, flushed to the disk and renamed: it is there whole or not at all. It is verified
again whenever it is read. Every file operation runs in a thread; the event loop never waits for a disk.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Protocol

from esper.mesh.blobs import CHUNK_BYTES, is_digest
from esper.mesh.errors import Corrupt, InvalidInput, LimitExceeded

__all__ = ["BlobStore", "BlobWriter", "LocalBlobStore", "LocalBlobWriter"]

_SWEEP_BATCH = 500


class BlobWriter(Protocol):
    """One blob on its way in."""

    @property
    def size_bytes(self) -> int:
        """Bytes written so far."""

    async def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            LimitExceeded: BLOB_TOO_LARGE, DISK_FULL.
        """

    async def commit(self, digest: str) -> None:
        """Keep the blob under its digest, durably.

        Raises:
            Corrupt: DIGEST_MISMATCH, the bytes have another digest; nothing is kept.
            LimitExceeded: DISK_FULL.
        """

    async def abort(self) -> None:
        """Drop what was written; after `commit` nothing."""


class BlobStore(Protocol):
    """Immutable blobs by digest; editions pass the same conformance tests."""

    @property
    def max_bytes(self) -> int:
        """Size of the largest blob that is taken."""

    async def create(self) -> BlobWriter:
        """Begin a blob."""

    def read(self, digest: str, *, size_bytes: int) -> AsyncGenerator[bytes, None]:
        """Give the bytes of a blob in pieces of at most 1 MiB.

        Raises:
            Corrupt: BLOB_CORRUPT when the bytes no longer have their digest; after the last piece at the latest.
        """

    async def sweep(self, known: Callable[[Collection[str]], Awaitable[set[str]]], *, older_than_s: float) -> int:
        """Remove leftovers of uploads that never ended: unfinished ones, and blobs that `known` does not name.

        Args:
            known: digests -> those of them that are in use.
            older_than_s: younger leftovers may belong to an upload that is running on another server.
        """


class LocalBlobWriter:
    """Writes one blob into a file beside its place.

    Args:
        staged: the file; must not exist.
        place: digest -> final path.
        max_bytes: most that is taken.
    """

    def __init__(self, staged: Path, place: Callable[[str], Path], *, max_bytes: int) -> None:
        self._staged = staged
        self._place = place
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._size = 0
        self._file: IO[bytes] | None = staged.open("xb")

    @property
    def size_bytes(self) -> int:
        """Bytes written so far."""
        return self._size

    async def write(self, data: bytes) -> None:
        """Append bytes."""
        if self._size + len(data) > self._max_bytes:
            raise LimitExceeded(
                f"bundle: expected at most {self._max_bytes} bytes, found {self._size + len(data)} or more",
                reason="BLOB_TOO_LARGE",
                metadata={"max_bytes": str(self._max_bytes)},
            )
        self._size += len(data)
        with _disk_full():
            await asyncio.to_thread(self._append, data)

    async def commit(self, digest: str) -> None:
        """Keep the blob under its digest, durably."""
        found = "sha256:" + self._hash.hexdigest()
        if found != digest:
            await self.abort()
            raise Corrupt(
                f"bundle: expected digest {digest}, found {found} over {self._size} bytes",
                reason="DIGEST_MISMATCH",
                metadata={"expected": digest, "found": found},
            )
        with _disk_full():
            await asyncio.to_thread(self._keep, self._place(digest))

    async def abort(self) -> None:
        """Drop what was written; after `commit` nothing."""
        # A caller that is being cancelled must still leave no file behind.
        await asyncio.shield(asyncio.to_thread(self._drop))

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)

    def _keep(self, final: Path) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        final.parent.mkdir(parents=True, exist_ok=True)
        self._staged.replace(final)
        # The rename itself must survive a power cut too, and so must a directory that was just made.
        for directory in (final.parent, final.parent.parent):
            _sync_directory(directory)

    def _drop(self) -> None:
        if self._file is not None:
            # Closing flushes what is left, which a full disk refuses once more; it is not wanted anyway.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self._staged.unlink(missing_ok=True)


class LocalBlobStore:
    """Blobs as files of one directory: `sha256/ab/cdef...`, unfinished ones in `incoming/`.

    Args:
        root: directory; made when it is missing.
        max_bytes: size of the largest blob that is taken.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._root = root
        self._incoming = root / "incoming"
        self._max_bytes = max_bytes
        self._incoming.mkdir(parents=True, exist_ok=True)

    @property
    def max_bytes(self) -> int:
        """Size of the largest blob that is taken."""
        return self._max_bytes

    def path(self, digest: str) -> Path:
        """Where a blob lies, whether it is there or not.

        Raises:
            InvalidInput: the text is no digest.
        """
        if not is_digest(digest):
            raise InvalidInput(f"blob: expected sha256: and 64 lower-case hex digits, found {digest[:80]!r}")
        return self._root / "sha256" / digest[7:9] / digest[9:]

    async def create(self) -> LocalBlobWriter:
        """Begin a blob."""
        staged = self._incoming / f"{os.getpid()}-{secrets.token_hex(8)}"
        with _disk_full():
            return await asyncio.to_thread(LocalBlobWriter, staged, self.path, max_bytes=self._max_bytes)

    async def read(self, digest: str, *, size_bytes: int) -> AsyncGenerator[bytes, None]:
        """Give the bytes of a blob in pieces of at most 1 MiB."""
        file = await asyncio.to_thread(self._open, digest, size_bytes)
        state = hashlib.sha256()

        def piece() -> bytes:
            data = file.read(CHUNK_BYTES)
            state.update(data)
            return data

        try:
            while data := await asyncio.to_thread(piece):
                yield data
            found = "sha256:" + state.hexdigest()
            if found != digest:
                raise _corrupt(digest, f"bytes of digest {found}")
        finally:
            # close() of a file that was only read waits for nothing.
            file.close()

    def _open(self, digest: str, size_bytes: int) -> IO[bytes]:
        try:
            file = self.path(digest).open("rb")
        except FileNotFoundError:
            raise _corrupt(digest, "no file") from None
        found = os.fstat(file.fileno()).st_size
        if found != size_bytes:
            file.close()
            raise _corrupt(digest, f"{found} bytes instead of {size_bytes}")
        return file

    async def sweep(self, known: Callable[[Collection[str]], Awaitable[set[str]]], *, older_than_s: float) -> int:
        """Remove leftovers of uploads that never ended."""
        limit = time.time() - older_than_s
        removed = await asyncio.to_thread(lambda: _remove(list(self._incoming.iterdir()), limit))
        listing = await asyncio.to_thread(lambda: list(self._stored()))
        for start in range(0, len(listing), _SWEEP_BATCH):
            batch = dict(listing[start : start + _SWEEP_BATCH])
            used = await known(batch.keys())
            orphans = [path for digest, path in batch.items() if digest not in used]
            removed += await asyncio.to_thread(_remove, orphans, limit)
        return removed

    def _stored(self) -> Iterator[tuple[str, Path]]:
        for path in (self._root / "sha256").glob("*/*"):
            digest = f"sha256:{path.parent.name}{path.name}"
            if is_digest(digest):
                yield digest, path


def _remove(paths: Collection[Path], limit: float) -> int:
    removed = 0
    for path in paths:
        # Another server may be quicker.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime <= limit:
                path.unlink()
                removed += 1
    return removed


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _corrupt(digest: str, found: str) -> Corrupt:
    return Corrupt(
        f"bundle of kernel {digest}: expected the bytes that were stored, found {found}",
        reason="BLOB_CORRUPT",
        metadata={"kernel_id": digest},
    )


@contextlib.contextmanager
def _disk_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise LimitExceeded("the disk of the library is full", reason="DISK_FULL", private=str(error)) from error
        raise
