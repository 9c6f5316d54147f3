"""Faster variants of the kernels that seeds use: looked for in the library, fetched ahead, offered when loaded.

A variant is another kernel of the same blueprint and signature, compiled for this machine. The library ranks them by
what the gauntlet measured; whether compiled code is then used, and for which inputs, is decided by the verdict's own
bytes when it is loaded.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import grpc
import grpc.aio

from esper.kasmina.convert import signature_to_proto
from esper.kasmina.kernels.pace import GAIN, score
from esper.mesh.logging import get_logger
from esper.v1 import kernel_pb2, urza_service_pb2
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from esper.kasmina.cache import KernelCache
    from esper.kasmina.kernels.kernel import Kernel
    from esper.kasmina.link import LinkSettings
    from esper.kasmina.signature import Signature

__all__ = ["VariantScout"]

_log = get_logger("esper.kasmina.link")


class _Facts(NamedTuple):
    """Of a kernel in use."""

    id: str
    signature: Signature
    blueprint_id: str
    compiled: bool


class VariantScout:
    """Of one link.

    Args:
        settings: patience.
        channel: gives the link's channel; called on the loop.
        cache: where kernels are loaded.
        fetch: begins to fetch kernels ahead; called on the loop.
    """

    def __init__(
        self,
        settings: LinkSettings,
        channel: Callable[[], grpc.aio.Channel],
        cache: KernelCache,
        fetch: Callable[[Sequence[str]], None],
    ) -> None:
        self._settings = settings
        self._channel = channel
        self._cache = cache
        self._fetch = fetch
        self.target = ""
        """Machine of the run, which need not be the CPU of this process; empty where another rank speaks for the run,
        and then nothing is looked for."""
        self._asked: dict[str, float] = {}
        """When the library was last asked, by kernel in use."""
        self._better: dict[str, str] = {}
        """Kernel in use -> the variant that is to replace it. Written on the loop, read on the training thread."""
        self._task: asyncio.Task[None] | None = None

    def faster(self, kernel_id: str) -> Kernel | None:
        """The variant that is to replace a kernel, once it is loaded and has code that is worth it. Training thread."""
        better = self._better.get(kernel_id)
        found = None if better is None else self._cache.get(better)
        return found if found is not None and found.compiled is not None else None

    def look(self, kernel_ids: Sequence[str]) -> None:
        """Ask the library about these kernels in use, each at most once in a while. Event loop."""
        now = time.monotonic()
        self._asked = {k: at for k, at in self._asked.items() if k in kernel_ids}
        self._better = {k: better for k, better in self._better.items() if k in kernel_ids}
        due = [k for k in kernel_ids if now - self._asked.get(k, -1e9) >= self._settings.variant_interval_s]
        if due and self.target and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._ask(due))

    async def close(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _ask(self, kernel_ids: Sequence[str]) -> None:
        for kernel_id in kernel_ids:
            facts = self._facts(kernel_id)
            if facts is None:
                continue
            self._asked[kernel_id] = time.monotonic()
            try:
                better = await self._find(facts)
            except grpc.RpcError as error:
                # As good as none: a run goes on with the kernel that it has.
                _log.info("variants_not_listed", kernel_id=kernel_id, error=str(error)[:200])
                return
            if better:
                _log.info("variant_found", kernel_id=kernel_id, variant=better)
                self._better[kernel_id] = better
                self._fetch([better])

    def _facts(self, kernel_id: str) -> _Facts | None:
        """What is to be known of a kernel; not the kernel itself, which may have to go while the library is asked."""
        kernel = self._cache.get(kernel_id)
        if kernel is None:
            return None
        return _Facts(kernel_id, kernel.signature, kernel.manifest.blueprint_id, kernel.compiled is not None)

    async def _find(self, kernel: _Facts) -> str:
        """Id of a variant that is faster by more than a little; empty where there is none."""
        stub, timeout = UrzaServiceStub(self._channel()), self._settings.call_timeout_s
        listed = await stub.ListKernels(
            urza_service_pb2.ListKernelsRequest(
                page_size=1,
                states=[kernel_pb2.KERNEL_STATE_VALIDATED],
                signatures=[signature_to_proto(kernel.signature)],
                target=self.target,
                blueprint_id=kernel.blueprint_id,
                fastest_only=True,
            ),
            timeout=timeout,
        )
        if not listed.kernels or listed.kernels[0].id == kernel.id:
            return ""
        known = await stub.GetKernel(urza_service_pb2.GetKernelRequest(kernel=kernel.id), timeout=timeout)
        ours = _score(known.kernel) if kernel.compiled else 1.0
        return listed.kernels[0].id if _score(listed.kernels[0]) <= (1.0 - GAIN) * ours else ""


def _score(kernel: kernel_pb2.Kernel) -> float:
    return score({figure.name: figure.value for figure in kernel.verdict.measurements})
