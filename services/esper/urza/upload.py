"""One bundle on its way in: order, offsets, length and digest of its pieces; nothing is seen before all are right."""

from esper.mesh.errors import Corrupt, InvalidInput, LimitExceeded
from esper.urza.blob_store import BlobStore, BlobWriter
from esper.urza.kernels import KernelOffer

__all__ = ["Upload"]


class Upload:
    """Takes the pieces of a bundle in the order of the contract: `add` ..., `end`, then `commit`; `abort` at any time.

    Args:
        offer: what the forge says about it.
        writer: where the bytes go.
    """

    def __init__(self, offer: KernelOffer, writer: BlobWriter) -> None:
        self.offer = offer
        self._writer = writer
        self._digest = ""

    @classmethod
    async def begin(cls, offer: KernelOffer, blobs: BlobStore) -> "Upload":
        """Begin an upload.

        Raises:
            LimitExceeded: BLOB_TOO_LARGE, by what the forge says; DISK_FULL.
        """
        if offer.size_bytes > blobs.max_bytes:
            raise LimitExceeded(
                f"bundle: expected at most {blobs.max_bytes} bytes, found {offer.size_bytes}",
                reason="BLOB_TOO_LARGE",
                metadata={"max_bytes": str(blobs.max_bytes)},
            )
        return cls(offer, await blobs.create())

    async def add(self, offset: int, data: bytes) -> None:
        """Take the next piece.

        Raises:
            InvalidInput: BLOB_MALFORMED, it does not follow the one before, or the end was said already.
            LimitExceeded: BLOB_TOO_LARGE, DISK_FULL.
        """
        if self._digest:
            raise malformed("nothing after the digest", f"a chunk at offset {offset}")
        if offset != self._writer.size_bytes:
            raise malformed(f"the next chunk at offset {self._writer.size_bytes}", f"one at offset {offset}")
        await self._writer.write(data)

    def end(self, digest: str, size_bytes: int) -> None:
        """Take the promise that everything was sent.

        Raises:
            InvalidInput: BLOB_MALFORMED, the length is another one, or there is nothing.
            Corrupt: DIGEST_MISMATCH, the kernel was announced under another digest.
        """
        received = self._writer.size_bytes
        if self._digest:
            raise malformed("one digest", "a second one")
        if not received:
            raise malformed("at least one chunk before the digest", "none")
        for promised in (size_bytes, self.offer.size_bytes):
            if promised not in {0, received}:
                raise malformed(f"{promised} bytes", f"{received}")
        if self.offer.id not in {"", digest}:
            raise Corrupt(
                f"bundle: expected digest {self.offer.id} as announced, found {digest}", reason="DIGEST_MISMATCH"
            )
        self._digest = digest

    async def commit(self) -> tuple[str, int]:
        """Verify and keep the bytes, durably; return digest and length.

        Raises:
            InvalidInput: BLOB_MALFORMED, the stream ended before the digest.
            Corrupt: DIGEST_MISMATCH.
            LimitExceeded: DISK_FULL.
        """
        if not self._digest:
            raise malformed("a digest as the last part", f"the end of the stream after {self._writer.size_bytes} bytes")
        await self._writer.commit(self._digest)
        return self._digest, self._writer.size_bytes

    async def abort(self) -> None:
        """Drop what was taken; after `commit` nothing."""
        await self._writer.abort()


def malformed(expected: str, found: str) -> InvalidInput:
    """The error of a stream whose parts are not those of the contract."""
    return InvalidInput(f"upload: expected {expected}, found {found}", reason="BLOB_MALFORMED")
