"""A served library and its callers, each with a stub of their own."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from esper.kasmina.kernels.signing import SignedVerdict, SigningKey, Statement
from esper.mesh.errors import EsperError, from_rpc_error
from esper.mesh.identity import Role
from esper.mesh.server import MeshServer
from esper.mesh.settings import ServerSettings
from esper.mesh.testing import TEST_SETTINGS, channel_as, serve, service_context
from esper.urza import convert
from esper.urza.library import Library
from esper.urza.service import Config, Urza, build
from esper.v1 import (
    blob_pb2,
    build_pb2,
    kernel_pb2,
    lease_pb2,
    signature_pb2,
    tensor_pb2,
    urza_service_pb2_grpc,
    verdict_pb2,
)
from esper.v1 import urza_service_pb2 as pb
from tests.services.urza.urza_world import make_ir, statement_over

SIGNATURE = signature_pb2.Signature(
    layout=signature_pb2.LAYOUT_VECTOR, in_features=16, out_features=16, dtype=tensor_pb2.DATA_TYPE_FLOAT32
)


def digest_of(data: bytes) -> str:
    """Content address."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def seconds(value: float) -> Duration:
    """A duration."""
    result = Duration()
    result.FromNanoseconds(int(value * 1e9))
    return result


def parts_of(kernel: kernel_pb2.Kernel, data: bytes, *, chunk: int = 1 << 20) -> Iterator[pb.UploadKernelRequest]:
    """An upload as the contract has it."""
    yield pb.UploadKernelRequest(kernel=kernel)
    for offset in range(0, len(data), chunk):
        yield pb.UploadKernelRequest(chunk=blob_pb2.BlobChunk(offset=offset, data=data[offset : offset + chunk]))
    yield pb.UploadKernelRequest(digest=blob_pb2.BlobDigest(digest=digest_of(data), size_bytes=len(data)))


async def refusal(call: Any) -> EsperError:
    """The error of a call that must fail, as the tree has it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_exhaust(call) if hasattr(call, "__aiter__") else call)
    return from_rpc_error(caught.value)


async def _exhaust(call: Any) -> None:
    async for _ in call:
        pass


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another process or task brings about."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # the file system has no event to wait for
            await asyncio.sleep(0.005)


@dataclass
class Served:
    """A library behind a real server."""

    server: MeshServer
    library: Library
    directory: Path
    client: Any
    forge: Any
    judge: Any
    operator: Any
    key: SigningKey

    async def submit(self, name: str = "low_rank", **changes: object) -> str:
        """Submit a blueprint; return its id."""
        request = pb.SubmitBlueprintRequest(ir=make_ir(name, **changes).canonical_json().encode())
        return (await self.client.SubmitBlueprint(request)).blueprint.id

    async def order(self, blueprint_id: str = "", **more: Any) -> build_pb2.Build:
        """Ask for a kernel."""
        fields = {"signature": SIGNATURE, "tier": build_pb2.TIER_PORTABLE} | more
        wanted = build_pb2.Build(blueprint_id=blueprint_id or await self.submit(), **fields)
        return (await self.client.RequestBuilds(pb.RequestBuildsRequest(builds=[wanted]))).builds[0]

    def kernel_for(self, build_: build_pb2.Build, **more: Any) -> kernel_pb2.Kernel:
        """What a forge says about its bundle."""
        return kernel_pb2.Kernel(
            build_id=build_.id,
            blueprint_id=build_.blueprint_id,
            signature=build_.signature,
            tier=build_.tier,
            target="cpu/x86_64/avx512/torch-2.13",
            parameters=100,
            **more,
        )

    async def lease(self, kind: Any, **more: Any) -> lease_pb2.Lease:
        """Take the one piece of work that there is."""
        stub = self.forge if kind == lease_pb2.WORK_KIND_COMPILE else self.judge
        (lease,) = (await stub.LeaseWork(pb.LeaseWorkRequest(kind=kind, holder="test", **more))).leases
        return lease

    async def staged(self, data: bytes = b"a bundle") -> kernel_pb2.Kernel:
        """Build a kernel as a forge does."""
        built = await self.order()
        lease = await self.lease(lease_pb2.WORK_KIND_COMPILE)
        kernel = (await self.forge.UploadKernel(_aiter(parts_of(self.kernel_for(built), data)))).kernel
        await self.forge.CompleteWork(pb.CompleteWorkRequest(lease_id=lease.id, kernel_id=kernel.id))
        return kernel

    def verdict(self, kernel_id: str, **changes: object) -> verdict_pb2.Verdict:
        """A signed verdict as it travels."""
        statement = statement_over(kernel_id, **changes)
        return self.signed(self.key.sign(statement), statement)

    @staticmethod
    def signed(verdict: SignedVerdict, statement: Statement) -> verdict_pb2.Verdict:
        """A verdict as it travels."""
        return convert.verdict_to_proto(verdict, statement)

    async def register(self) -> None:
        """Make the gauntlet's key known."""
        public = self.key.public
        key = verdict_pb2.SigningKey(key_id=public.key_id, public_key=public.raw)
        await self.judge.RegisterSigningKey(pb.RegisterSigningKeyRequest(key=key))

    async def validated(self, data: bytes = b"a bundle") -> kernel_pb2.Kernel:
        """A kernel that may run."""
        kernel = await self.staged(data)
        await self.register()
        lease = await self.lease(lease_pb2.WORK_KIND_EVALUATE)
        request = pb.CompleteWorkRequest(lease_id=lease.id, verdict=self.verdict(kernel.id))
        return (await self.judge.CompleteWork(request)).kernel

    async def download(self, kernel_id: str) -> bytes:
        """A bundle, checked as the contract says."""
        parts = [part async for part in self.client.DownloadKernel(pb.DownloadKernelRequest(kernel_id=kernel_id))]
        assert ["kernel", *["chunk"] * (len(parts) - 2), "digest"] == [part.WhichOneof("part") for part in parts]
        data = b""
        for part in parts[1:-1]:
            assert len(data) == part.chunk.offset
            data += part.chunk.data
        assert (digest_of(data), len(data)) == (parts[-1].digest.digest, parts[-1].digest.size_bytes)
        return data


async def _aiter(parts: Iterable[pb.UploadKernelRequest]) -> AsyncIterator[pb.UploadKernelRequest]:
    for part in parts:
        yield part


def stream(*parts: pb.UploadKernelRequest) -> AsyncIterator[pb.UploadKernelRequest]:
    """Parts as a stream of requests."""
    return _aiter(parts)


@asynccontextmanager
async def serve_library(
    directory: Path, config: Config | None = None, *, settings: ServerSettings = TEST_SETTINGS
) -> AsyncIterator[Served]:
    """A library behind a real server, and a stub for everybody."""
    context = service_context("urza", directory)
    service = await build(Config(announce=False) if config is None else config, context)
    assert isinstance(service, Urza)
    async with AsyncExitStack() as stack:
        server, channel = await stack.enter_async_context(serve(service, settings=settings, drain=context.drain))
        client = urza_service_pb2_grpc.UrzaServiceStub(channel)
        stubs = []
        for role in (Role.TEZZERET, Role.URABRASK, Role.OPERATOR):
            other = await stack.enter_async_context(channel_as(server, role))
            stubs.append(urza_service_pb2_grpc.UrzaServiceStub(other))
        forge, judge, operator = stubs
        yield Served(server, service.library, directory, client, forge, judge, operator, SigningKey.generate())
