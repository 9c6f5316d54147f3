"""TezzeretService over gRPC: convert, ask, convert."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from esper.kasmina.convert import signature_from_proto
from esper.mesh.errors import Unavailable
from esper.mesh.streams import race_drain
from esper.tezzeret.board import Board
from esper.tezzeret.check import judge
from esper.tezzeret.convert import report_to_proto, step_to_proto, tier_to_proto, worker_to_proto
from esper.tezzeret.forge import Forge
from esper.v1 import tezzeret_service_pb2 as pb
from esper.v1 import tezzeret_service_pb2_grpc

__all__ = ["TezzeretServicer"]

Context = grpc.aio.ServicerContext[Any, Any]


class TezzeretServicer(tezzeret_service_pb2_grpc.TezzeretServiceServicer):
    """Looks at the forge; its work comes by lease."""

    def __init__(self, forge: Forge, board: Board, drain: asyncio.Event) -> None:
        self._forge = forge
        self._board = board
        self._drain = drain

    async def CheckBlueprint(  # the contract's name
        self, request: pb.CheckBlueprintRequest, context: Context
    ) -> pb.CheckBlueprintResponse:
        """What can be said of an IR without building it."""
        signature = signature_from_proto(request.signature) if request.HasField("signature") else None
        return report_to_proto(judge(request.ir, signature))

    async def GetForge(  # the contract's name
        self, request: pb.GetForgeRequest, context: Context
    ) -> pb.GetForgeResponse:
        """The forge: its machine, its workers, what it cannot do."""
        known = self._forge.capability
        return pb.GetForgeResponse(
            target="" if known is None else known.target,
            tiers=[] if known is None else [tier_to_proto(tier) for tier in known.tiers],
            limitations=[] if known is None else [text for texts in known.limitations.values() for text in texts],
            workers=[worker_to_proto(info) for info in self._forge.pool.workers()],
            succeeded=self._board.succeeded,
            failed=self._board.failed,
        )

    async def WatchBuilds(  # the contract's name
        self, request: pb.WatchBuildsRequest, context: Context
    ) -> AsyncIterator[pb.WatchBuildsResponse]:
        """The last step of each build under way, then each step as it happens."""
        with self._board.watch() as queue:
            # Otherwise it would go out with the first step only: a client could not know from when on it sees all.
            await context.send_initial_metadata(())
            async for step in race_drain(queue, self._drain):
                yield pb.WatchBuildsResponse(progress=step_to_proto(step))
        raise Unavailable("the forge drains: watch again", reason="DRAINING")
