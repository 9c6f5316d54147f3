"""The SQLite file of the embedded log: schema and statements. Everything here blocks and belongs on one thread.

A row of `chunk` holds the events that one group commit stored in one partition. Its primary key is
`partition row << 40 | last offset`, so that a partition's rows lie side by side in order of offset and one key range
finds any of them; no other index has to be kept. Room for 2^40 offsets a partition and 2^22 partitions.
"""

import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from esper.mesh.errors import Corrupt, Unavailable
from esper.oona.codec import unpack, unpack_pairs
from esper.oona.records import Durability, GroupPosition, StoredEvent, TopicSpec
from esper.oona.rows import ChunkRow, PartitionRow, key_range, log_error, read_chunk
from esper.oona.window import to_place

__all__ = ["Database"]

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE topic (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, partitions INTEGER NOT NULL, durability TEXT NOT NULL,
    max_attempts INTEGER NOT NULL, retention_s INTEGER NOT NULL, retention_bytes INTEGER NOT NULL,
    create_us INTEGER NOT NULL
) STRICT;
CREATE TABLE partition (
    id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL REFERENCES topic (id), number INTEGER NOT NULL,
    first INTEGER NOT NULL DEFAULT 0, next INTEGER NOT NULL DEFAULT 0, UNIQUE (topic_id, number)
) STRICT;
CREATE TABLE chunk (
    id INTEGER PRIMARY KEY, base INTEGER NOT NULL, store_us INTEGER NOT NULL, size INTEGER NOT NULL,
    crc INTEGER NOT NULL, ids BLOB NOT NULL, keys BLOB NOT NULL, data BLOB NOT NULL
) STRICT;
CREATE TABLE position (
    topic_id INTEGER NOT NULL REFERENCES topic (id), name TEXT NOT NULL, number INTEGER NOT NULL,
    next INTEGER NOT NULL, pending BLOB NOT NULL, PRIMARY KEY (topic_id, name, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE flush (id INTEGER PRIMARY KEY CHECK (id = 1), count INTEGER NOT NULL) STRICT;
INSERT INTO flush VALUES (1, 0);
"""


class Database:
    """One connection to the log's file.

    Args:
        path: the file.
        max_bytes: largest size of the file; 0 is unlimited.
        min_free_bytes: free disk space that is left to others; appends are refused beyond it.
        wal_bytes: size to which the write-ahead log's file is cut down when it is begun anew; 0 leaves it as it is.
    """

    def __init__(self, path: Path, *, max_bytes: int = 0, min_free_bytes: int = 0, wal_bytes: int = 0) -> None:
        self._path = path
        self._wal_bytes = wal_bytes
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._full_sync: bool | None = None
        self._unsynced = False
        self._db: sqlite3.Connection | None = None

    @property
    def db(self) -> sqlite3.Connection:
        """The open connection."""
        if self._db is None:
            raise Unavailable("the log is not open", reason="LOG_CLOSED")
        return self._db

    def open(self, *, readonly: bool = False) -> None:
        """Open the file, creating it and its schema when it is new.

        Raises:
            Corrupt: not a log, or one of a newer build.
        """
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA busy_timeout=10000")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA wal_autocheckpoint=0")  # checkpoints run on a thread of their own, off the commit path
            if self._wal_bytes:
                db.execute(f"PRAGMA journal_size_limit={self._wal_bytes}")
            db.execute("PRAGMA cache_size=-16384")
            if readonly:
                db.execute("PRAGMA query_only=1")
            else:
                self._migrate(db)
            if self._max_bytes and not readonly:
                page = db.execute("PRAGMA page_size").fetchone()[0]
                db.execute(f"PRAGMA max_page_count={max(1, self._max_bytes // page)}")
        except sqlite3.DatabaseError as error:
            db.close()
            raise log_error(error, retry_after_s=1.0) from error
        except BaseException:
            db.close()
            raise
        self._db = db

    @staticmethod
    def _migrate(db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise Corrupt(
                f"the log's file has schema {version}, of a newer build: expected at most {SCHEMA_VERSION}",
                reason="LOG_TOO_NEW",
            )
        if version < SCHEMA_VERSION:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        """Close the connection; the last one to close checkpoints the write-ahead log."""
        if self._db is not None:
            self._db.close()
            self._db = None

    # --- topics ---

    def load_topics(self) -> list[tuple[TopicSpec, list[PartitionRow]]]:
        """Every topic with its partitions."""
        loaded = []
        for topic_id, name, partitions, durability, attempts, age, size, created in self.db.execute(
            "SELECT id, name, partitions, durability, max_attempts, retention_s, retention_bytes, create_us"
            " FROM topic ORDER BY name"
        ).fetchall():
            spec = TopicSpec(
                name=name,
                partitions=partitions,
                durability=Durability(durability),
                max_attempts=attempts,
                retention_s=age,
                retention_bytes=size,
                create_time=datetime.fromtimestamp(created / 1e6, UTC),
            )
            rows = self.db.execute(
                "SELECT id, number, first, next FROM partition WHERE topic_id = ? ORDER BY number", (topic_id,)
            ).fetchall()
            loaded.append((spec, [self._partition(*row) for row in rows]))
        return loaded

    def _partition(self, row: int, number: int, first: int, following: int) -> PartitionRow:
        low, high = key_range(row)
        size, begin, end = self.db.execute(
            "SELECT coalesce(sum(size), 0), min(id), max(id) FROM chunk WHERE id >= ? AND id < ?", (low, high)
        ).fetchone()
        store_us = 0
        if end is not None:
            following = max(following, end - low + 1)
            first = self.db.execute("SELECT base FROM chunk WHERE id = ?", (begin,)).fetchone()[0]
            store_us = self.db.execute("SELECT store_us FROM chunk WHERE id = ?", (end,)).fetchone()[0]
        else:
            first = following
        return PartitionRow(row, number, first, following, size, store_us)

    def create_topics(self, specs: Sequence[TopicSpec]) -> list[list[PartitionRow]]:
        """Store new topics durably; return their partitions."""
        made = []
        with _Transaction(self, sync=True) as db:
            for s in specs:
                created = int(s.create_time.timestamp() * 1e6)
                topic_id = db.execute(
                    "INSERT INTO topic"
                    " (name, partitions, durability, max_attempts, retention_s, retention_bytes, create_us)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        s.name,
                        s.partitions,
                        s.durability.value,
                        s.max_attempts,
                        s.retention_s,
                        s.retention_bytes,
                        created,
                    ),
                ).lastrowid
                rows = []
                for number in range(s.partitions):
                    row = db.execute(
                        "INSERT INTO partition (topic_id, number) VALUES (?, ?)", (topic_id, number)
                    ).lastrowid
                    rows.append(PartitionRow(row or 0, number, 0, 0, 0, 0))
                made.append(rows)
        return made

    # --- events ---

    def write(self, rows: Iterable[ChunkRow], *, sync: bool) -> None:
        """Store chunks, all or none; durably when `sync`."""
        if self._min_free_bytes:
            free = os.statvfs(self._path.parent)
            if free.f_bavail * free.f_frsize < self._min_free_bytes:
                raise _no_room(f"less than {self._min_free_bytes} bytes are free")
        with _Transaction(self, sync=sync) as db:
            db.executemany("INSERT INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def flush(self) -> None:
        """Make everything that was committed durable: one synchronous commit covers all before it."""
        if self._unsynced:
            with _Transaction(self, sync=True) as db:
                db.execute("UPDATE flush SET count = count + 1")

    def read(self, row: int, offset: int, *, max_bytes: int) -> list[StoredEvent]:
        """Events of whole chunks, from the one that holds `offset` (or the next) on, until `max_bytes` are reached."""
        low, high = key_range(row)
        found: list[StoredEvent] = []
        size = 0
        number = self.db.execute("SELECT number FROM partition WHERE id = ?", (row,)).fetchone()[0]
        rows = self.db.execute(
            "SELECT base, store_us, crc, ids, keys, data, size FROM chunk WHERE id >= ? AND id < ? ORDER BY id",
            (low | offset, high),
        )
        # Closed at once: a statement left open would hold the write-ahead log back from its checkpoint.
        with closing(rows):
            for record in rows:
                found.extend(e for e in read_chunk(number, *record[:6]) if e.offset >= offset)
                size += record[6]
                if size >= max_bytes:
                    break
        return found

    def newest_ids(self, rows: Sequence[PartitionRow], most: int) -> list[tuple[str, int]]:
        """The newest ids of one topic with their places, oldest first; at least `most` if there are."""
        found: list[tuple[int, int, int, list[bytes]]] = []
        for partition in rows:
            low, high = key_range(partition.row)
            count = 0
            chunks = self.db.execute(
                "SELECT base, store_us, ids FROM chunk WHERE id >= ? AND id < ? ORDER BY id DESC", (low, high)
            )
            with closing(chunks):
                for base, store_us, ids in chunks:
                    names = unpack(ids)
                    found.append((store_us, base, partition.number, names))
                    count += len(names)
                    if count >= most:
                        break
        found.sort(key=lambda entry: entry[0])
        keep, count = len(found), 0
        while keep and count < most:
            keep -= 1
            count += len(found[keep][3])
        return [
            (name.decode(), to_place(number, base + place))
            for _, base, number, names in found[keep:]
            for place, name in enumerate(names)
        ]

    def offset_at(self, row: int, store_us: int) -> int | None:
        """Offset of the first event stored at or after a time; None without one."""
        low, high = key_range(row)
        found = self.db.execute(
            "SELECT base FROM chunk WHERE id >= ? AND id < ? AND store_us >= ? ORDER BY id LIMIT 1",
            (low, high, store_us),
        ).fetchone()
        return None if found is None else int(found[0])

    def retain(
        self, row: int, *, before_us: int, max_bytes: int, size: int, following: int
    ) -> tuple[int, int, int] | None:
        """Remove the oldest chunks of a partition that are too old or too much, a bounded number at a time.

        Args:
            row: the partition.
            before_us: chunks stored before this are too old; 0 for none.
            max_bytes: bytes that may stay; 0 for any number.
            size: bytes there now.
            following: next offset of the partition; kept, because its last chunk may go.

        Returns:
            (first offset kept, bytes kept, chunks removed), or None when nothing was removed.
        """
        low, high = key_range(row)
        gone: list[int] = []
        left = size
        for key, store_us, chunk_size in self.db.execute(
            "SELECT id, store_us, size FROM chunk WHERE id >= ? AND id < ? ORDER BY id LIMIT 256", (low, high)
        ).fetchall():
            if not (store_us < before_us or (max_bytes and left > max_bytes)):
                break
            gone.append(key)
            left -= chunk_size
        if not gone:
            return None
        first = gone[-1] - low + 1
        with _Transaction(self, sync=False) as db:
            db.execute("DELETE FROM chunk WHERE id >= ? AND id <= ?", (low, gone[-1]))
            db.execute("UPDATE partition SET first = ?, next = ? WHERE id = ?", (first, following, row))
        return first, left, len(gone)

    # --- positions ---

    def load_positions(self) -> dict[tuple[str, str], dict[int, GroupPosition]]:
        """(topic, group) -> partition -> position."""
        found: dict[tuple[str, str], dict[int, GroupPosition]] = {}
        for topic, group, number, following, pending in self.db.execute(
            "SELECT t.name, p.name, p.number, p.next, p.pending FROM position p JOIN topic t ON t.id = p.topic_id"
        ):
            found.setdefault((topic, group), {})[number] = GroupPosition(following, unpack_pairs(pending))
        return found

    def save_positions(self, rows: Iterable[tuple[str, int, int, bytes, str]]) -> None:
        """Persist (group, partition, next, pending, topic), all or none, without waiting for the disk."""
        with _Transaction(self, sync=False) as db:
            db.executemany(
                "INSERT OR REPLACE INTO position (topic_id, name, number, next, pending)"
                " SELECT id, ?, ?, ?, ? FROM topic WHERE name = ?",
                rows,
            )

    # --- upkeep ---

    def checkpoint(self, mode: str) -> int:
        """Move the write-ahead log into the file (PASSIVE never blocks, TRUNCATE blocks writers); frames left over."""
        _, frames, moved = self.db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        return max(0, int(frames) - int(moved))

    def _set_sync(self, *, sync: bool) -> None:
        if self._full_sync is not sync:
            # NORMAL in WAL mode: a commit is in the system's hands, and the disk sees it at the next FULL one.
            self.db.execute(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
            self._full_sync = sync


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, or all undone. `sync`: the commit waits for the disk."""

    def __init__(self, database: Database, *, sync: bool) -> None:
        self._database = database
        self._sync = sync

    def __enter__(self) -> sqlite3.Connection:
        self._database._set_sync(sync=self._sync)  # noqa: SLF001  # two halves of one thing
        db = self._database.db
        db.execute("BEGIN IMMEDIATE")
        return db

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        db = self._database.db
        if kind is None:
            try:
                db.execute("COMMIT")
            except sqlite3.Error:
                self._undo(db)
                raise
            self._database._unsynced = not self._sync  # noqa: SLF001
        else:
            self._undo(db)

    @staticmethod
    def _undo(db: sqlite3.Connection) -> None:
        # A full disk makes SQLite roll back by itself; then there is nothing left to undo.
        if db.in_transaction:
            db.execute("ROLLBACK")


def _no_room(finding: str) -> sqlite3.Error:
    error = sqlite3.OperationalError(finding)
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error
