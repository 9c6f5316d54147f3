"""A real library and real forges over real workers, each behind a server on a port of its own."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from esper.kasmina.blueprints import Birth, Blueprint, node
from esper.kasmina.convert import signature_to_proto
from esper.kasmina.kernels import Tier
from esper.kasmina.signature import Layout, Signature
from esper.mesh.blobs import BlobAssembler
from esper.mesh.identity import Role
from esper.mesh.service import utc_now
from esper.mesh.testing import channel_as, serve, service_context
from esper.mesh.workers import WorkerPool
from esper.tezzeret.bench import Bench, Pace
from esper.tezzeret.board import Board
from esper.tezzeret.convert import tier_to_proto
from esper.tezzeret.forge import Forge
from esper.tezzeret.library import UrzaLibrary
from esper.urza.service import Config as UrzaConfig
from esper.urza.service import build as build_urza
from esper.v1 import build_pb2, urza_service_pb2, urza_service_pb2_grpc

HERE = Path(__file__).parent
QUICK = Pace(wait_s=1.0, lease_s=5.0, retry_s=0.02, retry_max_s=0.1, drain_s=0.2)
VECTOR = Signature(Layout.VECTOR, 4, 4)


def sample(name="sample", **attributes):
    """A small blueprint under a name that the workers of `faults` may understand."""
    return Blueprint(
        name=name,
        title="A sample",
        description="For tests.",
        layouts=(Layout.VECTOR,),
        nodes=(
            node("norm", "norm", "x"),
            node("out", "linear", "norm", **({"features": "out", "init": "zero"} | attributes)),
        ),
        birth=Birth.ZERO,
        causal=True,
    )


async def until(condition, limit_s=30.0):
    """Wait for something that another process does."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  # nobody can set an event in another process
            await asyncio.sleep(0.02)


class Client:
    """What a researcher does with a library."""

    def __init__(self, channel):
        self.urza = urza_service_pb2_grpc.UrzaServiceStub(channel)

    async def submit(self, blueprint):
        """Store a blueprint."""
        request = urza_service_pb2.SubmitBlueprintRequest(ir=blueprint.canonical_json().encode())
        return (await self.urza.SubmitBlueprint(request)).blueprint

    async def order(self, blueprint, signature=VECTOR, tier=Tier.PORTABLE, target="", *, retry=False):
        """Ask for a build."""
        wanted = build_pb2.Build(
            blueprint_id=blueprint.id,
            signature=signature_to_proto(signature),
            tier=tier_to_proto(tier),
            target=target,
        )
        request = urza_service_pb2.RequestBuildsRequest(builds=[wanted], retry=retry)
        return (await self.urza.RequestBuilds(request)).builds[0]

    async def build(self, build_id):
        """The build as it is now."""
        return (await self.urza.GetBuild(urza_service_pb2.GetBuildRequest(build_id=build_id))).build

    async def until(self, build_id, *states, limit_s=60.0):
        """Wait for a build to reach one of these states (SUCCEEDED or FAILED when none is given)."""
        wanted = states or (build_pb2.BUILD_STATE_SUCCEEDED, build_pb2.BUILD_STATE_FAILED)
        async with asyncio.timeout(limit_s):
            while (build := await self.build(build_id)).state not in wanted:  # noqa: ASYNC110  # another process decides
                await asyncio.sleep(0.02)
        return build

    async def filled(self, blueprint, signature=VECTOR, tier=Tier.PORTABLE, limit_s=60.0):
        """Submit, order and wait."""
        await self.submit(blueprint)
        return await self.until((await self.order(blueprint, signature, tier)).id, limit_s=limit_s)

    async def download(self, kernel_id):
        """The kernel and its verified bundle."""
        kernel, assembler = None, None
        async for part in self.urza.DownloadKernel(urza_service_pb2.DownloadKernelRequest(kernel_id=kernel_id)):
            if part.HasField("kernel"):
                kernel = part.kernel
                assembler = BlobAssembler(size=kernel.size_bytes, digest=kernel.id, max_bytes=1 << 30)
            elif part.HasField("chunk"):
                assembler.add(part.chunk.data)
        return kernel, assembler.finish()


@pytest.fixture
async def urza(tmp_path):
    """A library with two attempts a build; gives its server."""
    drain = asyncio.Event()
    service = await build_urza(UrzaConfig(max_attempts=2), service_context("urza", tmp_path / "urza", drain=drain))
    async with serve(service, drain=drain) as (server, _):
        yield server


@pytest.fixture
async def client(urza):
    """A researcher."""
    async with channel_as(urza, Role.CLIENT) as channel:
        yield Client(channel)


@pytest.fixture
async def forge_channel(urza):
    """A channel to the library that calls as the forge."""
    async with channel_as(urza, Role.TEZZERET) as channel:
        yield channel


@asynccontextmanager
async def working(library, *, entry="faults:job", size=1, wall_limit_s=30.0, pace=QUICK, offers=(), memory=2 << 30):
    """A forge at work whose workers may be told to misbehave; gives its bench."""
    pool = WorkerPool(
        size=size,
        entry=entry,
        warm="esper.tezzeret.worker:warm",
        wall_limit_s=wall_limit_s,
        memory_limit_bytes=memory,
        python_path=(HERE,),
    )
    forge, board, drain = Forge(pool), Board(), asyncio.Event()
    bench = Bench(
        forge,
        library,
        board,
        name="test",
        tiers=tuple(Tier),
        offers=offers,
        pace=pace,
        drain=drain,
        clock=utc_now,
    )
    bench.board, bench.forge, bench.drain = board, forge, drain
    await pool.start()
    bench.start()
    try:
        yield bench
    finally:
        drain.set()
        await bench.stop()
        await pool.close()


@pytest.fixture
def library(forge_channel):
    """The real library over gRPC, as the forge sees it."""
    return UrzaLibrary(forge_channel, upload_s=30.0)
