"""The forge's working day: offer the catalogue, lease an order, build, upload, hand in; one loop per worker.

The library may be late, slow or gone at any moment: loops wait and come back, a lost lease stops its build at once.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from esper.kasmina.blueprints import Blueprint
from esper.kasmina.kernels.bundle import Tier
from esper.mesh.context import spawn
from esper.mesh.errors import EsperError, NotFound, Stale, Unavailable
from esper.mesh.logging import get_logger
from esper.mesh.streams import sleep_or_drain, until_drain
from esper.tezzeret.board import Board
from esper.tezzeret.forge import Forge
from esper.tezzeret.library import Library
from esper.tezzeret.orders import BuildFailed, Built, Phase, Step, Task

__all__ = ["Bench", "Pace"]

log = get_logger(__name__)

_HAND_IN_ATTEMPTS = 5
_HAND_BACK_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Times of the loops, in seconds."""

    wait_s: float = 20.0
    """Longest that one call waits for an order."""
    lease_s: float = 30.0
    """Length of a lease; renewed three times in it."""
    retry_s: float = 0.25
    """First wait after a failure of the library; doubles up to `retry_max_s`."""
    retry_max_s: float = 5.0
    drain_s: float = 3.0
    """Time that a running build gets to end at a drain before it is handed back."""


