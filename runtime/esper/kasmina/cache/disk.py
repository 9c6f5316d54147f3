"""Bundles on disk: content-addressed, crash-safe, shared between processes, bounded.

Entries are immutable, named by their digest, written beside their place and renamed into it, so that several processes
may share one directory without locks: whoever comes second replaces an entry by an equal one. Nothing that is read is
believed: the cache verifies it.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from esper.kasmina.cache.bundles import Fetched, verdict_from_json, verdict_to_json
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

__all__ = ["DiskStore"]

_log = get_logger("esper.kasmina.cache")
_ABANDONED_AFTER_S = 3600.0


class DiskStore:
    """Bundles and their verdicts under their digests. Thread-safe.

    Args:
        directory: made at the first use when it does not exist.
        limit_bytes: of all files together; the entries used longest ago, by any process, go when it is exceeded.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit = limit_bytes
        self._tidied = False

    def read(self, kernel_id: str) -> Fetched | None:
        """The entry as it lies there, unverified; None when there is none or it cannot be read."""
        self._tidy()
        bundle_path, verdict_path = self._paths(kernel_id)
        try:
            verdict = verdict_from_json(verdict_path.read_text())
            bundle = bundle_path.read_bytes()
            os.utime(bundle_path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Fetched(bundle, verdict)

    def write(self, kernel_id: str, fetched: Fetched) -> None:
        """Keep an entry. A full or failing disk is logged and costs nothing but a later fetch."""
        self._tidy()
        bundle_path, verdict_path = self._paths(kernel_id)
        if fetched.verdict is None:
            return
        try:
            bundle_path.parent.mkdir(parents=True, exist_ok=True)
            self._place(verdict_path, verdict_to_json(fetched.verdict).encode())
            self._place(bundle_path, fetched.bundle)
            self._make_room(keep=bundle_path)
        except OSError as error:
            _log.warning("kernel not kept on disk", kernel_id=kernel_id, error=str(error))

    def drop(self, kernel_id: str) -> None:
        """Forget an entry; nothing happens when there is none."""
        for path in self._paths(kernel_id):
            path.unlink(missing_ok=True)

    def nbytes(self) -> int:
        """Bytes of all files, counted now: other processes write here too."""
        return sum(size for _, size, _ in self._entries())

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

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Last use, bytes of bundle and verdict, and path of each bundle; a verdict alone counts under its own path."""
        found = []
        for path in self._directory.glob("*/*.*"):
            if path.suffix not in {".kernel", ".verdict"}:
                continue
            beside = path.with_suffix(".kernel" if path.suffix == ".verdict" else ".verdict")
            if path.suffix == ".verdict" and beside.exists():
                continue
            with suppress(FileNotFoundError):  # another process made room too
                stat = path.stat()
                size = stat.st_size
                if path.suffix == ".kernel":
                    with suppress(FileNotFoundError):
                        size += beside.stat().st_size
                found.append((stat.st_mtime, size, path))
        return found

    def _make_room(self, keep: Path) -> None:
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._limit:
                break
            if path != keep:
                self.drop("sha256:" + path.stem)
                total -= size

    def _tidy(self) -> None:
        """Once: remove what a process left that was killed while it wrote."""
        if self._tidied:
            return
        self._tidied = True
        for path in self._directory.glob("*/.tmp-*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()
