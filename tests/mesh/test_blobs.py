"""Content addresses, and blobs that are believed only when their digest is right."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.mesh.blobs import (
    CHUNK_BYTES,
    BlobAssembler,
    assemble,
    chunk,
    digest,
    digest_bytes,
    digest_file,
    digest_text,
    is_digest,
)
from esper.mesh.errors import Corrupt, InvalidInput, LimitExceeded


async def _stream(parts):
    for part in parts:
        yield part


@given(st.binary(max_size=300), st.integers(min_value=1, max_value=70))
def test_chunks_put_together_are_the_blob(data: bytes, size: int) -> None:
    """Cut anywhere, the blob comes back, and no chunk is larger than asked."""
    parts = list(chunk(data, size))
    assembler = BlobAssembler(size=len(data), digest=digest(data), max_bytes=1000)
    for part in parts:
        assembler.add(part)
    assert data == assembler.finish()
    assert all(0 < len(part) <= size for part in parts)
    assert len(data) == assembler.received


def test_digests_are_sha256_in_either_spelling(tmp_path: Path) -> None:
    """Text and raw form convert; a file has the digest of its bytes."""
    data = b"kernel" * 1000
    (tmp_path / "f").write_bytes(data)
    text = digest(data)
    assert "sha256:" + hashlib.sha256(data).hexdigest() == text == digest_file(tmp_path / "f")
    assert text == digest_text(digest_bytes(text))
    assert [True, False, False] == [is_digest(text), is_digest(text.upper()), is_digest(text[:-1])]


@pytest.mark.parametrize("wrong", ["", "sha256:12", "md5:" + "0" * 64, "sha256:" + "G" * 64])
def test_what_is_no_digest_is_refused(wrong: str) -> None:
    """A digest is named with the expectation and the finding."""
    with pytest.raises(InvalidInput, match="64 lower-case hex"):
        digest_bytes(wrong)


def test_a_raw_digest_has_32_bytes() -> None:
    """Raw digests of another length are refused."""
    with pytest.raises(InvalidInput, match="32 bytes, found 31"):
        digest_text(b"x" * 31)


async def test_one_flipped_byte_is_noticed() -> None:
    """A blob of the right size with one wrong byte is corrupt."""
    data = bytes(CHUNK_BYTES + 5)
    bad = bytearray(data)
    bad[CHUNK_BYTES + 1] ^= 1
    with pytest.raises(Corrupt) as caught:
        await assemble(_stream(chunk(bytes(bad))), size=len(data), digest=digest(data), max_bytes=1 << 30)
    assert "BLOB_DIGEST_MISMATCH" == caught.value.reason
    assert data == await assemble(_stream(chunk(data)), size=len(data), digest=digest(data), max_bytes=1 << 30)
    assert data == await assemble(_stream(chunk(data)), size=len(data), digest=None, max_bytes=1 << 30)


def test_too_long_too_short_too_large_and_empty_are_told_apart() -> None:
    """Each way of lying about a size has its own error."""
    with pytest.raises(LimitExceeded, match="larger than the 10 bytes"):
        BlobAssembler(size=11, digest=None, max_bytes=10)
    assembler = BlobAssembler(size=4, digest=None, max_bytes=10)
    assembler.add(b"abc")
    with pytest.raises(Corrupt, match="after 3 of its promised 4"):
        assembler.finish()
    with pytest.raises(InvalidInput, match="empty"):
        assembler.add(b"")
    with pytest.raises(Corrupt, match="past its promised 4"):
        assembler.add(b"de")


def test_metadata_that_makes_no_sense_is_refused() -> None:
    """Negative sizes, digests that are none, chunks of nothing."""
    with pytest.raises(InvalidInput, match="negative"):
        BlobAssembler(size=-1, digest=None, max_bytes=10)
    with pytest.raises(InvalidInput, match="digest must be"):
        BlobAssembler(size=1, digest="abc", max_bytes=10)
    with pytest.raises(ValueError, match="at least 1 byte"):
        list(chunk(b"x", 0))
