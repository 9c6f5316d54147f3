"""A server that is killed: nothing half-visible, nothing that was confirmed lost."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from esper.mesh.channel import open_channel
from esper.mesh.identity import Role
from esper.mesh.testing import token_for
from esper.v1 import blob_pb2, build_pb2, kernel_pb2, lease_pb2, signature_pb2, urza_service_pb2_grpc
from esper.v1 import urza_service_pb2 as pb
from tests.services.urza.urza_calls import SIGNATURE, parts_of, stream, until
from tests.services.urza.urza_world import make_ir

_SERVER = """
import asyncio, sys
from pathlib import Path
from esper.mesh.testing import serve, service_context
from esper.urza.service import Config, build

async def main():
    directory = Path(sys.argv[1])
    context = service_context("urza", directory)
    service = await build(Config(announce=False), context)
    async with serve(service, drain=context.drain) as (server, _channel):
        (directory / "port.tmp").write_text(server.target)
        (directory / "port.tmp").rename(directory / "port")
        await asyncio.Event().wait()

asyncio.run(main())
"""


class Server:
    """A library in a process of its own, that can be killed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        (directory / "port").unlink(missing_ok=True)
        self.process = subprocess.Popen([sys.executable, "-c", _SERVER, str(directory)])

    async def __aenter__(self) -> Any:
        await until(lambda: (self.directory / "port").exists() or self.process.poll() is not None)
        self.channel = open_channel((self.directory / "port").read_text(), token=token_for(Role.TEZZERET))
        return urza_service_pb2_grpc.UrzaServiceStub(self.channel)

    async def __aexit__(self, *_exc: object) -> None:
        await self.kill()
        await self.channel.close()

    async def kill(self) -> None:
        """End it as a power cut would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)


def blobs(directory: Path) -> list[Path]:
    """Every file of the blob store."""
    return [path for path in (directory / "blobs").rglob("*") if path.is_file()]


async def order(stub: Any, blueprint_id: str, width: int) -> kernel_pb2.Kernel:
    """Ask for a kernel; return what a forge would say about its bundle."""
    signature = signature_pb2.Signature()
    signature.CopyFrom(SIGNATURE)
    signature.in_features = width
    wanted = build_pb2.Build(blueprint_id=blueprint_id, signature=signature, tier=build_pb2.TIER_PORTABLE)
    build = (await stub.RequestBuilds(pb.RequestBuildsRequest(builds=[wanted]))).builds[0]
    return kernel_pb2.Kernel(build_id=build.id, blueprint_id=blueprint_id, signature=signature, tier=build.tier)


async def submit(stub: Any) -> str:
    """Submit a blueprint; return its id."""
    ir = make_ir().canonical_json().encode()
    return (await stub.SubmitBlueprint(pb.SubmitBlueprintRequest(ir=ir))).blueprint.id


async def half(kernel: kernel_pb2.Kernel) -> AsyncIterator[pb.UploadKernelRequest]:
    """An upload that never ends."""
    yield pb.UploadKernelRequest(kernel=kernel)
    yield pb.UploadKernelRequest(chunk=blob_pb2.BlobChunk(offset=0, data=b"half of it"))
    await asyncio.Event().wait()


async def test_kill_during_uploads(tmp_path: Path) -> None:
    """After kill -9 amid many uploads each kernel is there whole or not at all, and what was confirmed is there."""
    directory = tmp_path / "urza"
    server = Server(directory)
    confirmed: dict[str, bytes] = {}
    async with server as stub:
        blueprint_id = await submit(stub)

        async def upload(width: int) -> None:
            kernel = await order(stub, blueprint_id, width)
            data = os.urandom(50_000 * width)
            stored = await stub.UploadKernel(stream(*parts_of(kernel, data, chunk=8192)), timeout=60)
            confirmed[stored.kernel.id] = data

        # The first one is certainly in the middle when the server dies.
        stuck = stub.UploadKernel(half(await order(stub, blueprint_id, 1)), timeout=60)
        running = [asyncio.ensure_future(stuck), *(asyncio.create_task(upload(width)) for width in range(20, 60))]
        await until(lambda: len(confirmed) >= 8 and list((directory / "blobs" / "incoming").iterdir()))
        await server.kill()
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert any(isinstance(outcome, grpc.aio.AioRpcError) for outcome in outcomes)
    assert list((directory / "blobs" / "incoming").iterdir())
    # A blob that was renamed into its place while its kernel was not yet written down, as a crash can leave it.
    orphan = directory / "blobs" / "sha256" / "00" / ("0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"nobody's")

    async with Server(directory) as stub:
        assert not list((directory / "blobs" / "incoming").iterdir())
        listed = (await stub.ListKernels(pb.ListKernelsRequest(page_size=1000))).kernels
        assert set(confirmed) <= {kernel.id for kernel in listed}
        assert {kernel.id[9:] for kernel in listed} == {path.name for path in blobs(directory)}
        for kernel in listed:
            data = await download(stub, kernel.id)
            assert (kernel.id, kernel.size_bytes) == ("sha256:" + hashlib.sha256(data).hexdigest(), len(data))
            assert data == confirmed.get(kernel.id, data)
        call = stub.WatchLibrary(pb.WatchLibraryRequest(after_sequence=0))
        numbers = [(await call.read()).sequence for _ in range(2 * len(listed))]
        call.cancel()
        assert list(range(1, len(numbers) + 1)) == numbers


async def download(stub: Any, kernel_id: str) -> bytes:
    """A bundle."""
    parts = [part async for part in stub.DownloadKernel(pb.DownloadKernelRequest(kernel_id=kernel_id))]
    return b"".join(part.chunk.data for part in parts)


async def test_kill_while_work_is_leased(tmp_path: Path) -> None:
    """A lease outlives the server that gave it: the holder completes it with the next one."""
    directory = tmp_path / "urza"
    async with Server(directory) as stub:
        kernel = await order(stub, await submit(stub), 16)
        request = pb.LeaseWorkRequest(kind=lease_pb2.WORK_KIND_COMPILE, holder="x")
        (lease,) = (await stub.LeaseWork(request)).leases
    async with Server(directory) as stub:
        await stub.RenewLease(pb.RenewLeaseRequest(lease_id=lease.id))
        stored = (await stub.UploadKernel(stream(*parts_of(kernel, b"bundle")))).kernel
        done = await stub.CompleteWork(pb.CompleteWorkRequest(lease_id=lease.id, kernel_id=stored.id))
        assert (build_pb2.BUILD_STATE_SUCCEEDED, stored.id) == (done.build.state, done.build.kernel_id)
