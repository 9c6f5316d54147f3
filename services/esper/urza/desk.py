"""The desk where work is handed out: leases, their renewal, their outcome, their end."""

import asyncio
from dataclasses import dataclass
from datetime import datetime

from esper.mesh.errors import EsperError, Forbidden
from esper.mesh.identity import Identity
from esper.mesh.logging import get_logger
from esper.mesh.streams import until_drain
from esper.urza import queue, records, shelf
from esper.urza.builds import Build
from esper.urza.clock import from_micros
from esper.urza.feed import Beacon
from esper.urza.kernels import Kernel
from esper.urza.leases import HOLDERS, Lease, Outcome, Request, WorkKind
from esper.urza.store import Store, Transaction

__all__ = ["Desk", "Rules"]

_log = get_logger(__name__)
_FORGET_EVERY_S = 3600.0
_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a library can be told about its own ways."""

    max_attempts: int = 3
    """Leases of one piece of work before it is given up."""

    lease_memory_s: float = 86400.0
    """How long a lease that is over is remembered, in seconds."""

    watcher_queue: int = 4096
    """Changes that a watcher may be behind."""

    idle_sweep_s: float = 60.0
    """Longest time between two looks at leases, in seconds; ordinarily the library wakes when the next one runs out."""


class Desk:
    """Hands work out and takes its outcome in.

    Args:
        store: open and migrated.
        rules: attempts, memory.
        drain: ends waiting and `keep`.
    """

    def __init__(self, store: Store, rules: Rules, *, drain: asyncio.Event) -> None:
        self._store = store
        self._rules = rules
        self._drain = drain
        self._beacons = {kind: Beacon() for kind in WorkKind}
        self._leased = Beacon()

    def wake(self, topics: frozenset[str]) -> None:
        """There may be work of these kinds."""
        for kind in WorkKind:
            if kind.value in topics:
                self._beacons[kind].flash()

    async def lease(self, request: Request, by: Identity, *, wait_s: float = 0.0) -> tuple[Lease, ...]:
        """Take work, waiting for the first piece; empty when none came in time, or at the drain.

        Raises:
            Forbidden: ROLE_NOT_ENTITLED, another role does this kind of work.
        """
        if by.role is not HOLDERS[request.kind]:
            raise Forbidden(
                "not allowed",
                reason="ROLE_NOT_ENTITLED",
                private=f"{request.kind} is the work of {HOLDERS[request.kind]}, caller is {by.role}/{by.subject}",
            )
        beacon = self._beacons[request.kind]
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while not self._drain.is_set():
            seen = beacon.count
            if await self._store.read(lambda connection: queue.waiting(connection, request)):
                taken = await self._store.write(lambda tx: queue.claim(tx, request))
                if taken:
                    self._leased.flash()
                    return taken
            left = end - loop.time()
            if left <= 0:
                break
            await until_drain(_within(left, beacon, seen), self._drain)
        return ()

    async def renew(self, lease_id: str, lease_time_s: float | None, by: Identity) -> datetime:
        """Keep a lease; return when it runs out now. Errors as `queue.renew`."""
        until = await self._store.write(lambda tx: queue.renew(tx, lease_id, lease_time_s, by))
        self._leased.flash()
        return from_micros(until)

    async def complete(self, lease_id: str, outcome: Outcome, by: Identity) -> Build | Kernel:
        """End a lease with its outcome; return the build or the kernel as it is now. Errors as `queue.complete`."""

        async def complete(tx: Transaction) -> Build | Kernel:
            kind, subject_id = await queue.complete(tx, lease_id, outcome, by, max_attempts=self._rules.max_attempts)
            if kind is WorkKind.COMPILE:
                return await records.get_build(tx.connection, subject_id)
            return await shelf.get_kernel(tx.connection, subject_id)

        return await self._store.write(complete)

    async def expire_due(self) -> int:
        """End every lease that ran out; return how many there were. The library does this by itself."""
        expired = 0
        while True:
            batch = await self._store.write(lambda tx: queue.expire_due(tx, max_attempts=self._rules.max_attempts))
            expired += batch
            if batch < queue.EXPIRE_BATCH:
                return expired

    async def keep(self) -> None:
        """End leases that run out, and forget those that are long over, until the drain."""
        forgotten = float("-inf")
        while not self._drain.is_set():
            seen = self._leased.count
            pause = self._rules.idle_sweep_s
            try:
                now = self._store.clock().timestamp()
                if now - forgotten > _FORGET_EVERY_S:
                    await self._store.write(lambda tx: queue.forget(tx, older_than_s=self._rules.lease_memory_s))
                    forgotten = now
                soonest = await self._store.read(queue.next_expiry)
                if soonest is not None and soonest <= now:
                    _log.warning("leases ran out", leases=await self.expire_due())
                    continue
                if soonest is not None:
                    pause = min(pause, soonest - now + 0.001)
            except EsperError as error:
                _log.warning("leases cannot be watched", reason=error.reason, error=error.private or error.public)
                pause = _RETRY_S
            except Exception:  # noqa: BLE001  # logged with its traceback; leases must go on running out
                _log.exception("leases cannot be watched")
                pause = _RETRY_S
            await until_drain(_within(pause, self._leased, seen), self._drain)


async def _within(seconds: float, beacon: Beacon, seen: int) -> None:
    """Wait for the beacon, but not longer than this."""
    try:
        async with asyncio.timeout(seconds):
            await beacon.changed(seen)
    except TimeoutError:
        pass