class Bench:
    """Takes orders from a library and fills them until the drain.

    Args:
        forge: builds.
        library: gives orders and takes kernels.
        board: is told every step.
        name: of this forge, for people.
        tiers: that it takes orders for.
        offers: blueprints that the library shall have.
        pace: times of the loops.
        drain: set when the mesh drains.
        clock: UTC.
    """

    def __init__(
        self,
        forge: Forge,
        library: Library,
        board: Board,
        *,
        name: str,
        tiers: Sequence[Tier],
        offers: Sequence[Blueprint],
        pace: Pace,
        drain: asyncio.Event,
        clock: Callable[[], datetime],
    ) -> None:
        self._forge = forge
        self._library = library
        self._board = board
        self._name = name
        self._tiers = tuple(tiers)
        self._offers = tuple(offers)
        self._pace = pace
        self._drain = drain
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to offer the catalogue, and as many loops as there are workers.

        Of two or more workers the first takes portable orders alone: a run that waits for those, a second each, must
        not wait for compilers that are busy for minutes.
        """
        size = self._forge.pool.size
        quick = tuple(tier for tier in self._tiers if tier is Tier.PORTABLE)
        self._tasks = [spawn(self._offer(), name="tezzeret-catalogue")]
        for index in range(size):
            tiers = quick if index == 0 and size > 1 and quick else self._tiers
            self._tasks.append(spawn(self._loop(f"{self._name}/{index}", tiers), name=f"tezzeret-{index}"))

    async def stop(self) -> None:
        """Let running builds end for `drain_s`, then hand back what still runs. The drain is set already."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self._pace.drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._tasks = []

    async def _offer(self) -> None:
        """Have the library know every blueprint of the catalogue; as often as it takes."""
        waits = _Waits(self._pace)
        left = list(self._offers)
        while left and not self._drain.is_set():
            try:
                if await self._library.offer(left[0]):
                    log.info("blueprint submitted", name=left[0].name, blueprint_id=left[0].id)
                left.pop(0)
                waits.reset()
            except EsperError as error:
                log.warning("catalogue not offered yet", name=left[0].name, reason=error.reason, error=error.public)
                await sleep_or_drain(waits.next(), self._drain)

    async def _loop(self, holder: str, tiers: Sequence[Tier]) -> None:
        waits = _Waits(self._pace)
        while not self._drain.is_set():
            try:
                task = await until_drain(self._next(holder, tiers), self._drain)
                if task is not None:
                    await self._handle(task)
                waits.reset()
            except EsperError as error:
                log.warning("forge pauses", holder=holder, reason=error.reason, error=error.public)
                await sleep_or_drain(waits.next(), self._drain)
            except Exception:
                # A defect must not end a loop that fills orders: it is logged, and the next order taken.
                log.exception("order failed", holder=holder)
                await sleep_or_drain(waits.next(), self._drain)

    async def _next(self, holder: str, tiers: Sequence[Tier]) -> Task | None:
        target = (await self._forge.examine()).target
        pace = self._pace
        # Tiers that this machine cannot build are taken too: the order then fails with the reason instead of waiting
        # for a forge that nobody runs.
        return await self._library.lease(holder, target, tiers=tiers, wait_s=pace.wait_s, lease_s=pace.lease_s)

    async def _handle(self, task: Task) -> None:
        """Fill one order under its lease."""
        order, began = task.order, time.monotonic()

        def tell(phase: Phase, *, error: str = "", kernel_id: str = "") -> None:
            elapsed_s = time.monotonic() - began
            self._board.post(
                Step(order, phase, elapsed_s, self._clock(), attempt=task.attempt, error=error, kernel_id=kernel_id)
            )

        tell(Phase.LEASED)
        work = asyncio.create_task(self._fill(task, tell), name=f"build-{order.build_id[:19]}")
        keeper = asyncio.create_task(self._keep(task, work), name=f"keep-{order.build_id[:19]}")
        try:
            built = await work
            await self._patiently(lambda: self._library.succeed(task.lease_id, built.kernel_id))
        except asyncio.CancelledError:
            await self._abandon(task, work)
            return
        except Stale:
            log.warning("lease lost", build_id=order.build_id)
            self._board.abandon(order.build_id)
            return
        except EsperError as error:
            # Whatever it is, also a library that does not want the kernel: the order must not hang in its lease.
            failure = error if isinstance(error, BuildFailed) else BuildFailed(error.public, retryable=True)
            await self._fail(task, failure, tell)
            return
        except Exception as error:
            # A defect of ours, perhaps met on the way of this order alone: another attempt may be spared it.
            log.exception("order failed", build_id=order.build_id)
            words = f"the forge has a defect: {type(error).__name__}"
            await self._fail(task, BuildFailed(words, retryable=True, reason="FORGE_DEFECT"), tell)
            return
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        tell(Phase.SUCCEEDED, kernel_id=built.kernel_id)
        log.info(
            "kernel built",
            build_id=order.build_id,
            kernel_id=built.kernel_id,
            blueprint=built.manifest.blueprint_name,
            signature=str(order.signature),
            tier=order.tier,
            elapsed_s=round(time.monotonic() - began, 3),
        )

    async def _fill(self, task: Task, tell: Callable[[Phase], None]) -> Built:
        order = task.order
        assert self._forge.capability is not None
        if reasons := self._forge.capability.limitations[order.tier]:
            raise BuildFailed("; ".join(reasons), retryable=False, reason="TOOL_MISSING")
        built = await self._forge.build(order, tell)
        tell(Phase.UPLOADING)
        await self._patiently(lambda: self._library.upload(order, built))
        return built

    async def _keep(self, task: Task, work: "asyncio.Task[Built]") -> None:
        """Renew the lease while the work runs; cancel the work when the lease is lost."""
        while True:
            await asyncio.sleep(self._pace.lease_s / 3)
            try:
                await self._library.renew(task.lease_id, self._pace.lease_s)
            except Stale:
                work.cancel()
                return
            except EsperError as error:
                log.warning("lease not renewed yet", build_id=task.order.build_id, error=error.public)

    async def _abandon(self, task: Task, work: "asyncio.Task[Built]") -> None:
        """The work was cancelled: because its lease was lost, or because the forge drains."""
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        self._board.abandon(task.order.build_id)
        current = asyncio.current_task()
        if current is None or not current.cancelling():
            log.warning("lease lost, build stopped", build_id=task.order.build_id)
            return
        # Another forge should have it now, not when the lease has run out.
        with contextlib.suppress(EsperError, TimeoutError):
            gone = BuildFailed("the forge shuts down", retryable=True, reason="DRAINING")
            await asyncio.wait_for(self._library.fail(task.lease_id, gone), _HAND_BACK_S)
        raise asyncio.CancelledError

    async def _fail(self, task: Task, failure: BuildFailed, tell: "Callable[..., None]") -> None:
        build_id = task.order.build_id
        log.warning("build failed", build_id=build_id, reason=failure.reason, error=failure.public[:500])
        tell(Phase.FAILED, error=failure.public)
        try:
            await self._patiently(lambda: self._library.fail(task.lease_id, failure))
        except (Stale, NotFound):
            log.warning("failure told too late, the lease is lost", build_id=build_id)

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
