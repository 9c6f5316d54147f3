"""PostgreSQL only: hears of the commits of other servers that share the database (LISTEN), and wakes this one."""

import asyncio
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from esper.mesh.logging import get_logger
from esper.mesh.streams import sleep_or_drain
from esper.urza.store import CHANNEL

__all__ = ["listen"]

_log = get_logger(__name__)
_RETRY_S = 1.0


async def listen(
    url: sa.URL, signal: Callable[[frozenset[str]], None], everything: frozenset[str], drain: asyncio.Event
) -> None:
    """Signal what other servers commit, until the drain; reconnect for as long as that takes.

    Args:
        url: SQLAlchemy URL of the database.
        signal: called with the topics of each commit.
        everything: topics to signal after a connection was made: what happened without one went unheard.
        drain: ends it.
    """
    import asyncpg  # an extra: the embedded edition does not need it

    def heard(_connection: Any, _process: int, _channel: str, payload: object) -> None:
        signal(frozenset(str(payload).split(",")))

    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    while not drain.is_set():
        lost = asyncio.Event()
        try:
            connection = await asyncpg.connect(plain, timeout=10)
            try:
                connection.add_termination_listener(lambda _connection, lost=lost: lost.set())
                await connection.add_listener(CHANNEL, heard)
                signal(everything)
                await _either(lost, drain)
            finally:
                await connection.close(timeout=2)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            _log.warning("notifications of the library's database are interrupted", error=repr(error))
        await sleep_or_drain(_RETRY_S, drain)


async def _either(one: asyncio.Event, other: asyncio.Event) -> None:
    tasks = [asyncio.create_task(one.wait()), asyncio.create_task(other.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
