"""The RPCs of `esper.v1.UrzaService`: convert, call the library, convert."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.message import Message

from esper.mesh.context import current_identity, time_remaining
from esper.mesh.errors import Unavailable
from esper.mesh.streams import race_drain
from esper.urza import convert
from esper.urza.kernels import Kernel, KernelState
from esper.urza.library import Library
from esper.urza.paging import Page, page_limit, read_token, write_token
from esper.urza.upload import Upload, malformed
from esper.v1 import blob_pb2, urza_service_pb2_grpc
from esper.v1 import urza_service_pb2 as pb

__all__ = ["UrzaServicer"]

PAGE_BYTES = 3 << 20
"""A page ends early beyond this size: kernels come with verdicts of up to 256 KiB, and a message holds 4 MiB."""

ANSWER_MARGIN_S = 0.25
"""A wait for work ends this long before the caller's deadline: a lease in an answer that comes too late is lost."""

_M = TypeVar("_M", bound=Message)
_R = TypeVar("_R")


class UrzaServicer(urza_service_pb2_grpc.UrzaServiceServicer):
    """Answers for a library.

    Args:
        library: does the work.
        drain: ends watches.
        default_lease_s: length of leases of those who do not say, in seconds.
    """

    def __init__(self, library: Library, *, drain: asyncio.Event, default_lease_s: float) -> None:
        self._library = library
        self._drain = drain
        self._default_lease_s = default_lease_s

    async def SubmitBlueprint(self, request: pb.SubmitBlueprintRequest, context: Any) -> pb.SubmitBlueprintResponse:
        """Store a blueprint."""
        blueprint, created = await self._library.submit_blueprint(request.ir, request.parent_ids, current_identity())
        return pb.SubmitBlueprintResponse(blueprint=convert.blueprint_to_proto(blueprint), created=created)

    async def GetBlueprint(self, request: pb.GetBlueprintRequest, context: Any) -> pb.GetBlueprintResponse:
        """Return one blueprint."""
        blueprint = await self._library.get_blueprint(convert.text(request.blueprint))
        return pb.GetBlueprintResponse(blueprint=convert.blueprint_to_proto(blueprint))

    async def ListBlueprints(self, request: pb.ListBlueprintsRequest, context: Any) -> pb.ListBlueprintsResponse:
        """List blueprints."""
        layout = convert.LAYOUTS.get(request.layout)
        tags = sorted({convert.text(tag) for tag in request.tags})
        query = f"blueprints {layout} {tags} {request.include_archived}"
        page = await self._library.list_blueprints(
            limit=page_limit(request.page_size),
            before=read_token(request.page_token, query),
            layout=layout,
            tags=tags,
            include_archived=request.include_archived,
        )
        entries, token = _fit(page, convert.blueprint_to_proto, query)
        return pb.ListBlueprintsResponse(blueprints=entries, next_page_token=token)

    async def ArchiveBlueprint(self, request: pb.ArchiveBlueprintRequest, context: Any) -> pb.ArchiveBlueprintResponse:
        """Take a blueprint out of use."""
        blueprint = await self._library.archive_blueprint(request.blueprint_id, current_identity())
        return pb.ArchiveBlueprintResponse(blueprint=convert.blueprint_to_proto(blueprint))

    async def RequestBuilds(self, request: pb.RequestBuildsRequest, context: Any) -> pb.RequestBuildsResponse:
        """Ask for kernels."""
        orders = [convert.order_from_proto(build) for build in request.builds]
        builds = await self._library.request_builds(orders, retry=request.retry)
        return pb.RequestBuildsResponse(builds=[convert.build_to_proto(build) for build in builds])

    async def GetBuild(self, request: pb.GetBuildRequest, context: Any) -> pb.GetBuildResponse:
        """Return one build."""
        build = await self._library.get_build(request.build_id)
        return pb.GetBuildResponse(build=convert.build_to_proto(build))

    async def ListBuilds(self, request: pb.ListBuildsRequest, context: Any) -> pb.ListBuildsResponse:
        """List builds."""
        states = sorted({convert.BUILD_STATES[state] for state in request.states if state})
        query = f"builds {states}"
        page = await self._library.list_builds(
            limit=page_limit(request.page_size), before=read_token(request.page_token, query), states=states
        )
        entries, token = _fit(page, convert.build_to_proto, query)
        return pb.ListBuildsResponse(builds=entries, next_page_token=token)

    async def UploadKernel(
        self, request_iterator: AsyncIterable[pb.UploadKernelRequest], context: Any
    ) -> pb.UploadKernelResponse:
        """Take a bundle in: kernel, chunks, digest, end."""
        parts = aiter(request_iterator)
        first = await anext(parts, None)
        if first is None or first.WhichOneof("part") != "kernel":
            found = "the end of the stream" if first is None else f"a {first.WhichOneof('part')}"
            raise malformed("a kernel as the first part", found)
        upload = await self._library.begin_upload(convert.offer_from_proto(first.kernel))
        try:
            async for part in parts:
                await _take(upload, part)
            kernel, created = await self._library.finish_upload(upload, current_identity())
        finally:
            await upload.abort()
        return pb.UploadKernelResponse(kernel=convert.kernel_to_proto(kernel), created=created)

    async def GetKernel(self, request: pb.GetKernelRequest, context: Any) -> pb.GetKernelResponse:
        """Return one kernel."""
        kernel = await self._library.get_kernel(convert.text(request.kernel))
        return pb.GetKernelResponse(kernel=convert.kernel_to_proto(kernel))

    async def ListKernels(self, request: pb.ListKernelsRequest, context: Any) -> pb.ListKernelsResponse:
        """List kernels."""
        query = convert.query_from_proto(request)
        conditions = pb.ListKernelsRequest()
        conditions.CopyFrom(request)
        conditions.ClearField("page_size")
        conditions.ClearField("page_token")
        fingerprint = "kernels " + conditions.SerializeToString(deterministic=True).hex()
        page = await self._library.list_kernels(
            query, limit=page_limit(request.page_size), before=read_token(request.page_token, fingerprint)
        )
        entries, token = _fit(page, convert.kernel_to_proto, fingerprint)
        return pb.ListKernelsResponse(kernels=entries, next_page_token=token)

    async def DownloadKernel(
        self, request: pb.DownloadKernelRequest, context: Any
    ) -> AsyncIterator[pb.DownloadKernelResponse]:
        """Send a bundle: kernel, chunks, digest, end."""
        kernel = await self._library.open_kernel(request.kernel_id)
        yield pb.DownloadKernelResponse(kernel=convert.kernel_to_proto(kernel))
        offset = 0
        async with aclosing(self._library.read_bundle(kernel)) as pieces:
            async for data in pieces:
                yield pb.DownloadKernelResponse(chunk=blob_pb2.BlobChunk(offset=offset, data=data))
                offset += len(data)
        yield pb.DownloadKernelResponse(digest=blob_pb2.BlobDigest(digest=kernel.id, size_bytes=offset))

    async def ArchiveKernel(self, request: pb.ArchiveKernelRequest, context: Any) -> pb.ArchiveKernelResponse:
        """Take a kernel out of use."""
        kernel = await self._move(request.kernel_id, KernelState.ARCHIVED, "archived")
        return pb.ArchiveKernelResponse(kernel=convert.kernel_to_proto(kernel))

    async def QuarantineKernel(self, request: pb.QuarantineKernelRequest, context: Any) -> pb.QuarantineKernelResponse:
        """Stop serving a kernel."""
        kernel = await self._move(request.kernel_id, KernelState.QUARANTINED, convert.text(request.reason))
        return pb.QuarantineKernelResponse(kernel=convert.kernel_to_proto(kernel))

    async def GetLineage(self, request: pb.GetLineageRequest, context: Any) -> pb.GetLineageResponse:
        """Tell where a kernel comes from."""
        lineage = await self._library.lineage(request.kernel_id)
        return pb.GetLineageResponse(
            kernel=convert.kernel_to_proto(lineage.kernel),
            build=convert.build_to_proto(lineage.build),
            blueprints=[convert.blueprint_to_proto(blueprint) for blueprint in lineage.blueprints],
            transitions=[convert.transition_to_proto(transition) for transition in lineage.transitions],
        )

    async def WatchLibrary(
        self, request: pb.WatchLibraryRequest, context: Any
    ) -> AsyncIterator[pb.WatchLibraryResponse]:
        """Tell what changes, until the client leaves or the server drains."""
        after = request.after_sequence if request.HasField("after_sequence") else None
        async with aclosing(race_drain(self._library.watch(after), self._drain)) as changes:
            async for change in changes:
                yield convert.change_to_proto(change)
        raise Unavailable("the library is draining: watch again after the last number seen", reason="DRAINING")

    async def LeaseWork(self, request: pb.LeaseWorkRequest, context: Any) -> pb.LeaseWorkResponse:
        """Hand out work."""
        wait_s = convert.seconds(request.wait)
        remaining = time_remaining()
        if remaining is not None:
            wait_s = min(wait_s, remaining - ANSWER_MARGIN_S)
        wanted = convert.request_from_proto(request, default_lease_s=self._default_lease_s)
        leases = await self._library.desk.lease(wanted, current_identity(), wait_s=wait_s)
        return pb.LeaseWorkResponse(leases=[convert.lease_to_proto(lease) for lease in leases])

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Any) -> pb.RenewLeaseResponse:
        """Keep a lease."""
        length = convert.seconds(request.lease_time) if request.HasField("lease_time") else None
        until = await self._library.desk.renew(convert.text(request.lease_id), length, current_identity())
        return pb.RenewLeaseResponse(expire_time=convert.stamp(until))

    async def CompleteWork(self, request: pb.CompleteWorkRequest, context: Any) -> pb.CompleteWorkResponse:
        """End a lease."""
        outcome = convert.outcome_from_proto(request)
        result = await self._library.desk.complete(convert.text(request.lease_id), outcome, current_identity())
        if isinstance(result, Kernel):
            return pb.CompleteWorkResponse(kernel=convert.kernel_to_proto(result))
        return pb.CompleteWorkResponse(build=convert.build_to_proto(result))

    async def RegisterSigningKey(
        self, request: pb.RegisterSigningKeyRequest, context: Any
    ) -> pb.RegisterSigningKeyResponse:
        """Make a public key known."""
        key = request.key
        stored = await self._library.register_key(
            convert.text(key.key_id), key.public_key, current_identity(), revoked=key.revoked
        )
        return pb.RegisterSigningKeyResponse(key=convert.key_to_proto(stored))

    async def ListSigningKeys(self, request: pb.ListSigningKeysRequest, context: Any) -> pb.ListSigningKeysResponse:
        """List public keys."""
        return pb.ListSigningKeysResponse(keys=[convert.key_to_proto(key) for key in await self._library.keys()])

    async def _move(self, kernel_id: str, state: KernelState, reason: str) -> Kernel:
        return await self._library.move_kernel(kernel_id, state, current_identity(), reason)


async def _take(upload: Upload, part: pb.UploadKernelRequest) -> None:
    match part.WhichOneof("part"):
        case "chunk":
            await upload.add(part.chunk.offset, part.chunk.data)
        case "digest":
            upload.end(part.digest.digest, part.digest.size_bytes)
        case found:
            raise malformed("chunks and one digest after the kernel", f"a {found}")


def _fit(page: Page[_R], to_proto: Callable[[_R], _M], query: str) -> tuple[Sequence[_M], str]:
    """As many entries of a page as a message holds, and the token of what follows."""
    messages: list[_M] = []
    room = PAGE_BYTES
    last: Any = None
    for entry in page.entries:
        message = to_proto(entry)
        room -= message.ByteSize()
        if messages and room < 0:
            break
        messages.append(message)
        last = entry
    complete = len(messages) == len(page.entries) and not page.more
    return messages, "" if complete else write_token(last.sequence, query)
