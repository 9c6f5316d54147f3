"""Kernels for the training thread: fetched, verified and loaded in the background, handed over when they are there.

Three places work together. The event loop talks to the library (metadata, keys, chunks). Two worker threads run the
`KernelCache`, whose loading is slow and whose fetching blocks: one for what seeds need, one for what may be needed.
The training thread only looks: among the refusals, and into the cache, which has the only reference to a kernel that no
seed uses.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from esper.kasmina._link_variants import VariantScout
from esper.kasmina.cache import Fetched, KernelCache
from esper.kasmina.kernels.rejection import KernelRejected, KernelUntrusted
from esper.kasmina.kernels.signing import PublicKey, SignedVerdict, TrustStore
from esper.mesh.blobs import BlobAssembler
from esper.mesh.errors import (
    Cancelled,
    Corrupt,
    DeadlineMissed,
    EsperError,
    InternalError,
    LimitExceeded,
    Unavailable,
    from_rpc_error,
)
from esper.mesh.logging import get_logger
from esper.v1 import kernel_pb2, urza_service_pb2
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from esper.kasmina.kernels.kernel import Kernel
    from esper.kasmina.link import LinkSettings
    from esper.kasmina.signature import Signature

__all__ = ["KernelFetcher"]

_log = get_logger("esper.kasmina.link")
_SERVED = frozenset({kernel_pb2.KERNEL_STATE_VALIDATED, kernel_pb2.KERNEL_STATE_ARCHIVED})


@dataclass(slots=True)
class _Job:
    """One kernel that is on its way."""

    wanted: Signature | None
    """Where a seed needs it; None while it is fetched ahead."""
    task: asyncio.Task[None] | None = None


class KernelFetcher:
    """The kernels of one link.

    Args:
        settings: patience, bounds and pinned keys.
        channel: gives the link's channel; called on the loop.
        cache_dir: of the disk entries; None keeps nothing on disk.
    """

    def __init__(self, settings: LinkSettings, channel: Callable[[], grpc.aio.Channel], cache_dir: Path | None) -> None:
        self._settings = settings
        self._channel = channel
        self._lock = threading.Lock()
        self._refusals: OrderedDict[str, EsperError] = OrderedDict()
        self._jobs: dict[str, _Job] = {}
        self._announced: set[str] = set()
        """Asked for ahead, and not yet looked at by the loop."""
        self._held: frozenset[str] = frozenset()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="esper-kernels")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="esper-kernels-ahead")
        self._closed = False
        self.cache = KernelCache(
            cache_dir,
            self._fetch,
            lambda: self._trust,
            loaded_bytes=settings.loaded_bytes,
            memory_bytes=settings.memory_bytes,
            disk_bytes=settings.disk_bytes,
        )
        self.variants = VariantScout(settings, channel, self.cache, self.request_ahead)
        self._trust = TrustStore(settings.pinned_keys)
        self._loop: asyncio.AbstractEventLoop | None = None

    # Training thread

    def look_up(self, kernel_id: str) -> Kernel | None:
        """The kernel, or None while it is not there; a refusal is raised once and then forgotten.

        Raises:
            EsperError: the kernel was refused or could not be fetched.
        """
        # First this: a kernel that is loaded may yet be refused, and the refusal is there before the job is gone.
        if kernel_id in self._jobs:
            return None
        if self._refusals:
            with self._lock:
                refusal = self._refusals.pop(kernel_id, None)
            if refusal is not None:
                raise refusal
        return self.cache.get(kernel_id)

    def announce(self, kernel_ids: Sequence[str]) -> None:
        """Count kernels as under way that `request_ahead` is about to be called with."""
        with self._lock:
            self._announced.update(kernel_ids)

    def dismiss(self, kernel_ids: Sequence[str]) -> None:
        """Undo `announce`."""
        with self._lock:
            self._announced.difference_update(kernel_ids)

    def under_way(self, kernel_ids: Sequence[str]) -> frozenset[str]:
        """Those of these kernels that are being fetched; any other that is not in the cache will not come."""
        with self._lock:
            # In this order: an announced kernel becomes a job before it is dismissed.
            return frozenset(k for k in kernel_ids if k in self._announced or k in self._jobs)

    # Event loop

    def request(self, kernel_id: str, signature: Signature) -> None:
        """Begin to fetch for a seed, and hold it from now on; at once when it is there for the same signature."""
        _log.info("kernels_asked", kernel_ids=[kernel_id], ahead=False)
        if kernel_id not in self._held:
            self._held |= {kernel_id}
            self.cache.hold(kernel_id)
        with self._lock:
            self._refusals.pop(kernel_id, None)  # of an earlier request
        job = self._jobs.get(kernel_id)
        if job is not None:
            job.wanted = job.wanted or signature
            return
        kernel = self.cache.get(kernel_id)
        if kernel is not None and kernel.signature == signature:
            return
        needed = sum(other.wanted is not None for other in self._jobs.values())
        if needed >= self._settings.max_kernels:
            self._refuse(kernel_id, LimitExceeded(f"kernel {kernel_id:.80}: {needed} are being fetched already"))
        else:
            self._begin(kernel_id, signature)

    def request_ahead(self, kernel_ids: Sequence[str]) -> None:
        """Begin to fetch what is likely to be needed; what is there counts as asked for, what is too much is left."""
        _log.info("kernels_asked", kernel_ids=list(kernel_ids), ahead=True)
        for kernel_id in kernel_ids:
            known = kernel_id in self._jobs or self.cache.get(kernel_id) is not None
            if not known and len(self._jobs) < self._settings.max_kernels and self.cache.roomy:
                self._begin(kernel_id, None)
        self.dismiss(kernel_ids)

    def hold_only(self, kernel_ids: Sequence[str]) -> None:
        """Hold these kernels and let go of all others; the cache also looks whether memory has become scarce."""
        if self._closed:
            return
        wanted = frozenset(kernel_ids)
        fresh, gone, self._held = wanted - self._held, self._held - wanted, wanted
        for kernel_id in fresh:
            self.cache.hold(kernel_id)
        self._worker.submit(self._let_go, gone)
        self.variants.look(kernel_ids)

    def _begin(self, kernel_id: str, wanted: Signature | None) -> None:
        self._loop = asyncio.get_running_loop()
        job = self._jobs[kernel_id] = _Job(wanted)
        job.task = self._loop.create_task(self._run(kernel_id, job))

    async def close(self) -> None:
        """Give up what is under way; loaded kernels stay in the cache."""
        self._closed = True
        await self.variants.close()
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in (self._worker, self._ahead):
            worker.shutdown(wait=False, cancel_futures=True)
        _log.info("kernel_cache_closed", **asdict(self.cache.stats))

    def _refuse(self, kernel_id: str, refusal: EsperError) -> None:
        with self._lock:
            self._refusals[kernel_id] = refusal
            self._refusals.move_to_end(kernel_id)
            while len(self._refusals) > self._settings.max_kernels:
                self._refusals.popitem(last=False)

    async def _run(self, kernel_id: str, job: _Job) -> None:
        refusal: EsperError | None = None
        try:
            await self._persist(kernel_id, job)
            _log.info("kernel_ready", kernel_id=kernel_id)
        except EsperError as error:
            refusal = error
        except Exception as error:  # noqa: BLE001  # a defect must reach whoever asked, not die with a task
            _log.exception("kernel_fetch_failed", kernel_id=kernel_id)
            refusal = InternalError(
                f"kernel {kernel_id:.80} could not be loaded: {type(error).__name__}: {error!s:.300}"
            )
        if refusal is not None:
            _log.warning("kernel_refused", kernel_id=kernel_id, reason=refusal.reason, detail=refusal.public)
            # Fetched ahead it disturbs nobody; whoever needs it will ask and be told.
            if job.wanted is not None:
                self._refuse(kernel_id, refusal)
        # Here and not in a callback: until that ran, a request would take this job for one under way.
        del self._jobs[kernel_id]

    async def _persist(self, kernel_id: str, job: _Job) -> None:
        """Obtain a kernel through trouble that may pass.

        Raises:
            EsperError: refused, or still failing after the last attempt.
        """
        wanted = job.wanted
        await self._attempt(kernel_id, wanted)
        if job.wanted is not wanted:
            # Fetched ahead it may not have been kept; now a seed needs it, and holds it.
            await self._attempt(kernel_id, job.wanted)

    async def _attempt(self, kernel_id: str, wanted: Signature | None) -> None:
        settings = self._settings
        for attempt in range(1, settings.kernel_attempts + 1):
            try:
                await self._obtain(kernel_id, wanted)
            except KernelRejected:
                raise
            except (Unavailable, DeadlineMissed, Cancelled, LimitExceeded, Corrupt) as error:
                if attempt == settings.kernel_attempts:
                    raise
                _log.info("kernel_fetch_retried", kernel_id=kernel_id, attempt=attempt, reason=error.reason)
                await asyncio.sleep(min(settings.probe_max_s, settings.probe_initial_s * 2**attempt))
            else:
                return

    async def _obtain(self, kernel_id: str, signature: Signature | None) -> Kernel:
        away = await self._refresh(kernel_id)
        if away is not None and not self._trust.keys:
            raise away
        worker = self._ahead if signature is None else self._worker
        return await asyncio.get_running_loop().run_in_executor(worker, self.cache.obtain, kernel_id, signature)

    async def _refresh(self, kernel_id: str) -> EsperError | None:
        """Learn the keys in force and whether this kernel is still served; why not, when the library is away.

        Raises:
            EsperError: the library knows the kernel and does not serve it, or does not know it.
        """
        stub = UrzaServiceStub(self._channel())
        timeout = self._settings.call_timeout_s
        try:
            keys = await stub.ListSigningKeys(urza_service_pb2.ListSigningKeysRequest(), timeout=timeout)
            self._trust = self._believed(PublicKey(key.public_key, key.revoked) for key in keys.keys)
            known = await stub.GetKernel(urza_service_pb2.GetKernelRequest(kernel=kernel_id), timeout=timeout)
        except grpc.RpcError as error:
            translated = from_rpc_error(error)
            if isinstance(translated, (Unavailable, DeadlineMissed, Cancelled)):
                return translated
            raise translated from error
        if known.kernel.state not in _SERVED:
            await asyncio.to_thread(self.cache.forget, kernel_id)
            state = kernel_pb2.KernelState.Name(known.kernel.state).removeprefix("KERNEL_STATE_")
            raise KernelUntrusted(kernel_id, [f"the library holds it as {state}, and only validated kernels run"])
        return None

    def _believed(self, listed: object) -> TrustStore:
        """The keys of the library; where keys are pinned only those, and revocations of them."""
        keys = list(listed)  # type: ignore[call-overload]  # an iterable of PublicKey
        pinned = {key.key_id for key in self._settings.pinned_keys}
        if not pinned:
            return TrustStore(keys)
        return TrustStore([*self._settings.pinned_keys, *(key for key in keys if key.key_id in pinned)])

    # Worker threads

    def _let_go(self, kernel_ids: frozenset[str]) -> None:
        for kernel_id in kernel_ids:
            self.cache.release(kernel_id)
        self.cache.relieve()

    def _fetch(self, kernel_id: str) -> Fetched:
        assert self._loop is not None  # `_begin` set it
        return asyncio.run_coroutine_threadsafe(self._download(kernel_id), self._loop).result()

    # Event loop again

    async def _download(self, kernel_id: str) -> Fetched:
        """Bundle and verdict of a kernel from the library.

        Raises:
            EsperError: the library's refusal, or a stream that is not what was promised.
        """
        request = urza_service_pb2.DownloadKernelRequest(kernel_id=kernel_id)
        assembler: BlobAssembler | None = None
        verdict: SignedVerdict | None = None
        try:
            stub = UrzaServiceStub(self._channel())
            async for message in stub.DownloadKernel(request, timeout=self._settings.download_timeout_s):
                part = message.WhichOneof("part")
                if part == "kernel" and assembler is None:
                    size, limit = message.kernel.size_bytes, self._settings.max_bundle_bytes
                    assembler = BlobAssembler(size=size, digest=kernel_id, max_bytes=limit)
                    said = message.kernel.verdict
                    if said.signature:
                        verdict = SignedVerdict(said.statement, said.signature, said.key_id)
                elif part == "chunk" and assembler is not None:
                    assembler.add(message.chunk.data)
                elif part != "digest" or assembler is None:
                    raise Corrupt(f"kernel {kernel_id}: expected kernel, chunks, digest in this order, found {part}")
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        if assembler is None:
            raise Corrupt(f"kernel {kernel_id}: expected its description first, found an empty stream")
        return Fetched(assembler.finish(), verdict)
