"""Kernels for the training thread: fetched, verified and loaded in the background, handed over when they are there.

Two places work together. The event loop talks to the library (metadata, keys, chunks); one worker thread runs the
`KernelCache`, whose loading is slow and whose fetching blocks. The training thread only looks into a table.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import grpc.aio

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
    from collections.abc import Callable
    from pathlib import Path

    from esper.kasmina.cache import Fetched, KernelCache
    from esper.kasmina.kernels.kernel import Kernel
    from esper.kasmina.link import LinkSettings
    from esper.kasmina.signature import Signature

__all__ = ["KernelFetcher"]

_log = get_logger("esper.kasmina.link")
_SERVED = frozenset({kernel_pb2.KERNEL_STATE_VALIDATED, kernel_pb2.KERNEL_STATE_ARCHIVED})


class KernelFetcher:
    """The table of kernels of one link.

    Args:
        settings: patience, bounds and pinned keys.
        channel: gives the link's channel; called on the loop.
        cache_dir: of the disk entries; None keeps nothing on disk.
    """

    def __init__(self, settings: LinkSettings, channel: Callable[[], grpc.aio.Channel], cache_dir: Path | None) -> None:
        self._settings = settings
        self._channel = channel
        self._cache_dir = cache_dir
        self._lock = threading.Lock()
        self._table: OrderedDict[str, Kernel | EsperError] = OrderedDict()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="esper-kernels")
        self._cache: KernelCache | None = None
        self._trust = TrustStore(settings.pinned_keys)
        self._loop: asyncio.AbstractEventLoop | None = None

    # Training thread

    def look_up(self, kernel_id: str) -> Kernel | None:
        """The kernel, or None while it is not there; a refusal is raised once and then forgotten.

        Raises:
            EsperError: the kernel was refused or could not be fetched.
        """
        with self._lock:
            found = self._table.get(kernel_id)
            if isinstance(found, EsperError):
                del self._table[kernel_id]
                raise found
            if found is not None:
                self._table.move_to_end(kernel_id)
            return found

    # Event loop

    def request(self, kernel_id: str, signature: Signature | None) -> None:
        """Begin to fetch; nothing happens when it is under way or there for the same signature."""
        with self._lock:
            found = self._table.get(kernel_id)
        there = found is not None and not isinstance(found, EsperError)
        if kernel_id in self._tasks or (there and signature in {None, found.signature}):  # type: ignore[union-attr]  # `there` says so
            return
        if len(self._tasks) >= self._settings.max_kernels:
            full = LimitExceeded(f"kernel {kernel_id:.80}: {len(self._tasks)} kernels are being fetched already")
            if signature is not None:
                self._keep(kernel_id, full)
            return
        self._loop = asyncio.get_running_loop()
        task = self._loop.create_task(self._fetch_and_keep(kernel_id, signature))
        self._tasks[kernel_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(kernel_id, None))

    async def close(self) -> None:
        """Give up what is under way; loaded kernels stay in the table."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _keep(self, kernel_id: str, found: Kernel | EsperError) -> None:
        with self._lock:
            self._table[kernel_id] = found
            self._table.move_to_end(kernel_id)
            while len(self._table) > self._settings.max_kernels:
                self._table.popitem(last=False)

    async def _fetch_and_keep(self, kernel_id: str, signature: Signature | None) -> None:
        try:
            found: Kernel | EsperError = await self._persist(kernel_id, signature)
            _log.info("kernel_ready", kernel_id=kernel_id)
        except EsperError as error:
            found = error
        except Exception as error:  # noqa: BLE001  # a defect must reach whoever asked, not die with a task
            _log.exception("kernel_fetch_failed", kernel_id=kernel_id)
            found = InternalError(f"kernel {kernel_id:.80} could not be loaded: {type(error).__name__}: {error!s:.300}")
        if isinstance(found, EsperError):
            _log.warning("kernel_refused", kernel_id=kernel_id, reason=found.reason, detail=found.public)
            if signature is None:
                return  # a mere prefetch; whoever needs it will ask and be told
        self._keep(kernel_id, found)

    async def _persist(self, kernel_id: str, signature: Signature | None) -> Kernel:
        """Obtain a kernel through trouble that may pass.

        Raises:
            EsperError: refused, or still failing after the last attempt.
        """
        settings = self._settings
        for attempt in range(1, settings.kernel_attempts + 1):
            try:
                return await self._obtain(kernel_id, signature)
            except KernelRejected:
                raise
            except (Unavailable, DeadlineMissed, Cancelled, LimitExceeded, Corrupt) as error:
                if attempt == settings.kernel_attempts:
                    raise
                _log.info("kernel_fetch_retried", kernel_id=kernel_id, attempt=attempt, reason=error.reason)
                await asyncio.sleep(min(settings.probe_max_s, settings.probe_initial_s * 2**attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _obtain(self, kernel_id: str, signature: Signature | None) -> Kernel:
        away = await self._refresh(kernel_id)
        if away is not None and not self._trust.keys:
            raise away
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._obtain_blocking, kernel_id, signature)

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
            if self._cache is not None:
                self._cache.forget(kernel_id)
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

    # Worker thread

    def _obtain_blocking(self, kernel_id: str, signature: Signature | None) -> Kernel:
        if self._cache is None:
            # Late and here: it imports torch, and its disk must not be waited for on the loop.
            from esper.kasmina.cache import KernelCache

            self._cache = KernelCache(self._cache_dir, self._fetch, lambda: self._trust)
        return self._cache.obtain(kernel_id, signature)

    def _fetch(self, kernel_id: str) -> Fetched:
        assert self._loop is not None  # `request` set it
        return asyncio.run_coroutine_threadsafe(self._download(kernel_id), self._loop).result()

    # Event loop again

    async def _download(self, kernel_id: str) -> Fetched:
        """Bundle and verdict of a kernel from the library.

        Raises:
            EsperError: the library's refusal, or a stream that is not what was promised.
        """
        from esper.kasmina.cache import Fetched  # late: imports torch, which the cache on the worker thread did

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
