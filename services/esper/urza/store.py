"""The seam to the database: transactions on SQLite (the embedded edition) or PostgreSQL (a setting).

Writers take turns on either engine: SQLite by `BEGIN IMMEDIATE`, PostgreSQL by a lock on the one row of `library`.
That is what makes change numbers gapless in the order of commits, and it leaves nothing to deadlock over. Readers
never wait.

::

    store = await Store.open(sqlite_url(path), clock=utc_now)
    await store.write(lambda tx: kernels.insert(tx, ...))      # all or nothing, then listeners hear of it
    await store.read(lambda connection: kernels.get(connection, kernel_id))

Statements live in `records` (blueprints, builds), `shelf` (kernels), `queue` (work and leases) and `log` (changes).
"""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from esper.mesh.errors import InvalidInput, LimitExceeded, Unavailable
from esper.urza import migrations
from esper.urza.changes import Subject
from esper.urza.clock import micros
from esper.urza.schema import changes, library

__all__ = ["CHANGES", "CHANNEL", "Store", "Transaction", "sqlite_url"]

CHANGES = "changes"
"""Topic that a transaction signals when it logged a change; the others are the kinds of work."""

CHANNEL = "esper_library"
"""PostgreSQL notification channel over which servers that share a database wake each other."""

_MIGRATION_LOCK = 0x45535052
"""Advisory lock under which servers that start together migrate one after the other."""

_OPEN_S = 60.0
"""Seconds that connecting and migrating may take."""

_T = TypeVar("_T")

# Alembic tells every step of a migration at level INFO of the standard logger; we log the outcome.
logging.getLogger("alembic").setLevel(logging.WARNING)


@dataclass(slots=True)
class Transaction:
    """One write: a connection with the library locked, the present, and what has to be told after the commit."""

    connection: AsyncConnection
    """Runs the statements."""

    now: datetime
    """The one moment at which everything in this transaction happens."""

    sequence: int
    """Number of the last change."""

    logged: int = 0
    """Changes logged by this transaction."""

    signals: set[str] = field(default_factory=set)
    """Topics to wake after the commit."""

    @property
    def stamp(self) -> int:
        """`now` as stored."""
        return micros(self.now)

    async def log(
        self, subject: Subject, subject_id: str, state: str, *, attempts: int = 0, kernel_id: str = "", error: str = ""
    ) -> int:
        """Append a change and return its number."""
        self.sequence += 1
        self.logged += 1
        self.signals.add(CHANGES)
        row = {
            "sequence": self.sequence,
            "occur_time": self.stamp,
            "subject": subject.value,
            "subject_id": subject_id,
            "state": state,
            "attempts": attempts,
            "kernel_id": kernel_id,
            "error": error,
        }
        await self.connection.execute(changes.insert().values(row))
        return self.sequence


class Store:
    """A database of the library, open and migrated; made by `open`.

    Args:
        writer: engine whose transactions begin with the right to write.
        reader: engine for everything else.
        clock: aware UTC time.
        library_id: identity of the library, for ever.
    """

    def __init__(
        self, writer: AsyncEngine, reader: AsyncEngine, *, clock: Callable[[], datetime], library_id: str
    ) -> None:
        self._writer = writer
        self._reader = reader
        self.clock = clock
        self.library_id = library_id
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()
        self._listeners: list[Callable[[frozenset[str]], None]] = []

    @property
    def embedded(self) -> bool:
        """Whether this is SQLite, a file that belongs to this process alone."""
        return self._writer.dialect.name == "sqlite"

    @property
    def url(self) -> sa.URL:
        """Where the database is."""
        return self._writer.url

    @classmethod
    async def open(cls, url: str, *, clock: Callable[[], datetime], readers: int = 4) -> "Store":
        """Connect, and migrate to the newest revision.

        Args:
            url: `sqlite+aiosqlite:///path` or `postgresql+asyncpg://user:password@host/database`.
            clock: aware UTC time.
            readers: connections for reading.

        Raises:
            InvalidInput: DATABASE_URL_INVALID, the URL names neither of the two.
            Unavailable: DATABASE_UNAVAILABLE, the database does not answer.
            Conflict: LIBRARY_TOO_NEW.
        """
        writer, reader = _engines(url, readers)
        if writer.dialect.name == "sqlite":
            # The asynchronous driver leaves a thread behind when it cannot open a file: ask the plain one first.
            await asyncio.to_thread(_probe, str(writer.url.database))
        try:
            library_id = await _translated(asyncio.wait_for(_migrate(writer), _OPEN_S))
        except BaseException:
            await writer.dispose()
            await reader.dispose()
            raise
        return cls(writer, reader, clock=clock, library_id=library_id)

    def listen(self, listener: Callable[[frozenset[str]], None]) -> None:
        """Call `listener` with the topics of every commit, on the event loop; it must not block."""
        self._listeners.append(listener)

    def signal(self, topics: frozenset[str]) -> None:
        """Tell the listeners that something happened, here or on another server."""
        for listener in self._listeners:
            listener(topics)

    async def write(self, work: Callable[[Transaction], Awaitable[_T]]) -> _T:
        """Run `work` in one transaction: all of it happens, or nothing.

        A caller that goes away does not stop it half-way: to cancel a driver in mid-statement costs the connection.

        Raises:
            LimitExceeded: DISK_FULL.
            Unavailable: DATABASE_UNAVAILABLE.
        """
        return await self._finish(self._write(work))

    async def read(self, work: Callable[[AsyncConnection], Awaitable[_T]]) -> _T:
        """Run `work` on a connection whose every statement sees what is committed.

        Raises:
            Unavailable: DATABASE_UNAVAILABLE.
        """
        return await self._finish(self._read(work))

    async def close(self) -> None:
        """Let running transactions end, then disconnect."""
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)
        await self._writer.dispose()
        await self._reader.dispose()

    async def _finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.create_task(_translated(work))
        self._running.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Whoever asked may be gone; an error that nobody awaits must not become a complaint of the event loop.
        if not task.cancelled():
            task.exception()

    async def _write(self, work: Callable[[Transaction], Awaitable[_T]]) -> _T:
        async with self._turn:
            async with self._writer.begin() as connection:
                # On SQLite the transaction has begun with the lock; on PostgreSQL this row is the lock.
                head = await connection.execute(sa.select(library.c.sequence).with_for_update())
                transaction = Transaction(connection, self.clock(), head.scalar_one())
                result = await work(transaction)
                if transaction.logged:
                    await connection.execute(sa.update(library).values(sequence=transaction.sequence))
                if transaction.signals and not self.embedded:
                    notify = sa.func.pg_notify(CHANNEL, ",".join(sorted(transaction.signals)))
                    await connection.execute(sa.select(notify))
            if transaction.signals:
                self.signal(frozenset(transaction.signals))
            return result

    async def _read(self, work: Callable[[AsyncConnection], Awaitable[_T]]) -> _T:
        async with self._reader.connect() as connection:
            return await work(connection)


