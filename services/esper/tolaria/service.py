"""Tolaria as a service of the mesh."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import grpc.aio  # noqa: TC002  # the floor plan's signatures are evaluated by type checkers of callers
from pydantic import Field

from esper.mesh.identity import Identity, Role
from esper.mesh.service import ANYONE_KNOWN, Service, ServiceContext, allow
from esper.mesh.settings import Section
from esper.tolaria.orchestrator import Limits, Orchestrator
from esper.tolaria.processes import Processes
from esper.tolaria.servicer import TolariaServicer
from esper.tolaria.store import RunStore
from esper.tolaria.tokens import TokenWriter
from esper.v1.tolaria_service_pb2_grpc import add_TolariaServiceServicer_to_server

__all__ = ["Config", "TolariaService", "build"]

_NAME = "esper.v1.TolariaService"
_TRAINER = Identity("trainer", Role.CLIENT)
_MAY_TRAIN = frozenset({Role.CLIENT, Role.OPERATOR, Role.TOLARIA})


class Config(Section):
    """Training orchestrator."""

    max_parallel_runs: Annotated[int, Field(ge=1, le=256)] = 2
    """Training processes at one time; further runs wait in the order in which they were asked for."""

    max_queued_runs: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Runs that may wait; one more is refused with TOO_MANY_RUNS."""

    stop_grace_s: Annotated[float, Field(ge=0, le=600)] = 5.0
    """Seconds that a process gets to save itself after StopRun, before it is killed."""


class TolariaService(Service):
    """Starts and follows training processes. They outlive it: a clean drain leaves them running, and the next service
    on the same data directory finds them again."""  # noqa: D205, D209

    name = "tolaria"
    grpc_service_names = (_NAME,)
    policy = allow(
        _NAME,
        {
            "StartRun": _MAY_TRAIN,
            "GetRun": ANYONE_KNOWN,
            "ListRuns": ANYONE_KNOWN,
            "WatchRun": ANYONE_KNOWN,
            "PauseRun": _MAY_TRAIN,
            "ResumeRun": _MAY_TRAIN,
            "StopRun": _MAY_TRAIN,
            "ListRecipes": ANYONE_KNOWN,
            "ListArtifacts": ANYONE_KNOWN,
            "DownloadArtifact": ANYONE_KNOWN,
        },
    )

    def __init__(self, orchestrator: Orchestrator, processes: Processes, context: ServiceContext) -> None:
        self.orchestrator = orchestrator
        self._processes = processes
        self._context = context
        self._supervisor: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """See `Service`."""
        servicer: Any = TolariaServicer(self.orchestrator, self._context.drain)
        add_TolariaServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Find the runs of earlier services again and begin to look after them."""
        self._supervisor = asyncio.create_task(
            self.orchestrator.supervise(self._context.drain), name="tolaria-supervisor"
        )

    async def close(self) -> None:
        """Let go of the training processes; they run on."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._processes.release()


async def build(config: Config, context: ServiceContext) -> TolariaService:
    """Build the service over ``runs/`` and ``kernels/`` of its data directory."""
    processes = Processes()
    token = None
    if context.issuer is not None:
        token = TokenWriter(context.data_dir / "trainer.token", context.issuer.source(_TRAINER))
        # Before anybody listens: processes of an earlier service call with what they find there.
        await asyncio.to_thread(token.renew)
    orchestrator = Orchestrator(
        await asyncio.to_thread(RunStore, context.data_dir / "runs"),
        processes,
        limits=Limits(
            max_parallel=config.max_parallel_runs, max_queued=config.max_queued_runs, stop_grace_s=config.stop_grace_s
        ),
        clock=context.clock,
        mesh=lambda: context.address("tamiyo"),
        token=token,
        cache_dir=context.data_dir / "kernels",
    )
    return TolariaService(orchestrator, processes, context)
