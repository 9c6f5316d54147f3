"""UrabraskService over gRPC: convert, ask, convert."""
# the contract gives every method a request and a context

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from esper.kasmina.kernels.signing import Statement
from esper.mesh.errors import InvalidInput, Unavailable
from esper.mesh.streams import race_drain
from esper.urabrask.board import Board
from esper.urabrask.checks import CHECKS, GAUNTLET_VERSION
from esper.urabrask.convert import (
    check_spec_to_proto,
    key_to_proto,
    signed_from_proto,
    statement_from_proto,
    verdict_to_proto,
    worker_to_proto,
)
from esper.urabrask.engine import Engine
from esper.urabrask.keys import KeyRing
from esper.v1 import urabrask_service_pb2 as pb
from esper.v1 import urabrask_service_pb2_grpc, verdict_pb2

__all__ = ["UrabraskServicer", "doubts"]

_MAX_REASONS = 16
Context = grpc.aio.ServicerContext[Any, Any]


def doubts(verdict: verdict_pb2.Verdict, keys: KeyRing) -> list[str]:
    """Why a verdict is not to be believed, one sentence each; empty when it is."""
    signed = signed_from_proto(verdict)
    reasons = keys.trust.reasons_against(signed)
    try:
        said = Statement.from_bytes(signed.statement)
    except InvalidInput as error:
        return [*reasons, error.public]
    claimed = statement_from_proto(verdict)
    differing = [name for name in Statement.__slots__ if getattr(said, name) != getattr(claimed, name)]
    if differing:
        reasons.append(f"the signed statement says something else about {', '.join(differing)}")
    return reasons[:_MAX_REASONS]


class UrabraskServicer(urabrask_service_pb2_grpc.UrabraskServiceServicer):
    """Looks at the engine; its work comes by lease."""

    def __init__(self, engine: Callable[[], Engine], board: Board, drain: asyncio.Event) -> None:
        self._engine = engine
        self._board = board
        self._drain = drain

    async def GetEngine(  # the contract's name
        self, request: pb.GetEngineRequest, context: Context
    ) -> pb.GetEngineResponse:
        """The engine: its key, its gauntlet, its workers."""
        engine = self._engine()
        return pb.GetEngineResponse(
            key=key_to_proto(engine.keys.current.public, engine.keys.create_time),
            gauntlet_version=GAUNTLET_VERSION,
            target=engine.target,
            workers=[worker_to_proto(info) for info in engine.pool.workers()],
            validated=self._board.validated,
            rejected=self._board.rejected,
        )

    async def ListChecks(  # the contract's name
        self, request: pb.ListChecksRequest, context: Context
    ) -> pb.ListChecksResponse:
        """The tests of the gauntlet, in order."""
        return pb.ListChecksResponse(checks=[check_spec_to_proto(spec) for spec in CHECKS])

    async def VerifyVerdict(  # the contract's name
        self, request: pb.VerifyVerdictRequest, context: Context
    ) -> pb.VerifyVerdictResponse:
        """Whether a verdict holds, and why not."""
        reasons = doubts(request.verdict, self._engine().keys)
        return pb.VerifyVerdictResponse(valid=not reasons, reasons=reasons)

    async def WatchVerdicts(  # the contract's name
        self, request: pb.WatchVerdictsRequest, context: Context
    ) -> AsyncIterator[pb.WatchVerdictsResponse]:
        """The newest verdicts, then each new one."""
        with self._board.watch() as queue:
            async for judgement in race_drain(queue, self._drain):
                yield pb.WatchVerdictsResponse(verdict=verdict_to_proto(judgement))
        raise Unavailable("the engine drains: watch again", reason="DRAINING")