def sqlite_url(path: Path) -> str:
    """The URL of an embedded library in a file."""
    return sa.URL.create("sqlite+aiosqlite", database=str(path)).render_as_string(hide_password=False)


def _engines(url: str, readers: int) -> tuple[AsyncEngine, AsyncEngine]:
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise _bad_url("a text that is no URL") from None
    # A reader's statement is a transaction of its own: no BEGIN and ROLLBACK around it, which would triple its cost.
    for_reading: dict[str, Any] = {
        "pool_size": readers,
        "max_overflow": 0,
        "isolation_level": "AUTOCOMMIT",
        "skip_autocommit_rollback": True,
        "pool_reset_on_return": None,
    }
    if parsed.drivername == "sqlite+aiosqlite" and parsed.database and parsed.database != ":memory:":
        writer = create_async_engine(parsed, pool_size=1, max_overflow=0)
        reader = create_async_engine(parsed, **for_reading)
        _tame_sqlite(writer, read_only=False)
        _tame_sqlite(reader, read_only=True)
        return writer, reader
    if parsed.drivername == "postgresql+asyncpg":
        # READ COMMITTED: a statement that waited for the lock sees what was committed meanwhile.
        writer = create_async_engine(
            parsed, pool_size=1, max_overflow=0, pool_pre_ping=True, isolation_level="READ COMMITTED"
        )
        return writer, create_async_engine(parsed, pool_pre_ping=True, **for_reading)
    raise _bad_url(f"{parsed.drivername!r} ({'no database' if not parsed.database else 'a database'})")


def _probe(path: str) -> None:
    try:
        sqlite3.connect(path).close()
    except sqlite3.Error as error:
        raise _unavailable(f"{path}: {error}") from error


def _bad_url(found: str) -> InvalidInput:
    # The URL may carry a password: it is never quoted.
    return InvalidInput(
        "urza.database_url: expected sqlite+aiosqlite:///FILE or postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE, "
        f"found {found}",
        reason="DATABASE_URL_INVALID",
    )


def _tame_sqlite(engine: AsyncEngine, *, read_only: bool) -> None:
    """Set what SQLite does not by itself: a write-ahead log, durable commits, foreign keys, explicit transactions."""

    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself: `begin` below does
        cursor = connection.cursor()
        for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        if read_only:
            cursor.execute("PRAGMA query_only=ON")
        cursor.close()

    def start(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sa.event.listen(engine.sync_engine, "connect", configure)
    if not read_only:
        sa.event.listen(engine.sync_engine, "begin", start)


async def _migrate(engine: AsyncEngine) -> str:
    async with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        await connection.run_sync(migrations.upgrade)
        return str((await connection.execute(sa.select(library.c.library_id))).scalar_one())


async def _translated(work: Awaitable[_T]) -> _T:
    """Turn what a database says of itself into the tree of errors; what it says of our statements stays a defect."""
    try:
        return await work
    except (OperationalError, InterfaceError, OSError, TimeoutError) as error:
        text = str(error.orig if isinstance(error, DBAPIError) else error)
        if "disk is full" in text or "No space left" in text or getattr(error, "errno", None) == 28:  # ENOSPC
            raise LimitExceeded("the disk of the library is full", reason="DISK_FULL", private=text) from error
        raise _unavailable(text) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise _unavailable(str(error.orig)) from error
        raise
    except sa.exc.TimeoutError as error:
        raise _unavailable(str(error)) from error


def _unavailable(text: str) -> Unavailable:
    return Unavailable(
        "the library's database does not answer", reason="DATABASE_UNAVAILABLE", retry_after_s=1.0, private=text
    )
