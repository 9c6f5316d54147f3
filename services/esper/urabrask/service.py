"""Settings of the evaluation engine, and how it is built."""

import os
import socket
from typing import Annotated

import grpc.aio
from pydantic import Field

from esper.kasmina.kernels.bundle import MAX_BUNDLE_BYTES
from esper.mesh.service import ANYONE_KNOWN, Service, ServiceContext, allow
from esper.mesh.settings import Section
from esper.mesh.workers import WorkerPool
from esper.urabrask.bench import Bench, Pace
from esper.urabrask.board import Board
from esper.urabrask.checks import CHECKS
from esper.urabrask.engine import Engine
from esper.urabrask.keys import KeyRing
from esper.urabrask.library import UrzaLibrary
from esper.urabrask.recall import Recall
from esper.urabrask.servicer import UrabraskServicer
from esper.v1 import urabrask_service_pb2_grpc

__all__ = ["Config", "UrabraskService", "build"]

MIB = 1 << 20


class Config(Section):
    """The evaluation engine."""

    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Sandboxes, and so kernels judged at once. Each uses one thread and about 400 MiB; on a machine that trains, one
    is enough: a portable kernel takes well under a second."""

    wall_limit_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 120.0
    """Seconds that one run through the gauntlet may take before it counts as a hang."""

    memory_limit_bytes: Annotated[int, Field(ge=64 * MIB)] = 2048 * MIB
    """Memory that a kernel under examination may take beyond what the idle sandbox holds."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 2
    """Runs that a kernel gets when the sandbox does not survive it. Two, because the system's own killer may have hit
    it by chance; a kernel that brings it down twice is rejected."""

    wait_s: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] = 20.0
    """Seconds that one call to the library waits for work."""

    lease_s: Annotated[float, Field(ge=1, le=600, allow_inf_nan=False)] = 30.0
    """Length of a lease in seconds: how long a kernel waits for another engine when this one dies."""

    download_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 120.0
    """Seconds that a download may take."""

    recall_runs: Annotated[int, Field(ge=0, le=1000)] = 3
    """Different runs in which a validated kernel must have failed for it to be quarantined although the gauntlet finds
    nothing when it examines it again; 0 never does. One that fails the gauntlet is quarantined at the first report."""

    drain_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 3.0
    """Seconds that a running evaluation gets at shutdown before its kernel is handed back."""


class UrabraskService(Service):
    """The engine as a service of the mesh.

    Args:
        config: settings.
        context: what the mesh gives.
    """

    name = "urabrask"
    grpc_service_names = ("esper.v1.UrabraskService",)
    policy = allow(
        "esper.v1.UrabraskService",
        dict.fromkeys(("GetEngine", "ListChecks", "VerifyVerdict", "WatchVerdicts"), ANYONE_KNOWN),
    )

    def __init__(self, config: Config, context: ServiceContext) -> None:
        self._config = config
        self._context = context
        self.board = Board()
        self.pool = WorkerPool(
            size=config.workers,
            entry="esper.urabrask.gauntlet.run:evaluate",
            warm="esper.urabrask.gauntlet.run:warm",
            wall_limit_s=config.wall_limit_s,
            memory_limit_bytes=config.memory_limit_bytes,
            # What a sandbox says is a few kilobytes, two reports a check; code of strangers could say much more.
            max_result_bytes=1 << 20,
            max_reports=4 * len(CHECKS),
            # One thread whatever the machine offers: a measurement must not depend on who else is computing.
            environ={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        keys = KeyRing.open(context.data_dir, context.clock)
        self.engine = Engine(self.pool, keys, attempts=config.attempts, clock=context.clock)
        self._servicer = UrabraskServicer(lambda: self.engine, self.board, context.drain)
        self._bench: Bench | None = None
        self._recall: Recall | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Add the handlers."""
        urabrask_service_pb2_grpc.add_UrabraskServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Begin to warm the sandboxes and to look for work; waits for neither."""
        config = self._config
        await self.pool.start()
        library = UrzaLibrary(
            self._context.channel("urza"), max_bundle_bytes=MAX_BUNDLE_BYTES, download_s=config.download_s
        )
        self._bench = Bench(
            self.engine,
            library,
            self.board,
            name=f"urabrask@{socket.gethostname()[:64]}/{os.getpid()}",
            directory=self._context.data_dir,
            pace=Pace(wait_s=config.wait_s, lease_s=config.lease_s, drain_s=config.drain_s),
            drain=self._context.drain,
            clock=self._context.clock,
        )
        self._bench.start()
        self._recall = Recall(
            self.engine, library, self._context.channel("oona"), runs=config.recall_runs, drain=self._context.drain
        )
        self._recall.start()

    async def drain(self) -> None:
        """Finish or hand back what is being judged."""
        if self._recall is not None:
            await self._recall.stop()
        if self._bench is not None:
            await self._bench.stop()

    async def close(self) -> None:
        """End the sandboxes."""
        if self._recall is not None:
            await self._recall.stop()
        if self._bench is not None:
            await self._bench.stop()
        await self.pool.close()


async def build(config: Config, context: ServiceContext) -> UrabraskService:
    """Build the engine; its key is made here when the data directory has none.

    Raises:
        Conflict: KEY_EXPOSED, KEY_UNREADABLE.
    """
    return UrabraskService(config, context)
