"""Where data that a user brings lies on disk; torch-free, so that a service can refuse a run without it at once."""

from __future__ import annotations

from pathlib import Path

from esper.mesh.errors import Conflict

__all__ = ["FOLDER", "TEST_FILE", "TRAIN_FILES", "find_cifar10"]

FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"


def find_cifar10(folder: str) -> Path:
    """The folder that holds all six files: `folder` itself or ``cifar-10-batches-bin`` in it.

    Raises:
        Conflict: DATA_MISSING; says what is missing, where it was looked for and how to give it.
    """
    how = (
        f"unpack cifar-10-binary.tar.gz and give the folder that it makes ({FOLDER}) with --data-dir, "
        "or as the override data.dir"
    )
    if not folder:
        raise Conflict(f"CIFAR-10 needs its files and no folder was given: {how}", reason="DATA_MISSING")
    base = Path(folder).expanduser()
    places = (base, base / FOLDER)
    missing: list[str] = []
    for place in places:
        missing = [name for name in (*TRAIN_FILES, TEST_FILE) if not (place / name).is_file()]
        if not missing:
            return place
        if len(missing) < len(TRAIN_FILES) + 1:
            raise Conflict(
                f"CIFAR-10 in {place} is not complete: missing {', '.join(missing)}; {how}",
                reason="DATA_MISSING",
                metadata={"missing": ", ".join(missing)},
            )
    raise Conflict(
        f"no CIFAR-10 here: looked for {TRAIN_FILES[0]} to {TRAIN_FILES[-1]} and {TEST_FILE} in {places[0]} "
        f"and in {places[1]}; {how}",
        reason="DATA_MISSING",
        metadata={"missing": ", ".join(missing)},
    )
