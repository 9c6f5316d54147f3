"""Content addresses, and blobs as streams of 1 MiB chunks.

A blob travels as metadata first (size and digest), then chunks. The receiver never trusts it::

    assembler = BlobAssembler(size=meta.size, digest=meta.digest, max_bytes=limit)
    async for part in chunks:
        assembler.add(part)
    data = assembler.finish()        # Corrupt unless size and digest are what was promised
"""

import hashlib
import re
from collections.abc import AsyncIterable, Iterator
from pathlib import Path

from esper.mesh.errors import Corrupt, InvalidInput, LimitExceeded

__all__ = [
    "CHUNK_BYTES",
    "BlobAssembler",
    "assemble",
    "chunk",
    "digest",
    "digest_bytes",
    "digest_file",
    "digest_text",
    "is_digest",
]

CHUNK_BYTES = 1 << 20
"""1 MiB: the throughput plateau of gRPC streams, and well under the message limit."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest(data: bytes | bytearray | memoryview) -> str:
    """Content address of some bytes: `sha256:` and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Content address of a file, read in pieces."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    """Whether a text is a content address: `sha256:` and 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def digest_bytes(text: str) -> bytes:
    """The 32 raw bytes of a content address, as carried where the wire budget counts.

    Raises:
        InvalidInput: the text is not a content address.
    """
    if not is_digest(text):
        raise InvalidInput(f"a digest must be sha256: and 64 lower-case hex digits, found {text[:80]!r}")
    return bytes.fromhex(text[7:])


def digest_text(raw: bytes) -> str:
    """The content address whose 32 raw bytes these are.

    Raises:
        InvalidInput: not 32 bytes.
    """
    if len(raw) != hashlib.sha256().digest_size:
        raise InvalidInput(f"a raw digest must have 32 bytes, found {len(raw)}")
    return "sha256:" + raw.hex()


def chunk(data: bytes, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Cut bytes into pieces of `size` bytes, the last one shorter; nothing for empty data.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"chunk size must be at least 1 byte, found {size}")
    view = memoryview(data)
    for start in range(0, len(view), size):
        yield bytes(view[start : start + size])  # bytes fields of protobuf take nothing else


class BlobAssembler:
    """Puts a chunked blob together again and believes nothing that it was told about it.

    Args:
        size: promised size in bytes.
        digest: promised content address; None when it is not known beforehand.
        max_bytes: most that this receiver takes.

    Raises:
        InvalidInput: negative size, or a digest that is none.
        LimitExceeded: the promised size is above `max_bytes`.
    """

    def __init__(self, *, size: int, digest: str | None, max_bytes: int) -> None:
        if size < 0:
            raise InvalidInput(f"blob size must not be negative, found {size}")
        if digest is not None and not is_digest(digest):
            raise InvalidInput(f"blob digest must be sha256: and 64 lower-case hex digits, found {digest[:80]!r}")
        if size > max_bytes:
            raise LimitExceeded(
                f"blob of {size} bytes is larger than the {max_bytes} bytes that are taken here",
                reason="BLOB_TOO_LARGE",
                metadata={"size": str(size), "max_bytes": str(max_bytes)},
            )
        self._size = size
        self._digest = digest
        self._hash = hashlib.sha256()
        self._parts: list[bytes] = []
        self._received = 0

    @property
    def received(self) -> int:
        """Bytes received until now."""
        return self._received

    def add(self, part: bytes) -> None:
        """Take the next chunk.

        Raises:
            InvalidInput: the chunk is empty.
            Corrupt: more bytes than were promised.
        """
        if not part:
            raise InvalidInput(f"chunk after byte {self._received} is empty: every chunk must hold at least one byte")
        self._received += len(part)
        if self._received > self._size:
            raise Corrupt(
                f"blob runs past its promised {self._size} bytes: {self._received} received",
                reason="BLOB_SIZE_MISMATCH",
            )
        self._hash.update(part)
        self._parts.append(part)

    def finish(self) -> bytes:
        """Return the whole blob.

        Raises:
            Corrupt: fewer bytes than promised, or another digest.
        """
        if self._received != self._size:
            raise Corrupt(
                f"blob ends after {self._received} of its promised {self._size} bytes", reason="BLOB_SIZE_MISMATCH"
            )
        found = "sha256:" + self._hash.hexdigest()
        if self._digest is not None and found != self._digest:
            raise Corrupt(
                f"blob has digest {found}, promised was {self._digest}",
                reason="BLOB_DIGEST_MISMATCH",
                metadata={"found": found, "promised": self._digest},
            )
        return b"".join(self._parts)


async def assemble(parts: AsyncIterable[bytes], *, size: int, digest: str | None, max_bytes: int) -> bytes:
    """Collect a chunked blob and verify it; arguments and errors are those of `BlobAssembler`."""
    assembler = BlobAssembler(size=size, digest=digest, max_bytes=max_bytes)
    async for part in parts:
        assembler.add(part)
    return assembler.finish()
