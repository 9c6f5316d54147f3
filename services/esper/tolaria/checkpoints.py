"""Checkpoints: everything that decides how a run goes on, in folders that are whole or not there.

A checkpoint is a folder ``b<boundary>-s<step>`` with ``state.pt`` (nested dictionaries of tensors and scalars, read
back with ``weights_only=True``), the bundles of the kernels in use, and ``manifest.json`` with the digest of each
file. It is written under another name, flushed and renamed; a torn or altered one is skipped on reading, and the one
before it is taken.

The training thread only copies tensors (`Snapshot`); `CheckpointWriter` writes from a thread of its own, newest first:
training never waits for a disk. Losing a checkpoint costs time, not exactness: a resume repeats the steps since the
last.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import shutil
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina.cache import Fetched
from esper.kasmina.kernels.signing import SignedVerdict
from esper.mesh.blobs import digest, digest_file
from esper.mesh.errors import Corrupt, EsperError, NotFound
from esper.mesh.logging import get_logger
from esper.tolaria.rundir import fsync_folder, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["FORMAT", "CheckpointStore", "CheckpointWriter", "Snapshot", "clone_tree"]

_log = get_logger(__name__)

FORMAT = 1
"""Version of the layout; another one is refused with a sentence."""
_NAME = re.compile(r"b(\d{6,})-s(\d{8,})")
_BUNDLE, _VERDICT = ".kernel", ".verdict"


def clone_tree(value: Any) -> Any:
    """Copy nested dictionaries, lists and tuples; tensors are copied to the CPU, everything else is shared."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: clone_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clone_tree(item) for item in value]
    if isinstance(value, tuple):
        return tuple(clone_tree(item) for item in value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole state of a run at one moment; owns its tensors."""

    boundary: int
    """Boundaries passed."""
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """Nested dictionaries, lists, tuples, tensors, scalars, texts and bytes."""
    kernels: tuple[str, ...] = ()
    """Ids of the kernels in use."""
    bundles: Mapping[str, Fetched] = field(default_factory=dict)
    """Bundles and verdicts of these kernels, where the snapshot was read from a checkpoint."""

    @property
    def name(self) -> str:
        """Name of its folder; sorts by position."""
        return f"b{self.boundary:06d}-s{self.step:08d}"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: created when missing; leftovers of a process that was killed while writing are removed.
        keep: checkpoints that stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self.bundle: Callable[[str], Fetched | None] = lambda _: None
        """Where bundles of kernels in use come from; without one a resume asks the library."""
        self._keep = keep
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob(".*"):
            shutil.rmtree(stray, ignore_errors=True)

    def names(self) -> list[str]:
        """Names of the checkpoints, oldest position first."""
        return sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def write(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint; on return it survives a power cut, and older ones beyond `keep` are gone.

        Raises:
            OSError: the disk is full or gone; nothing half-written stays.
        """
        target = self._folder / snapshot.name
        staged = self._folder / f".{snapshot.name}.{secrets.token_hex(4)}"
        staged.mkdir()
        try:
            buffer = io.BytesIO()
            torch.save(snapshot.state, buffer)
            files = {"state.pt": _write(staged / "state.pt", buffer.getvalue())}
            for kernel_id in snapshot.kernels:
                files |= self._kernel(staged, kernel_id)
            manifest = {
                "format": FORMAT,
                "boundary": snapshot.boundary,
                "step": snapshot.step,
                "torch": torch.__version__,
                "kernels": list(snapshot.kernels),
                "files": files,
            }
            write_json(staged / "manifest.json", manifest, durable=True)
            if target.exists():  # the same position again, after a rollback or a resume
                shutil.rmtree(target)
            staged.rename(target)
            fsync_folder(self._folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        self._prune(snapshot.name)
        return target

    def _kernel(self, staged: Path, kernel_id: str) -> dict[str, Any]:
        """Keep bundle and verdict of a kernel, linked from an earlier checkpoint: kernels never change."""
        names = [kernel_id.removeprefix("sha256:") + suffix for suffix in (_BUNDLE, _VERDICT)]
        for known in reversed(self.names()):
            if all((self._folder / known / name).is_file() for name in names):
                try:
                    for name in names:
                        os.link(self._folder / known / name, staged / name)
                except OSError:
                    break  # a file system without links: write them again
                return {name: _entry(staged / name) for name in names}
        fetched = self.bundle(kernel_id)
        if fetched is None:
            _log.warning("kernel not in the checkpoint: a resume will ask the library", kernel_id=kernel_id)
            return {}
        contents = (fetched.bundle, json.dumps(_verdict_document(fetched.verdict)).encode())
        return {name: _write(staged / name, data) for name, data in zip(names, contents, strict=True)}

    def _prune(self, newest: str) -> None:
        # What lies beyond the newest is of a future that was given up by resuming from an earlier boundary.
        names = self.names()
        for name in names:
            if name > newest:
                shutil.rmtree(self._folder / name, ignore_errors=True)
        kept = [name for name in names if name <= newest]
        for name in kept[: -self._keep]:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def has(self, boundary: int) -> bool:
        """Whether a checkpoint of this boundary is there."""
        return any(_position(name)[0] == boundary for name in self.names())

    def load(self, boundary: int | None = None) -> Snapshot | None:
        """The newest whole checkpoint (of a boundary, where one is named); None for a run that has none yet.

        Raises:
            NotFound: CHECKPOINT_NOT_FOUND, none of that boundary.
            Corrupt: CHECKPOINT_CORRUPT, there are checkpoints and every one is damaged.
        """
        names = [name for name in self.names() if boundary is None or _position(name)[0] == boundary]
        if boundary is not None and not names:
            have = sorted({_position(name)[0] for name in self.names()})
            raise NotFound(
                f"no checkpoint of boundary {boundary}: expected one of {', '.join(map(str, have)) or 'none'}",
                reason="CHECKPOINT_NOT_FOUND",
                metadata={"boundary": str(boundary)},
            )
        faults: list[str] = []
        for name in reversed(names):
            try:
                return self._read(self._folder / name)
            except (EsperError, OSError) as error:
                _log.warning("checkpoint skipped", checkpoint=name, error=str(error))
                faults.append(f"{name}: {error}")
        if faults:
            raise Corrupt(f"no whole checkpoint is left: {'; '.join(faults)}", reason="CHECKPOINT_CORRUPT")
        return None

    def _read(self, folder: Path) -> Snapshot:
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise Corrupt(
                f"checkpoint format: expected {FORMAT}, found {manifest.get('format')!r}", reason="CHECKPOINT_FORMAT"
            )
        for name, entry in manifest["files"].items():
            found = digest_file(folder / name)
            if found != entry["digest"]:
                raise Corrupt(
                    f"{name}: expected digest {entry['digest']}, found {found}",
                    reason="CHECKPOINT_CORRUPT",
                    metadata={"file": name},
                )
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        bundles = {kernel_id: _read_kernel(folder, kernel_id) for kernel_id in manifest["kernels"]}
        return Snapshot(
            boundary=manifest["boundary"],
            step=manifest["step"],
            state=state,
            kernels=tuple(manifest["kernels"]),
            bundles={kernel_id: fetched for kernel_id, fetched in bundles.items() if fetched is not None},
        )


def _read_kernel(folder: Path, kernel_id: str) -> Fetched | None:
    digits = kernel_id.removeprefix("sha256:")
    try:
        document = json.loads((folder / (digits + _VERDICT)).read_bytes())
        return Fetched((folder / (digits + _BUNDLE)).read_bytes(), _verdict_from_document(document))
    except FileNotFoundError:
        return None


def _verdict_document(verdict: SignedVerdict | None) -> dict[str, str] | None:
    if verdict is None:
        return None
    return {"statement": verdict.statement.hex(), "signature": verdict.signature.hex(), "key_id": verdict.key_id}


def _verdict_from_document(document: dict[str, str] | None) -> SignedVerdict | None:
    if document is None:
        return None
    return SignedVerdict(bytes.fromhex(document["statement"]), bytes.fromhex(document["signature"]), document["key_id"])


def _entry(path: Path) -> dict[str, Any]:
    return {"digest": digest_file(path), "size": path.stat().st_size}


def _position(name: str) -> tuple[int, int]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2])


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"digest": digest(data), "size": len(data)}


class CheckpointWriter:
    """Writes snapshots on a thread of its own: the newest waiting one; an older one that was not begun is passed over.

    A write that fails (full disk) is logged and counted; training goes on with the checkpoints it has.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._waiting: Snapshot | None = None
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self.failures = 0
        self.last_error = ""
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Hand a snapshot over; returns at once."""
        with self._changed:
            self._waiting = snapshot
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything handed over is written (or has failed)."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and not self._busy)

    def close(self) -> None:
        """Write what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    return
                self._busy = True
            try:
                self._store.write(snapshot)
            except Exception as error:  # noqa: BLE001  # a thread that died would leave `flush` waiting for ever
                self.failures += 1
                self.last_error = f"{type(error).__name__}: {error}"
                _log.error("checkpoint not written", checkpoint=snapshot.name, error=self.last_error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
