"""Blobs: whole or not at all, verified on the way in and on the way out."""

import errno
import hashlib
import os
from collections.abc import Collection
from pathlib import Path

import pytest

from esper.mesh.errors import Corrupt, InvalidInput, LimitExceeded
from esper.urza.blob_store import LocalBlobStore


def digest_of(data: bytes) -> str:
    """Content address."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def put(store: LocalBlobStore, data: bytes) -> str:
    """Store a blob in two pieces."""
    writer = await store.create()
    await writer.write(data[:10])
    await writer.write(data[10:])
    await writer.commit(digest_of(data))
    return digest_of(data)


async def get(store: LocalBlobStore, digest: str, size: int) -> bytes:
    """Read a blob."""
    return b"".join([piece async for piece in store.read(digest, size_bytes=size)])


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobStore:
    """An empty store of up to 4 MiB a blob."""
    return LocalBlobStore(tmp_path / "blobs", max_bytes=4 << 20)


def files(store: LocalBlobStore) -> list[Path]:
    """Every file of a store."""
    return [path for path in store._root.rglob("*") if path.is_file()]


async def test_what_goes_in_comes_out(store: LocalBlobStore) -> None:
    """A blob larger than a chunk comes back byte by byte, in pieces of at most 1 MiB."""
    data = os.urandom(2_500_000)
    digest = await put(store, data)
    pieces = [piece async for piece in store.read(digest, size_bytes=len(data))]
    assert data == b"".join(pieces)
    assert [1 << 20, 1 << 20, len(data) - (2 << 20)] == [len(piece) for piece in pieces]
    assert [store.path(digest)] == files(store)


async def test_a_wrong_digest_keeps_nothing(store: LocalBlobStore) -> None:
    """Bytes that are not what was promised are not kept anywhere."""
    writer = await store.create()
    await writer.write(b"some bytes")
    with pytest.raises(Corrupt) as caught:
        await writer.commit(digest_of(b"other bytes"))
    assert "DIGEST_MISMATCH" == caught.value.reason
    assert [] == files(store)


async def test_an_abort_keeps_nothing(store: LocalBlobStore) -> None:
    """An upload that ends early leaves no file; an abort after the commit changes nothing."""
    writer = await store.create()
    await writer.write(b"some bytes")
    await writer.abort()
    await writer.abort()
    assert [] == files(store)
    done = await store.create()
    await done.write(b"some bytes")
    await done.commit(digest_of(b"some bytes"))
    await done.abort()
    assert b"some bytes" == await get(store, digest_of(b"some bytes"), 10)


async def test_too_large(store: LocalBlobStore) -> None:
    """One byte more than the limit is refused while it arrives."""
    writer = await store.create()
    for _ in range(4):
        await writer.write(bytes(1 << 20))
    with pytest.raises(LimitExceeded) as caught:
        await writer.write(b"x")
    assert "BLOB_TOO_LARGE" == caught.value.reason
    await writer.abort()


@pytest.mark.parametrize("position", [0, 1_500_000, 2_499_999])
async def test_bit_rot_is_found(store: LocalBlobStore, position: int) -> None:
    """One turned bit anywhere ends the read with an error before the end is said."""
    data = os.urandom(2_500_000)
    digest = await put(store, data)
    with store.path(digest).open("r+b") as file:
        file.seek(position)
        file.write(bytes([data[position] ^ 1]))
    with pytest.raises(Corrupt) as caught:
        await get(store, digest, len(data))
    assert "BLOB_CORRUPT" == caught.value.reason
    await put(store, data)
    assert data == await get(store, digest, len(data))


async def test_lost_and_cut_blobs_are_found(store: LocalBlobStore) -> None:
    """A missing file and a shorter one are refused before the first byte."""
    digest = await put(store, b"x" * 1000)
    os.truncate(store.path(digest), 999)
    for found in ("999 bytes instead of 1000", "no file"):
        with pytest.raises(Corrupt, match=found):
            await anext(store.read(digest, size_bytes=1000))
        store.path(digest).unlink(missing_ok=True)
    with pytest.raises(InvalidInput):
        store.path("../../etc/passwd")


async def test_the_sweep_removes_leftovers_only(store: LocalBlobStore) -> None:
    """Unfinished uploads and unknown blobs go, known ones and foreign files stay, young ones get their time."""
    kept, orphan = await put(store, b"known"), await put(store, b"unknown")
    crashed = await store.create()
    foreign = store.path(kept).with_name("README")
    foreign.write_text("not ours")

    async def known(digests: Collection[str]) -> set[str]:
        assert {kept, orphan} == set(digests)
        return {kept}

    assert 0 == await store.sweep(known, older_than_s=60)
    assert 4 == len(files(store))
    assert 2 == await store.sweep(known, older_than_s=0)
    assert {store.path(kept), foreign} == set(files(store))
    await crashed.abort()


async def test_a_full_disk_is_said(store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is RESOURCE_EXHAUSTED, DISK_FULL; another failure of the disk stays what it is."""
    for code, expected in ((errno.ENOSPC, LimitExceeded), (errno.EIO, OSError)):

        def fail(_descriptor: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        writer = await store.create()
        await writer.write(b"some bytes")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(expected) as caught:
                await writer.commit(digest_of(b"some bytes"))
        assert "DISK_FULL" == getattr(caught.value, "reason", "DISK_FULL")
        await writer.abort()
    assert [] == files(store)


async def test_a_disk_that_fills_up_in_mid_upload(store: LocalBlobStore) -> None:
    """A write that the disk refuses is DISK_FULL, and the abort that follows does not fail a second time."""
    writer = await store.create()
    assert writer._file is not None
    writer._file.close()
    writer._file = Path("/dev/full").open("wb")  # noqa: ASYNC230, SIM115  # a disk without room, closed by the abort
    with pytest.raises(LimitExceeded) as caught:
        await writer.write(bytes(1_000_000))
    assert "DISK_FULL" == caught.value.reason
    await writer.abort()
    assert [] == files(store)
