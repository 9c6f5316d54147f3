"""The library as the evaluation engine sees it: work by lease, bundles by stream, verdicts in return."""

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import grpc
import grpc.aio

from esper.kasmina.kernels.signing import PublicKey
from esper.mesh.blobs import BlobAssembler
from esper.mesh.errors import Corrupt, from_rpc_error
from esper.urabrask.board import Judgement
from esper.urabrask.convert import candidate_from_proto, key_to_proto, seconds, verdict_to_proto
from esper.urabrask.engine import Candidate
from esper.v1 import kernel_pb2, lease_pb2, urza_service_pb2, urza_service_pb2_grpc

__all__ = ["Library", "Task", "UrzaLibrary"]

MAX_ERROR = 8000


@dataclass(frozen=True, slots=True)
class Task:
    """A lease over one candidate."""

    lease_id: str
    attempt: int
    candidate: Candidate


class Library(Protocol):
    """What the engine needs of a library. Every method raises children of `EsperError`."""

    async def register_key(self, key: PublicKey, create_time: datetime) -> bool:
        """Make a key known; False when it was revoked."""
        ...

    async def lease(self, holder: str, target: str, *, wait_s: float, lease_s: float) -> Task | None:
        """Wait for a kernel to judge; None when there was none in time."""
        ...

    async def renew(self, lease_id: str, lease_s: float) -> None:
        """Keep a lease; `Stale` when it is lost."""
        ...

    async def download(self, candidate: Candidate) -> bytes:
        """The bundle, its digest verified; `Corrupt` when it is another."""
        ...

    async def complete(self, lease_id: str, judgement: Judgement) -> None:
        """End a lease with a verdict."""
        ...

    async def give_up(self, lease_id: str, error: str) -> None:
        """End a lease without a verdict: somebody else may try."""
        ...


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


class UrzaLibrary:
    """`Library`, and the `Archive` of a recall, over gRPC.

    Args:
        channel: to Urza, with the engine's identity.
        max_bundle_bytes: largest bundle taken.
        download_s: longest that a download may take.
    """

    def __init__(self, channel: grpc.aio.Channel, *, max_bundle_bytes: int, download_s: float) -> None:
        self._stub: urza_service_pb2_grpc.UrzaServiceAsyncStub = urza_service_pb2_grpc.UrzaServiceStub(channel)
        self._max_bundle_bytes = max_bundle_bytes
        self._download_s = download_s

    async def register_key(self, key: PublicKey, create_time: datetime) -> bool:
        """See `Library`."""
        request = urza_service_pb2.RegisterSigningKeyRequest(key=key_to_proto(key, create_time))
        with _errors():
            response = await self._stub.RegisterSigningKey(request)
        return not response.key.revoked

    async def lease(self, holder: str, target: str, *, wait_s: float, lease_s: float) -> Task | None:
        """See `Library`."""
        request = urza_service_pb2.LeaseWorkRequest(
            kind=lease_pb2.WORK_KIND_EVALUATE,
            holder=holder,
            max_leases=1,
            wait=seconds(wait_s),
            lease_time=seconds(lease_s),
            target=target,
        )
        with _errors():
            # The call outlives its wait by what an answer may take.
            response = await self._stub.LeaseWork(request, timeout=wait_s + 10)
        for lease in response.leases:
            return Task(lease.id, lease.attempt, candidate_from_proto(lease.evaluate.kernel))
        return None

    async def renew(self, lease_id: str, lease_s: float) -> None:
        """See `Library`."""
        request = urza_service_pb2.RenewLeaseRequest(lease_id=lease_id, lease_time=seconds(lease_s))
        with _errors():
            await self._stub.RenewLease(request)

    async def download(self, candidate: Candidate) -> bytes:
        """See `Library`."""
        assembler = BlobAssembler(size=candidate.size_bytes, digest=candidate.id, max_bytes=self._max_bundle_bytes)
        call = self._stub.DownloadKernel(
            urza_service_pb2.DownloadKernelRequest(kernel_id=candidate.id), timeout=self._download_s
        )
        with _errors():
            async for chunk in _chunks(call):
                assembler.add(chunk)
        return assembler.finish()

    async def served(self, kernel_id: str) -> Candidate | None:
        """See `Archive`."""
        with _errors():
            response = await self._stub.GetKernel(urza_service_pb2.GetKernelRequest(kernel=kernel_id))
        serving = response.kernel.state in {kernel_pb2.KERNEL_STATE_VALIDATED, kernel_pb2.KERNEL_STATE_ARCHIVED}
        return candidate_from_proto(response.kernel) if serving else None

    async def quarantine(self, kernel_id: str, reason: str) -> None:
        """See `Archive`."""
        request = urza_service_pb2.QuarantineKernelRequest(kernel_id=kernel_id, reason=reason)
        with _errors():
            await self._stub.QuarantineKernel(request)

    async def complete(self, lease_id: str, judgement: Judgement) -> None:
        """See `Library`."""
        request = urza_service_pb2.CompleteWorkRequest(lease_id=lease_id, verdict=verdict_to_proto(judgement))
        with _errors():
            await self._stub.CompleteWork(request)

    async def give_up(self, lease_id: str, error: str) -> None:
        """See `Library`."""
        failure = urza_service_pb2.WorkFailure(error=error[:MAX_ERROR], retryable=True)
        with _errors():
            await self._stub.CompleteWork(urza_service_pb2.CompleteWorkRequest(lease_id=lease_id, failure=failure))


async def _chunks(call: AsyncIterable[urza_service_pb2.DownloadKernelResponse]) -> AsyncIterator[bytes]:
    """The pieces of a download: the kernel first, pieces without gaps, the digest last."""
    offset, ended = 0, False
    async for response in call:
        if response.HasField("chunk") and not ended:
            if response.chunk.offset != offset:
                raise Corrupt(f"download: expected the piece at {offset}, found one at {response.chunk.offset}")
            offset += len(response.chunk.data)
            yield response.chunk.data
        elif response.HasField("digest"):
            ended = True
    if not ended:
        raise Corrupt(f"download: expected its digest at the end, found none after {offset} bytes")
