"""Announces every change of the library on the message bus, topic `library-events`; a dead bus harms nothing here.

The change log stays the truth: `WatchLibrary` is complete, the topic is for those who are on the bus anyway. Events
wait in a bounded buffer while the bus is away; what does not fit is counted, and nobody waits for it.

At the start the newest changes are announced once more: those that a crash kept from the bus arrive then, and the bus
knows the others by their ids.
"""

import asyncio
import contextlib
from contextlib import aclosing

from esper.mesh.bus import BusPublisher, PublisherStats
from esper.mesh.context import spawn
from esper.mesh.errors import EsperError
from esper.mesh.logging import get_logger
from esper.urza.changes import Change
from esper.urza.convert import change_to_proto, stamp
from esper.urza.library import Library
from esper.v1 import event_pb2

__all__ = ["TOPIC", "Announcer"]

_log = get_logger(__name__)

TOPIC = "library-events"
"""Events carry an `esper.v1.WatchLibraryResponse`; their key is the id of what changed."""

CLOSE_S = 1.0
"""Seconds that a closing library gives the bus for what still waits."""

AGAIN = 1000
"""Newest changes that are announced again at the start; far fewer than the ids that the bus remembers of a topic."""

RETRY_S = 1.0
"""Seconds to wait when the change log cannot be read."""


class Announcer:
    """Publishes the changes of a library, from those shortly before its start on.

    Args:
        library: whose changes.
        publisher: to the bus; started and closed here.
    """

    def __init__(self, library: Library, publisher: BusPublisher) -> None:
        self._library = library
        self._publisher = publisher
        self._task: asyncio.Task[None] | None = None

    @property
    def stats(self) -> PublisherStats:
        """What became of the events so far."""
        return self._publisher.stats

    def start(self) -> None:
        """Begin."""
        self._publisher.start()
        self._task = spawn(self._run(), name="urza-announcer")

    async def close(self) -> None:
        """Stop; give the bus a moment for what waits."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        stats = await self._publisher.close(timeout_s=CLOSE_S)
        if stats.refused or stats.rejected or stats.lost:
            _log.warning("changes not announced", refused=stats.refused, rejected=stats.rejected, lost=stats.lost)

    async def _run(self) -> None:
        after: int | None = None
        while True:
            try:
                if after is None:
                    after = await self._begin()
                async with aclosing(self._library.watch(after)) as changes:
                    async for change in changes:
                        if isinstance(change, Change):
                            self._publisher.offer(TOPIC, self._event(change))
                            after = change.sequence
            except EsperError as error:
                if error.reason == "WATCHER_TOO_SLOW":
                    continue  # overrun by a burst: begin again where it broke off
                _log.warning("changes cannot be read to be announced", after=after, reason=error.reason,
                             error=error.private or error.public)  # fmt: skip
                await asyncio.sleep(RETRY_S)
            except Exception:  # noqa: BLE001  # logged with its traceback; the announcements must not end with it
                _log.exception("change not announced", after=after)
                await asyncio.sleep(RETRY_S)
            else:
                return  # the library closes

    async def _begin(self) -> int:
        async with aclosing(self._library.watch(None)) as changes:
            async for head in changes:
                if isinstance(head, int):
                    return max(0, head - AGAIN)
        return 0

    def _event(self, change: Change) -> event_pb2.Event:
        message = change_to_proto(change)
        return event_pb2.Event(
            # The same for ever for this change of this library: published twice, it is stored once.
            id=f"{self._library.store.library_id}-{change.sequence}",
            key=change.subject.id[:128],
            type=message.DESCRIPTOR.full_name,
            payload=message.SerializeToString(),
            occur_time=stamp(change.occur_time),
            source="urza",
            priority=event_pb2.PRIORITY_NORMAL,
            attributes={"change": message.WhichOneof("change") or "", "state": change.subject.state.value},
        )
