"""Hears of kernels that failed in runs, examines them again, and has those quarantined that do not hold.

A runtime reports a kernel's fault as the event ``kernel_fault`` on the topic ``run-events`` and goes on without the
kernel. Here the kernel goes through the gauntlet once more. When it fails now, or when it failed in `runs` different
runs although the gauntlet finds nothing (it may need data or a machine that the gauntlet has not), the library stops
serving it: Tamiyo chooses it no more, and runtimes drop it from their caches.

Reports are hints, not orders: one that is lost is made again by the next run, and what is not understood is passed
over.
"""

import asyncio
import contextlib
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

import grpc.aio

from esper.mesh.bus import BusSubscriber
from esper.mesh.context import spawn
from esper.mesh.errors import EsperError
from esper.mesh.logging import get_logger
from esper.mesh.streams import sleep_or_drain
from esper.urabrask.engine import Candidate, Engine
from esper.v1 import event_pb2, oona_service_pb2

__all__ = ["Archive", "Recall"]

log = get_logger(__name__)

TOPIC, GROUP, KIND = "run-events", "urabrask-recall", "kernel_fault"
FAULTS = frozenset({"raised", "form", "not_finite", "gradient", "hang"})
"""Kinds that speak against a kernel; one that is slow there, or whose seed diverged, is sound."""
_KEPT = 1024
_QUEUE = 64
_RETRY_S = 5.0


class Archive(Protocol):
    """What a recall needs of a library. Every method raises children of `EsperError`."""

    async def served(self, kernel_id: str) -> Candidate | None:
        """A kernel that the library still serves; None for any other."""
        ...

    async def download(self, candidate: Candidate) -> bytes:
        """The bundle, its digest verified."""
        ...

    async def quarantine(self, kernel_id: str, reason: str) -> None:
        """Stop serving a kernel."""
        ...


@dataclass(slots=True)
class _Suspect:
    runs: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    examined: bool = False


class Recall:
    """One listener per engine; engines of one mesh share the reports.

    Args:
        engine: judges.
        archive: the library.
        channel: to the bus.
        runs: different runs in which a kernel must have failed to be quarantined without a finding; 0 for never.
        drain: ends everything.
    """

    def __init__(
        self, engine: Engine, archive: Archive, channel: grpc.aio.Channel, *, runs: int, drain: asyncio.Event
    ) -> None:
        self._engine = engine
        self._archive = archive
        self._channel = channel
        self._runs = runs
        self._drain = drain
        self._suspects: OrderedDict[str, _Suspect] = OrderedDict()
        self._queue: asyncio.Queue[str] = asyncio.Queue(_QUEUE)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to listen and to examine."""
        self._tasks = [spawn(self._listen(), name="recall-listen"), spawn(self._examine_all(), name="recall-examine")]

    async def stop(self) -> None:
        """End at once: what is under way is heard of again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _listen(self) -> None:
        while not self._drain.is_set():
            start = oona_service_pb2.START_POSITION_LATEST
            try:
                async with BusSubscriber(self._channel, TOPIC, group=GROUP, start=start) as subscriber:
                    async for delivery in subscriber:
                        self.hear(delivery.event)
                        delivery.ack()
            except EsperError as error:
                log.info("no reports of kernels", reason=error.reason, error=error.public)
            await sleep_or_drain(_RETRY_S, self._drain)

    def hear(self, event: event_pb2.Event) -> None:
        """Take a report; anything else is passed over."""
        if event.attributes.get("kind") != KIND:
            return
        try:
            said = json.loads(event.payload)
            run_id, fields = str(said["run_id"]), said["fields"]
            kernel_id, fault, detail = (str(fields[name]) for name in ("kernel_id", "fault", "detail"))
        except (KeyError, TypeError, ValueError) as error:
            log.warning("report not understood", error=f"{type(error).__name__}: {error}")
            return
        if fault not in FAULTS:
            return
        suspect = self._suspects.setdefault(kernel_id, _Suspect())
        self._suspects.move_to_end(kernel_id)
        while len(self._suspects) > _KEPT:
            self._suspects.popitem(last=False)
        suspect.runs.add(run_id)
        suspect.faults.append(f"{run_id}: {fault}: {detail:.200}")
        del suspect.faults[:-8]
        log.warning("kernel failed in a run", kernel_id=kernel_id, run_id=run_id, fault=fault, detail=detail)
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(kernel_id)

    async def _examine_all(self) -> None:
        while True:
            kernel_id = await self._queue.get()
            try:
                await self.examine(kernel_id)
            except EsperError as error:
                log.warning("kernel not examined again", kernel_id=kernel_id, reason=error.reason, error=error.public)
            except Exception:
                # A defect must not end the examinations of all other kernels.
                log.exception("kernel not examined again", kernel_id=kernel_id)

    async def examine(self, kernel_id: str) -> None:
        """Judge a kernel that failed, and have it quarantined where it does not hold.

        Raises:
            EsperError: the library or the machinery failed; the next report tries again.
        """
        suspect = self._suspects.get(kernel_id)
        candidate = None if suspect is None else await self._archive.served(kernel_id)
        if suspect is None or candidate is None:
            return
        often = self._runs > 0 and len(suspect.runs) >= self._runs
        why = f"failed in {len(suspect.runs)} runs; last: {suspect.faults[-1]}" if often else ""
        if not why and not suspect.examined:
            statement = (await self._engine.judge(candidate, await self._archive.download(candidate))).statement
            suspect.examined = True
            failed = [f"{check.name}: {check.finding}" for check in statement.checks if not check.passed]
            why = f"failed in a run ({suspect.faults[-1]}) and again here: {'; '.join(failed)}" if failed else ""
            log.info("kernel examined again", kernel_id=kernel_id, passed=not failed, failed=failed)
        if why:
            await self._archive.quarantine(kernel_id, why.encode()[:1000].decode(errors="ignore"))
            log.warning("kernel quarantined", kernel_id=kernel_id, why=why)
