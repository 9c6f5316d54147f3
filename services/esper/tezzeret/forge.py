"""Builds one order in a worker process and believes nothing that comes back before it has looked at it; torch-free.

Whatever becomes of a worker is an answer about its order alone: a refusal and a compiler's error are final, a crash, a
hang and hunger for memory may be tried again.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from esper.kasmina.kernels.bundle import ANY_TARGET, Tier, kernel_id_of, unpack
from esper.kasmina.kernels.rejection import KernelCorrupt
from esper.mesh.errors import Unavailable
from esper.mesh.logging import get_logger
from esper.mesh.workers import WorkerCrashed, WorkerError, WorkerMemory, WorkerPool, WorkerTimeout
from esper.tezzeret.orders import BuildFailed, Built, Capability, Order, Phase

__all__ = ["Forge"]

log = get_logger(__name__)

_RETRYABLE = {WorkerCrashed: "crash", WorkerTimeout: "hang", WorkerMemory: "memory"}


class Forge:
    """The workers and what they can do.

    Args:
        pool: workers whose entry is `esper.tezzeret.worker:compile_job`.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.capability: Capability | None = None
        """None until a worker has said it."""
        self._asking = asyncio.Lock()

    async def examine(self) -> Capability:
        """What the machine can build; the first worker to be ready answers.

        Raises:
            Unavailable: no worker can be started; reason WORKERS_BROKEN.
        """
        async with self._asking:
            if self.capability is None:
                try:
                    answer = await self.pool.run({}, work_id="capability")
                except (WorkerCrashed, WorkerError, WorkerMemory, WorkerTimeout) as error:
                    text = f"no worker of the forge can be started: {error.public}"
                    raise Unavailable(text, reason="WORKERS_BROKEN") from error
                limits = {tier: tuple(answer["limitations"][tier.value]) for tier in Tier}
                self.capability = Capability(str(answer["target"]), limits)
                log.info("forge ready", target=self.capability.target, tiers=self.capability.tiers, limitations=limits)
        return self.capability

    async def build(self, order: Order, tell: Callable[[Phase], None]) -> Built:
        """Build an order.

        Args:
            order: what is asked for.
            tell: is called as phases begin.

        Raises:
            BuildFailed: with the words of whoever refused, and whether another attempt makes sense.
            Unavailable: the workers are draining.
        """

        def heard(progress: dict[str, Any]) -> None:
            phase = progress.get("phase")
            if phase in {Phase.EXPORTING.value, Phase.COMPILING.value}:
                tell(Phase(phase))

        job = {
            "ir": order.ir,
            "signature": str(order.signature),
            "tier": order.tier.value,
            "target": order.target if order.tier.compiled else "",
        }
        try:
            answer = await self.pool.run(job, work_id=order.build_id, on_progress=heard)
        except WorkerError as error:
            raise BuildFailed(error.public, retryable=False, reason="BUILD_DEFECT") from error
        except (WorkerCrashed, WorkerTimeout, WorkerMemory) as error:
            words = f"{_RETRYABLE[type(error)]}: {error.public}"
            raise BuildFailed(words, retryable=True, reason=error.reason) from error
        if "refused" in answer:
            raise BuildFailed(str(answer["refused"]), retryable=False, reason=_reason(answer))
        return await asyncio.to_thread(_believed, order, answer.get("bundle"))


def _reason(answer: dict[str, Any]) -> str:
    reason = str(answer.get("reason"))
    return reason if reason.replace("_", "").isalnum() and reason.isupper() and len(reason) < 60 else "BUILD_REFUSED"


def _believed(order: Order, bundle: object) -> Built:
    """The bundle of a worker, when it is what was ordered."""
    if not isinstance(bundle, bytes):
        raise BuildFailed("the worker answered without a bundle", retryable=True, reason="WORKER_NONSENSE")
    try:
        manifest = unpack(bundle).manifest
    except KernelCorrupt as error:
        raise BuildFailed(error.public, retryable=True, reason="WORKER_NONSENSE") from error
    found = (manifest.blueprint_id, manifest.signature, manifest.tier)
    if found != (order.blueprint_id, order.signature, order.tier):
        text = f"the worker built {manifest.blueprint_name} {manifest.signature} {manifest.tier}, which was not ordered"
        raise BuildFailed(text, retryable=True, reason="WORKER_NONSENSE")
    if order.target and manifest.target not in {order.target, ANY_TARGET}:
        text = f"the worker built for {manifest.target}, ordered was {order.target}"
        raise BuildFailed(text, retryable=True, reason="WORKER_NONSENSE")
    return Built(kernel_id_of(bundle), bundle, manifest)
