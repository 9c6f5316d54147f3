"""The library as the forge sees it: blueprints to submit, orders by lease, kernels by stream."""

import contextlib
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Protocol

import grpc
import grpc.aio

from esper.kasmina.blueprints import Blueprint
from esper.kasmina.kernels.bundle import Tier
from esper.mesh.blobs import chunk
from esper.mesh.errors import InvalidInput, from_rpc_error
from esper.mesh.logging import get_logger
from esper.tezzeret.convert import kernel_to_proto, seconds, task_from_proto, tier_to_proto
from esper.tezzeret.orders import BuildFailed, Built, Order, Task
from esper.v1 import blob_pb2, lease_pb2, urza_service_pb2, urza_service_pb2_grpc

__all__ = ["Library", "UrzaLibrary"]

log = get_logger(__name__)


class Library(Protocol):
    """What the forge needs of a library. Every method raises children of `EsperError`."""

    async def offer(self, blueprint: Blueprint) -> bool:
        """Submit a blueprint; True when it was new. One that an operator archived stays archived."""
        ...

    async def lease(
        self, holder: str, target: str, *, tiers: Collection[Tier], wait_s: float, lease_s: float
    ) -> Task | None:
        """Wait for an order; None when there was none in time."""
        ...

    async def renew(self, lease_id: str, lease_s: float) -> None:
        """Keep a lease; `Stale` when it is lost."""
        ...

    async def upload(self, order: Order, built: Built) -> None:
        """Store a kernel as STAGED."""
        ...

    async def succeed(self, lease_id: str, kernel_id: str) -> None:
        """End a lease with its kernel."""
        ...

    async def fail(self, lease_id: str, failure: BuildFailed) -> None:
        """End a lease without one."""
        ...


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


class UrzaLibrary:
    """`Library` over gRPC.

    Args:
        channel: to Urza, with the forge's identity.
        upload_s: longest that an upload may take, in seconds.
    """

    def __init__(self, channel: grpc.aio.Channel, *, upload_s: float) -> None:
        self._stub: urza_service_pb2_grpc.UrzaServiceAsyncStub = urza_service_pb2_grpc.UrzaServiceStub(channel)
        self._upload_s = upload_s

    async def offer(self, blueprint: Blueprint) -> bool:
        """See `Library`."""
        request = urza_service_pb2.SubmitBlueprintRequest(ir=blueprint.canonical_json().encode())
        with _errors():
            return (await self._stub.SubmitBlueprint(request)).created

    async def lease(
        self, holder: str, target: str, *, tiers: Collection[Tier], wait_s: float, lease_s: float
    ) -> Task | None:
        """See `Library`."""
        request = urza_service_pb2.LeaseWorkRequest(
            kind=lease_pb2.WORK_KIND_COMPILE,
            holder=holder,
            max_leases=1,
            wait=seconds(wait_s),
            lease_time=seconds(lease_s),
            tiers=[tier_to_proto(tier) for tier in tiers],
            target=target,
        )
        with _errors():
            # The call outlives its wait by what an answer may take.
            response = await self._stub.LeaseWork(request, timeout=wait_s + 10)
        for lease in response.leases:
            try:
                return task_from_proto(lease)
            except InvalidInput as error:
                # Kept to ourselves it would come back to us for ever.
                log.warning("order refused", lease_id=lease.id, error=error.public)
                await self.fail(lease.id, BuildFailed(error.public, retryable=False, reason=error.reason))
        return None

    async def renew(self, lease_id: str, lease_s: float) -> None:
        """See `Library`."""
        request = urza_service_pb2.RenewLeaseRequest(lease_id=lease_id, lease_time=seconds(lease_s))
        with _errors():
            await self._stub.RenewLease(request)

    async def upload(self, order: Order, built: Built) -> None:
        """See `Library`."""
        with _errors():
            await self._stub.UploadKernel(_parts(order, built), timeout=self._upload_s)

    async def succeed(self, lease_id: str, kernel_id: str) -> None:
        """See `Library`."""
        with _errors():
            await self._stub.CompleteWork(urza_service_pb2.CompleteWorkRequest(lease_id=lease_id, kernel_id=kernel_id))

    async def fail(self, lease_id: str, failure: BuildFailed) -> None:
        """See `Library`."""
        work = urza_service_pb2.WorkFailure(error=failure.public, retryable=failure.retryable)
        with _errors():
            await self._stub.CompleteWork(urza_service_pb2.CompleteWorkRequest(lease_id=lease_id, failure=work))


async def _parts(order: Order, built: Built) -> AsyncIterator[urza_service_pb2.UploadKernelRequest]:
    yield urza_service_pb2.UploadKernelRequest(kernel=kernel_to_proto(order, built))
    offset = 0
    for data in chunk(built.bundle):
        yield urza_service_pb2.UploadKernelRequest(chunk=blob_pb2.BlobChunk(offset=offset, data=data))
        offset += len(data)
    digest = blob_pb2.BlobDigest(digest=built.kernel_id, size_bytes=len(built.bundle))
    yield urza_service_pb2.UploadKernelRequest(digest=digest)
