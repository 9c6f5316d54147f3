"""Rows of the log's file, and what its errors mean: between the bus's records and `database`'s statements."""

import sqlite3
import zlib
from dataclasses import dataclass

from esper.mesh.errors import Corrupt, EsperError, LimitExceeded, Unavailable
from esper.oona.codec import pack, pack_pairs, unpack
from esper.oona.records import GroupPosition, StoredEvent
from esper.oona.sequencer import Chunk

__all__ = ["ChunkRow", "PartitionRow", "chunk_row", "key_range", "log_error", "position_row", "read_chunk"]

_OFFSET_BITS = 40


@dataclass(slots=True)
class PartitionRow:
    """One partition as stored."""

    row: int
    number: int
    first: int
    next: int
    size: int
    store_us: int
    """Store time of its newest event; 0 without one."""


ChunkRow = tuple[int, int, int, int, int, bytes, bytes, bytes]


def chunk_row(row: int, chunk: Chunk) -> ChunkRow:
    """Encode a chunk of the partition with this row number."""
    ids = pack([name.encode() for name in chunk.ids])
    keys = pack([key.encode() for key in chunk.keys])
    data = pack(chunk.data)
    crc = zlib.crc32(data, zlib.crc32(keys, zlib.crc32(ids)))
    return (row << _OFFSET_BITS | chunk.last, chunk.base, chunk.store_us, chunk.size, crc, ids, keys, data)


def log_error(error: Exception, *, retry_after_s: float) -> EsperError:
    """What a failed statement means to a caller."""
    code = getattr(error, "sqlite_errorcode", None)
    # The primary code is the low byte. A file-size limit (EFBIG) and some full file systems show as a failed write.
    if code is not None and (
        code & 0xFF == sqlite3.SQLITE_FULL
        or code in {sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_TRUNCATE}
    ):
        return LimitExceeded(
            "the log has no room: expected free space on its disk, or a larger oona.max_log_bytes; nothing was stored",
            reason="LOG_FULL",
            retry_after_s=retry_after_s,
            private=str(error),
        )
    if code is not None and code & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        return Corrupt("the log's file is damaged", reason="LOG_CORRUPT", private=str(error))
    return Unavailable(
        "the log could not be written; nothing was stored",
        reason="LOG_UNWRITABLE",
        retry_after_s=retry_after_s,
        private=f"{type(error).__name__}: {error}",
    )


def key_range(row: int) -> tuple[int, int]:
    """Keys of a partition's chunks: from the first, up to but not including the second."""
    return row << _OFFSET_BITS, (row + 1) << _OFFSET_BITS


def read_chunk(
    number: int, base: int, store_us: int, crc: int, ids: bytes, keys: bytes, data: bytes
) -> list[StoredEvent]:
    """Decode a chunk.

    Raises:
        Corrupt: not the bytes that were stored.
    """
    if zlib.crc32(data, zlib.crc32(keys, zlib.crc32(ids))) != crc:
        raise Corrupt(
            f"partition {number}: the events from offset {base} on are not those that were stored",
            reason="LOG_CORRUPT",
            metadata={"partition": str(number), "offset": str(base)},
        )
    return [
        StoredEvent(number, base + place, name.decode(), key.decode(), event, store_us)
        for place, (name, key, event) in enumerate(zip(unpack(ids), unpack(keys), unpack(data), strict=True))
    ]


def position_row(topic: str, group: str, number: int, position: GroupPosition) -> tuple[str, int, int, bytes, str]:
    """One row for `Database.save_positions`."""
    return (group, number, position.next, pack_pairs(position.pending), topic)
