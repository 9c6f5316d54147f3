"""The decisions given, kept for people: a small bounded table in SQLite.

Nothing is decided from it: what a controller must remember travels with the run. So a decision never waits for the
disk; one task writes what was given, and reading waits for that task first.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import aiosqlite

from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DecisionStore", "Entry", "Page"]

_log = get_logger("esper.tamiyo")
_WAITING = 4096
_SCHEMA = """
CREATE TABLE IF NOT EXISTS decisions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL,
    decision_id TEXT NOT NULL,
    decision BLOB NOT NULL,
    policy TEXT NOT NULL,
    decided_us INTEGER NOT NULL,
    UNIQUE (run_id, decision_id)
);
CREATE INDEX IF NOT EXISTS decisions_of_run ON decisions (run_id, sequence);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One decision as it was given."""

    run_id: str
    decision_id: str
    decision: bytes
    """Encoded, as it went to the run."""
    policy: str
    decided: datetime
    """UTC."""


@dataclass(frozen=True, slots=True)
class Page:
    """Decisions, newest first."""

    entries: tuple[Entry, ...]
    next_token: str
    """Empty at the end."""


class DecisionStore:
    """See the module.

    Args:
        path: of the database file; made when it does not exist.
        limit: most decisions kept; beyond it the oldest go.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._waiting: asyncio.Queue[Entry] = asyncio.Queue(_WAITING)
        self._database: aiosqlite.Connection | None = None
        self._writer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the database and begin to write."""
        self._database = await aiosqlite.connect(self._path, isolation_level=None)
        await self._database.execute("PRAGMA journal_mode = WAL")
        await self._database.execute("PRAGMA synchronous = NORMAL")
        await self._database.executescript(_SCHEMA)
        self._writer = asyncio.create_task(self._write(), name="decision-store")

    async def close(self) -> None:
        """Write what waits and close."""
        if self._writer is not None:
            await self._waiting.join()
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if self._database is not None:
            await self._database.close()

    def keep(self, entry: Entry) -> None:
        """Keep a decision, soon; never waits. One given again (to a run that was resumed) replaces the first."""
        try:
            self._waiting.put_nowait(entry)
        except asyncio.QueueFull:
            _log.error("decision_not_kept", run_id=entry.run_id, decision_id=entry.decision_id, waiting=_WAITING)

    async def page(self, run_id: str, size: int, token: str) -> Page:
        """Decisions of a run, newest first.

        Args:
            run_id: the run.
            size: most entries of the page.
            token: of the page before; empty for the first.

        Raises:
            InvalidInput: PAGE_TOKEN_INVALID: not one of ours.
        """
        if token and not (token.isascii() and token.isdigit() and len(token) < 19):
            raise InvalidInput(
                f"page_token: expected one from the response before, found {token!r:.40}", reason="PAGE_TOKEN_INVALID"
            )
        await self._waiting.join()
        assert self._database is not None  # `open` comes first
        rows = await self._database.execute_fetchall(
            "SELECT sequence, decision_id, decision, policy, decided_us FROM decisions"
            " WHERE run_id = ? AND sequence < ? ORDER BY sequence DESC LIMIT ?",
            (run_id, int(token) if token else 1 << 62, size + 1),
        )
        found = list(rows)
        entries = tuple(
            Entry(
                run_id=run_id,
                decision_id=row[1],
                decision=row[2],
                policy=row[3],
                decided=datetime.fromtimestamp(row[4] / 1e6, UTC),
            )
            for row in found[:size]
        )
        return Page(entries, str(found[size - 1][0]) if len(found) > size else "")

    async def _write(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                await self._insert(batch)
            except aiosqlite.Error as error:
                # A full disk costs the record of a decision, not the decision.
                _log.error("decisions_not_kept", count=len(batch), error=str(error))
            finally:
                for _ in batch:
                    self._waiting.task_done()

    async def _insert(self, batch: list[Entry]) -> None:
        assert self._database is not None  # `open` started this task
        await self._database.execute("BEGIN IMMEDIATE")
        try:
            await self._database.executemany(
                "INSERT OR REPLACE INTO decisions (run_id, decision_id, decision, policy, decided_us)"
                " VALUES (?, ?, ?, ?, ?)",
                [(e.run_id, e.decision_id, e.decision, e.policy, round(e.decided.timestamp() * 1e6)) for e in batch],
            )
            await self._database.execute(
                "DELETE FROM decisions WHERE sequence <= (SELECT max(sequence) FROM decisions) - ?", (self._limit,)
            )
        except BaseException:
            await self._database.execute("ROLLBACK")
            raise
        await self._database.execute("COMMIT")
