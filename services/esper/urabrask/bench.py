"""The engine's working day: lease a kernel, download, judge, hand the verdict in; one loop per worker.

The library may be late, slow or gone at any moment: loops wait and come back, a lost lease stops its job at once.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from esper.mesh.context import spawn
from esper.mesh.errors import Corrupt, EsperError, InvalidInput, Stale, Unavailable
from esper.mesh.logging import get_logger
from esper.mesh.streams import sleep_or_drain, until_drain
from esper.urabrask.board import Board, Judgement
from esper.urabrask.engine import Engine, NotJudged
from esper.urabrask.keys import KeyRing
from esper.urabrask.library import Library, Task

__all__ = ["Bench", "Pace"]

log = get_logger(__name__)

_HAND_IN_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Times of the loops, in seconds."""

    wait_s: float = 20.0
    """Longest that one call waits for work."""
    lease_s: float = 30.0
    """Length of a lease; renewed three times in it."""
    retry_s: float = 0.25
    """First wait after a failure of the library; doubles up to `retry_max_s`."""
    retry_max_s: float = 5.0
    drain_s: float = 3.0
    """Time that a running evaluation gets to end at a drain before its kernel is handed back."""


class Bench:
    """Takes kernels from a library and judges them until the drain."""

    def __init__(
        self,
        engine: Engine,
        library: Library,
        board: Board,
        *,
        name: str,
        directory: Path,
        pace: Pace,
        drain: asyncio.Event,
        clock: Callable[[], datetime],
    ) -> None:
        self._engine = engine
        self._library = library
        self._board = board
        self._name = name
        self._directory = directory
        self._pace = pace
        self._drain = drain
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []
        self._registered = asyncio.Lock()
        self._known = False

    def start(self) -> None:
        """Begin as many loops as there are workers."""
        self._tasks = [
            spawn(self._loop(f"{self._name}/{index}"), name=f"urabrask-{index}")
            for index in range(self._engine.pool.size)
        ]

    async def stop(self) -> None:
        """Let running evaluations end for `drain_s`, then hand back what still runs. The drain is set already."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self._pace.drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._tasks = []

    async def _loop(self, holder: str) -> None:
        waits = _Waits(self._pace)
        while not self._drain.is_set():
            try:
                task = await until_drain(self._next(holder), self._drain)
                if task is not None:
                    await self._handle(task)
                waits.reset()
            except EsperError as error:
                log.warning("evaluation pauses", holder=holder, reason=error.reason, error=error.public)
                await sleep_or_drain(waits.next(), self._drain)
            except Exception:
                # A defect must not end the only loop that promotes kernels: it is logged, and the next kernel tried.
                log.exception("evaluation failed", holder=holder)
                await sleep_or_drain(waits.next(), self._drain)

    async def _next(self, holder: str) -> Task | None:
        target = await self._engine.find_target()
        await self._introduce()
        return await self._library.lease(holder, target, wait_s=self._pace.wait_s, lease_s=self._pace.lease_s)

    async def _introduce(self) -> None:
        """Have the library know the key that signs here; once per process, and again after a revocation."""
        async with self._registered:
            while not self._known:
                keys = self._engine.keys
                if await self._library.register_key(keys.current.public, keys.create_time):
                    self._known = True
                    log.info("signing key registered", key_id=keys.current.public.key_id)
                else:
                    log.warning("signing key was revoked, making another", key_id=keys.current.public.key_id)
                    self._engine.keys = await asyncio.to_thread(KeyRing.renew, self._directory, self._clock)

    async def _handle(self, task: Task) -> None:
        """Judge one kernel; a defect of ours says nothing about it, so it goes back at once for another attempt."""
        try:
            await self._evaluate(task)
        except EsperError:
            raise
        except Exception as error:
            log.exception("evaluation failed", kernel_id=task.candidate.id)
            words = f"ENGINE_DEFECT: the engine has a defect: {type(error).__name__}"
            await self._patiently(lambda: self._library.give_up(task.lease_id, words))

    async def _evaluate(self, task: Task) -> None:
        """Judge one kernel under its lease."""
        work = asyncio.create_task(self._judge(task), name=f"judge-{task.candidate.id[:19]}")
        keeper = asyncio.create_task(self._keep(task, work), name=f"keep-{task.candidate.id[:19]}")
        try:
            judgement = await work
        except asyncio.CancelledError:
            if not work.cancelled():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            current = asyncio.current_task()
            if current is None or not current.cancelling():
                log.warning("lease lost, evaluation stopped", kernel_id=task.candidate.id)
                return
            # The drain: another engine should have it now, not when the lease has run out.
            with contextlib.suppress(EsperError, TimeoutError):
                await asyncio.wait_for(self._library.give_up(task.lease_id, "the engine shuts down"), 2.0)
            raise
        except EsperError as error:
            log.warning("kernel not judged", kernel_id=task.candidate.id, reason=error.reason, error=error.public)
            words = f"{error.reason}: {error.public}"
            await self._patiently(lambda: self._library.give_up(task.lease_id, words))
            return
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await self._hand_in(task, judgement)

    async def _judge(self, task: Task) -> Judgement:
        try:
            bundle = await self._library.download(task.candidate)
        except Corrupt as error:
            # Bytes that are not the kernel's say nothing about the kernel.
            raise NotJudged(f"the download is not the kernel: {error.public}", reason="DOWNLOAD_CORRUPT") from error
        return await self._engine.judge(task.candidate, bundle)

    async def _keep(self, task: Task, work: "asyncio.Task[Judgement]") -> None:
        """Renew the lease while the work runs; cancel the work when the lease is lost."""
        while True:
            await asyncio.sleep(self._pace.lease_s / 3)
            try:
                await self._library.renew(task.lease_id, self._pace.lease_s)
            except Stale:
                work.cancel()
                return
            except EsperError as error:
                log.warning("lease not renewed yet", kernel_id=task.candidate.id, error=error.public)

    async def _hand_in(self, task: Task, judgement: Judgement) -> None:
        try:
            await self._patiently(lambda: self._library.complete(task.lease_id, judgement))
        except InvalidInput as error:
            # A library restored from a backup may have forgotten the key; the next lease will find it known.
            self._known = False
            log.error("verdict refused", kernel_id=task.candidate.id, reason=error.reason, error=error.public)  # noqa: TRY400  # an answer, not a defect
            return
        except Stale:
            log.warning("verdict too late, the lease is lost", kernel_id=task.candidate.id)
            return
        self._board.post(judgement)
        said = judgement.statement
        failed = [f"{check.name}: {check.finding}" for check in said.checks if not check.passed]
        log.info(
            "kernel validated" if said.passed else "kernel rejected",
            kernel_id=said.kernel_id,
            tags=said.tags,
            failed=failed,
            elapsed_ms=round(math.fsum(check.elapsed_ms for check in said.checks), 1),
        )

    async def _patiently(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call a library that may be away for a moment.

        Raises:
            EsperError: any other answer than UNAVAILABLE, or that one too often.
        """
        waits = _Waits(self._pace)
        for attempt in range(1, _HAND_IN_ATTEMPTS + 1):
            try:
                return await call()
            except Unavailable:
                if attempt == _HAND_IN_ATTEMPTS:
                    raise
            await asyncio.sleep(waits.next())
        return None


class _Waits:
    """Waits that double."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.reset()

    def reset(self) -> None:
        self._wait_s = self._pace.retry_s

    def next(self) -> float:
        wait_s = self._wait_s
        self._wait_s = min(2 * wait_s, self._pace.retry_max_s)
        return wait_s
