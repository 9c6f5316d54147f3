"""Settings of the forge, and how it is built."""

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import Annotated

import grpc.aio
from pydantic import Field

from esper.kasmina.blueprints import catalogue
from esper.kasmina.kernels.bundle import Tier
from esper.mesh.service import ANYONE_KNOWN, Service, ServiceContext, allow
from esper.mesh.settings import Section
from esper.mesh.workers import WorkerPool
from esper.tezzeret.bench import Bench, Pace
from esper.tezzeret.board import Board
from esper.tezzeret.forge import Forge
from esper.tezzeret.library import UrzaLibrary
from esper.tezzeret.servicer import TezzeretServicer
from esper.v1 import tezzeret_service_pb2_grpc

__all__ = ["Config", "TezzeretService", "build"]

MIB = 1 << 20


class Config(Section):
    """The compilation forge."""

    workers: Annotated[int, Field(ge=1, le=64)] = 2
    """Worker processes, and so builds at once. Each holds about 400 MiB and keeps a core busy, at low priority, while
    it compiles. Of two or more the first is kept for portable orders, which never wait for a compiler then."""

    tiers: Annotated[tuple[Tier, ...], Field(min_length=1)] = tuple(Tier)
    """Tiers that orders are taken for. An order of a tier that the machine lacks a tool for fails with that reason;
    take the tier out of this list where another forge has the tool."""

    wall_limit_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 600.0
    """Seconds that one build may take before it counts as a hang. A cold standard build takes about 20 on an idle core,
    an aggressive one, which tries up to five ways and begins none after 300 seconds, five times that; both several
    times as long on a machine that trains."""

    memory_limit_bytes: Annotated[int, Field(ge=64 * MIB)] = 4096 * MIB
    """Memory that a build, its compilers included, may take beyond what the idle worker holds."""

    cache_limit_bytes: Annotated[int, Field(ge=0)] = 2048 * MIB
    """Size of the compiler's cache (precompiled headers, objects) beyond which it is emptied at the next start."""

    offer_catalogue: bool = True
    """Whether the blueprints that ship with Esper are submitted to the library at the start."""

    wait_s: Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)] = 20.0
    """Seconds that one call to the library waits for an order."""

    lease_s: Annotated[float, Field(ge=1, le=600, allow_inf_nan=False)] = 30.0
    """Length of a lease in seconds: how long an order waits for another forge when this one dies."""

    upload_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 120.0
    """Seconds that an upload may take."""

    drain_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 3.0
    """Seconds that a running build gets at shutdown before it is handed back."""


class TezzeretService(Service):
    """The forge as a service of the mesh.

    Args:
        config: settings.
        context: what the mesh gives.
    """

    name = "tezzeret"
    grpc_service_names = ("esper.v1.TezzeretService",)
    policy = allow(
        "esper.v1.TezzeretService", dict.fromkeys(("CheckBlueprint", "GetForge", "WatchBuilds"), ANYONE_KNOWN)
    )

    def __init__(self, config: Config, context: ServiceContext) -> None:
        self._config = config
        self._context = context
        self.board = Board()
        # Kept between workers and restarts: what torch finds out about the compiler by trying each instruction set is
        # not tried again. Entries are named by the digest of their source.
        self._cache = context.data_dir / "compiler-cache"
        self.pool = WorkerPool(
            size=config.workers,
            entry="esper.tezzeret.worker:compile_job",
            warm="esper.tezzeret.worker:warm",
            wall_limit_s=config.wall_limit_s,
            memory_limit_bytes=config.memory_limit_bytes,
            writable=(self._cache,),
            environ={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(self._cache)},
        )
        self.forge = Forge(self.pool)
        self._servicer = TezzeretServicer(self.forge, self.board, context.drain)
        self._bench: Bench | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Add the handlers."""
        tezzeret_service_pb2_grpc.add_TezzeretServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Begin to warm the workers, to offer the catalogue and to look for orders; waits for none of them."""
        config = self._config
        await asyncio.to_thread(_prepare, self._cache, config.cache_limit_bytes)
        await self.pool.start()
        self._bench = Bench(
            self.forge,
            UrzaLibrary(self._context.channel("urza"), upload_s=config.upload_s),
            self.board,
            name=f"forge@{socket.gethostname()[:64]}/{os.getpid()}",
            tiers=config.tiers,
            offers=catalogue() if config.offer_catalogue else (),
            pace=Pace(wait_s=config.wait_s, lease_s=config.lease_s, drain_s=config.drain_s),
            drain=self._context.drain,
            clock=self._context.clock,
        )
        self._bench.start()

    async def drain(self) -> None:
        """Finish or hand back what is being built."""
        if self._bench is not None:
            await self._bench.stop()

    async def close(self) -> None:
        """End the workers."""
        if self._bench is not None:
            await self._bench.stop()
        await self.pool.close()


def _prepare(cache: Path, limit_bytes: int) -> None:
    """Make the cache's directory, empty when it has grown too large."""
    if cache.exists() and sum(path.lstat().st_size for path in cache.rglob("*")) > limit_bytes:
        shutil.rmtree(cache)
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)


async def build(config: Config, context: ServiceContext) -> TezzeretService:
    """Build the forge."""
    return TezzeretService(config, context)
