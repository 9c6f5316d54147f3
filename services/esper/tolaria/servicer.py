"""The RPCs of Tolaria: convert, call the orchestrator, convert."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import mimetypes
from datetime import datetime
from typing import TYPE_CHECKING

from esper.mesh.blobs import CHUNK_BYTES
from esper.mesh.errors import InvalidInput, NotFound, Unavailable
from esper.mesh.streams import race_drain
from esper.tolaria import recipes
from esper.tolaria.convert import recipe_to_proto, run_to_proto, spec_from_proto, state_from_proto
from esper.tolaria.core import SETTLED
from esper.v1 import blob_pb2
from esper.v1 import tolaria_service_pb2 as pb
from esper.v1.tolaria_service_pb2_grpc import TolariaServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc.aio

    from esper.tolaria.core import View
    from esper.tolaria.orchestrator import Orchestrator

    _Context = grpc.aio.ServicerContext[object, object]

__all__ = ["TolariaServicer"]

_PAGE = 100
_TYPES = {".jsonl": "application/jsonl", ".safetensors": "application/octet-stream", ".pt2": "application/octet-stream"}


class TolariaServicer(TolariaServiceServicer):
    """Serves `esper.v1.TolariaService`.

    Args:
        orchestrator: what does the work.
        drain: set when the server drains.
    """

    def __init__(self, orchestrator: Orchestrator, drain: asyncio.Event) -> None:
        self._orchestrator = orchestrator
        self._drain = drain

    async def StartRun(self, request: pb.StartRunRequest, context: _Context) -> pb.StartRunResponse:
        """See the contract."""
        seen = await asyncio.to_thread(self._orchestrator.start, spec_from_proto(request.spec), request.request_id)
        return pb.StartRunResponse(run=run_to_proto(seen))

    async def GetRun(self, request: pb.GetRunRequest, context: _Context) -> pb.GetRunResponse:
        """See the contract."""
        seen = await asyncio.to_thread(self._orchestrator.store.view, request.run_id)
        return pb.GetRunResponse(run=run_to_proto(seen))

    async def ListRuns(self, request: pb.ListRunsRequest, context: _Context) -> pb.ListRunsResponse:
        """See the contract."""
        states = {state_from_proto(number) for number in request.states} - {None}

        def wanted(seen: View) -> bool:
            return (not states or seen.state in states) and request.group in {"", seen.record.spec.group}

        before = _read_token(request.page_token)
        found, following = await asyncio.to_thread(
            self._orchestrator.store.page, size=request.page_size or _PAGE, before=before, wanted=wanted
        )
        token = _write_token(following) if following else ""
        return pb.ListRunsResponse(runs=[run_to_proto(seen) for seen in found], next_page_token=token)

    async def WatchRun(self, request: pb.WatchRunRequest, context: _Context) -> AsyncIterator[pb.WatchRunResponse]:
        """See the contract."""
        settled = False
        async for seen in race_drain(self._orchestrator.watch(request.run_id), self._drain):
            settled = seen.state in SETTLED
            yield pb.WatchRunResponse(run=run_to_proto(seen))
        if not settled:
            raise Unavailable("the server is draining: watch again in a moment", reason="DRAINING", retry_after_s=1.0)

    async def PauseRun(self, request: pb.PauseRunRequest, context: _Context) -> pb.PauseRunResponse:
        """See the contract."""
        seen = await asyncio.to_thread(self._orchestrator.pause, request.run_id)
        return pb.PauseRunResponse(run=run_to_proto(seen))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: _Context) -> pb.ResumeRunResponse:
        """See the contract."""
        boundary = request.boundary if request.HasField("boundary") else None
        seen = await asyncio.to_thread(self._orchestrator.resume, request.run_id, boundary)
        return pb.ResumeRunResponse(run=run_to_proto(seen))

    async def StopRun(self, request: pb.StopRunRequest, context: _Context) -> pb.StopRunResponse:
        """See the contract."""
        return pb.StopRunResponse(run=run_to_proto(await self._orchestrator.stop(request.run_id)))

    async def ListRecipes(self, request: pb.ListRecipesRequest, context: _Context) -> pb.ListRecipesResponse:
        """See the contract."""
        return pb.ListRecipesResponse(recipes=[recipe_to_proto(recipe) for recipe in recipes.all_recipes()])

    async def ListArtifacts(self, request: pb.ListArtifactsRequest, context: _Context) -> pb.ListArtifactsResponse:
        """See the contract."""
        found = await asyncio.to_thread(self._orchestrator.store.run_dir(request.run_id).artifacts)
        return pb.ListArtifactsResponse(artifacts=[_artifact(name, size) for name, size in found])

    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: _Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        """See the contract. What was there when the download began is sent; what a file grows meanwhile is not."""
        run_dir = self._orchestrator.store.run_dir(request.run_id)
        sizes = dict(await asyncio.to_thread(run_dir.artifacts))
        if request.name not in sizes:  # also refuses every path that leads out of the folder
            raise NotFound(
                f"run {request.run_id} has no artifact {request.name!r}: expected one that ListArtifacts shows",
                reason="ARTIFACT_NOT_FOUND",
                metadata={"run_id": request.run_id, "name": request.name},
            )
        size = sizes[request.name]
        yield pb.DownloadArtifactResponse(artifact=_artifact(request.name, size))
        found, offset = hashlib.sha256(), 0
        file = await asyncio.to_thread((run_dir.path / request.name).open, "rb")
        try:
            while offset < size and (data := await asyncio.to_thread(file.read, min(CHUNK_BYTES, size - offset))):
                found.update(data)
                yield pb.DownloadArtifactResponse(chunk=blob_pb2.BlobChunk(offset=offset, data=data))
                offset += len(data)
        finally:
            file.close()
        digest = blob_pb2.BlobDigest(digest=f"sha256:{found.hexdigest()}", size_bytes=offset)
        yield pb.DownloadArtifactResponse(digest=digest)


def _artifact(name: str, size: int) -> pb.Artifact:
    suffix = "." + name.rpartition(".")[2]
    media = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return pb.Artifact(name=name, size_bytes=size, media_type=media)


def _write_token(key: tuple[datetime, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps([key[0].isoformat(), key[1]]).encode()).decode()


def _read_token(token: str) -> tuple[datetime, str] | None:
    if not token:
        return None
    try:
        moment, run_id = json.loads(base64.urlsafe_b64decode(token))
        return datetime.fromisoformat(moment), str(run_id)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidInput(
            "page_token: expected the next_page_token of an earlier ListRuns, found something else",
            reason="PAGE_TOKEN_INVALID",
        ) from error
