"""The engine as a service, with the real library over gRPC: from upload to VALIDATED or REJECTED."""

import asyncio
import contextlib

import grpc
import pytest

from esper.kasmina.blueprints.catalogue import get
from esper.kasmina.kernels import load_kernel
from esper.kasmina.kernels.bundle import unpack
from esper.kasmina.kernels.signing import PublicKey, SignedVerdict, TrustStore
from esper.mesh.blobs import chunk
from esper.mesh.errors import from_rpc_error
from esper.mesh.identity import Role
from esper.mesh.testing import channel_as, serve, service_context
from esper.urabrask.convert import seconds
from esper.urabrask.library import UrzaLibrary
from esper.urabrask.service import Config, build
from esper.v1 import (
    blob_pb2,
    build_pb2,
    forge_pb2,
    kernel_pb2,
    lease_pb2,
    signature_pb2,
    tensor_pb2,
    urabrask_service_pb2,
    urza_service_pb2,
    verdict_pb2,
)
from esper.v1.urabrask_service_pb2_grpc import UrabraskServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub
from tests.services.urabrask.hostile import VECTOR, kernel_id_of, sound, twisted

SIGNATURE = signature_pb2.Signature(
    layout=signature_pb2.LAYOUT_VECTOR, in_features=8, out_features=6, dtype=tensor_pb2.DATA_TYPE_FLOAT32
)


class Mesh:
    """Library and engine, each behind a server of its own."""

    def __init__(self, stack, tmp_path, **config):
        self.stack = stack
        self.tmp_path = tmp_path
        self.config = {"wait_s": 0.5, "lease_s": 2.0, "drain_s": 0.2} | config

    async def start(self):
        """Start both."""
        from esper.urza.service import Config as UrzaConfig
        from esper.urza.service import build as build_urza

        drain = asyncio.Event()
        library = await build_urza(UrzaConfig(), service_context("urza", self.tmp_path / "urza", drain=drain))
        self.urza_server, self.client = await self.stack.enter_async_context(serve(library, drain=drain))
        forge = await self.stack.enter_async_context(channel_as(self.urza_server, Role.TEZZERET))
        self.urza = UrzaServiceStub(self.client)
        self.forge = UrzaServiceStub(forge)
        await self.start_engine()
        return self

    async def start_engine(self, stack=None):
        """Start the engine."""
        channel = await self.stack.enter_async_context(channel_as(self.urza_server, Role.URABRASK, "urabrask"))
        self.drain = asyncio.Event()
        context = service_context(
            "urabrask",
            self.tmp_path / "urabrask",
            channel=lambda name: {"urza": channel, "oona": channel}[name],
            drain=self.drain,
        )
        self.service = await build(Config(**self.config), context)
        server = serve(self.service, drain=self.drain)
        _, self.channel = await (stack or self.stack).enter_async_context(server)
        self.engine = UrabraskServiceStub(self.channel)

    async def submit(self, data):
        """What a forge does: have a build asked for, lease it, upload its kernel, complete it. Gives the id."""
        ir = get("bottleneck_mlp").canonical_json().encode()
        blueprint = (await self.urza.SubmitBlueprint(urza_service_pb2.SubmitBlueprintRequest(ir=ir))).blueprint
        asked = build_pb2.Build(blueprint_id=blueprint.id, signature=SIGNATURE, tier=build_pb2.TIER_PORTABLE)
        await self.urza.RequestBuilds(urza_service_pb2.RequestBuildsRequest(builds=[asked], retry=True))
        leased = await self.forge.LeaseWork(
            urza_service_pb2.LeaseWorkRequest(kind=lease_pb2.WORK_KIND_COMPILE, holder="forge", wait=seconds(5))
        )
        lease = leased.leases[0]
        kernel = kernel_pb2.Kernel(
            build_id=lease.compile.build.id,
            blueprint_id=blueprint.id,
            signature=SIGNATURE,
            tier=build_pb2.TIER_PORTABLE,
            target="any",
            parameters=unpack(sound()).manifest.parameter_count,
        )
        request = urza_service_pb2.UploadKernelRequest

        async def parts():
            yield request(kernel=kernel)
            offset = 0
            for piece in chunk(data):
                yield request(chunk=blob_pb2.BlobChunk(offset=offset, data=piece))
                offset += len(piece)
            yield request(digest=blob_pb2.BlobDigest(digest=kernel_id_of(data), size_bytes=len(data)))

        stored = (await self.forge.UploadKernel(parts(), timeout=20)).kernel
        await self.forge.CompleteWork(urza_service_pb2.CompleteWorkRequest(lease_id=lease.id, kernel_id=stored.id))
        return stored.id

    async def settled(self, kernel_id, within_s=40.0):
        """The kernel once it is judged."""
        async with asyncio.timeout(within_s):
            while True:
                answer = await self.urza.GetKernel(urza_service_pb2.GetKernelRequest(kernel=kernel_id))
                if answer.kernel.state != kernel_pb2.KERNEL_STATE_STAGED:
                    return answer.kernel
                await asyncio.sleep(0.05)


@pytest.fixture
async def mesh_of(tmp_path):
    """Makes meshes and stops them."""
    async with contextlib.AsyncExitStack() as stack:
        yield lambda **config: Mesh(stack, tmp_path, **config).start()


async def test_kernel_is_validated_end_to_end(mesh_of):
    """An uploaded kernel becomes VALIDATED; a runtime that knows only the library's keys believes and loads it."""
    mesh = await mesh_of()
    kernel_id = await mesh.submit(sound())
    kernel = await mesh.settled(kernel_id)
    assert kernel_pb2.KERNEL_STATE_VALIDATED == kernel.state
    assert kernel.verdict.passed
    keys = (await mesh.urza.ListSigningKeys(urza_service_pb2.ListSigningKeysRequest())).keys
    trust = TrustStore(PublicKey(key.public_key, key.revoked) for key in keys)
    signed = SignedVerdict(kernel.verdict.statement, kernel.verdict.signature, kernel.verdict.key_id)
    assert load_kernel(sound(), signed, trust, kernel_id, VECTOR).id == kernel_id

    # The engine shows itself ...
    shown = await mesh.engine.GetEngine(urabrask_service_pb2.GetEngineRequest())
    assert (1, 0) == (shown.validated, shown.rejected)
    assert shown.target == kernel.verdict.target
    assert shown.key.key_id == kernel.verdict.key_id
    assert [forge_pb2.WORKER_STATE_IDLE] == [worker.state for worker in shown.workers]
    listed = await mesh.engine.ListChecks(urabrask_service_pb2.ListChecksRequest())
    assert [check.name for check in listed.checks] == [check.name for check in kernel.verdict.checks]

    # ... verifies its verdict, also when the time of issue or a tag beside the bytes was changed ...
    async def verify(verdict):
        return await mesh.engine.VerifyVerdict(urabrask_service_pb2.VerifyVerdictRequest(verdict=verdict))

    assert (await verify(kernel.verdict)).valid
    changed = verdict_pb2.Verdict.FromString(kernel.verdict.SerializeToString())
    changed.tags.append("latency:faster")
    changed.measurements[0].value += 1
    answer = await verify(changed)
    assert not answer.valid
    assert ["the signed statement says something else about measurements, tags"] == list(answer.reasons)
    forged = verdict_pb2.Verdict.FromString(kernel.verdict.SerializeToString())
    forged.signature = bytes(64)
    assert "does not fit the statement" in (await verify(forged)).reasons[0]
    forged.statement = b"{}"
    assert 2 == len((await verify(forged)).reasons)

    # ... and takes it back where it does not hold.
    async with channel_as(mesh.urza_server, Role.URABRASK, "urabrask") as channel:
        archive = UrzaLibrary(channel, max_bundle_bytes=1 << 20, download_s=10.0)
        candidate = await archive.served(kernel_id)
        assert sound() == await archive.download(candidate)
        await archive.quarantine(kernel_id, "failed in a run")
        assert await archive.served(kernel_id) is None

    # ... and tells it to watchers, whose stream ends at the drain.
    watch = mesh.engine.WatchVerdicts(urabrask_service_pb2.WatchVerdictsRequest())
    first = await watch.read()
    assert kernel.verdict == first.verdict
    mesh.drain.set()
    with pytest.raises(grpc.RpcError) as caught:
        await watch.read()
    assert "DRAINING" == from_rpc_error(caught.value).reason


async def test_hostile_kernel_is_rejected_end_to_end(mesh_of):
    """A kernel that is not silent at birth becomes REJECTED, its verdict says why, and nothing trusts it."""
    mesh = await mesh_of()
    kernel = await mesh.settled(await mesh.submit(twisted(lambda d, x, p: d + 1e-3)))
    assert kernel_pb2.KERNEL_STATE_REJECTED == kernel.state
    failed = {check.name: check.finding for check in kernel.verdict.checks if not check.passed}
    assert "expected an output of exactly zero at birth, found 0.001" == failed["birth.output"]
    assert 1 == mesh.service.board.rejected


async def test_lost_lease_and_drain(mesh_of, monkeypatch):
    """A hanging evaluation keeps its lease beyond its length, and hands its kernel back at the drain."""
    mesh = await mesh_of(lease_s=1.0, wait_s=0.2)
    pool = mesh.service.pool
    await pool.ready()
    started = asyncio.Event()
    real = mesh.service.engine.judge

    async def stuck(candidate, bundle):
        started.set()
        await asyncio.Event().wait()
        return await real(candidate, bundle)

    monkeypatch.setattr(mesh.service.engine, "judge", stuck)
    kernel_id = await mesh.submit(sound())
    await asyncio.wait_for(started.wait(), 10)
    await asyncio.sleep(2.5)
    work = urza_service_pb2.LeaseWorkRequest(kind=lease_pb2.WORK_KIND_EVALUATE, holder="other", wait=seconds(0.2))
    async with channel_as(mesh.urza_server, Role.URABRASK) as other:
        stub = UrzaServiceStub(other)
        assert [] == list((await stub.LeaseWork(work)).leases)
        mesh.drain.set()
        await mesh.service.drain()
        leases = (await stub.LeaseWork(work)).leases
        assert [kernel_id] == [lease.evaluate.kernel.id for lease in leases]
        assert 2 == leases[0].attempt


async def test_forgotten_key_is_registered_again(mesh_of, judgement):
    """A verdict by a key that the library does not know is refused; the engine introduces itself again and goes on."""
    mesh = await mesh_of()
    await mesh.service.pool.ready()
    real = mesh.service.engine.judge
    calls = []

    async def first_with_a_strange_key(candidate, bundle):
        calls.append(candidate.id)
        made = await real(candidate, bundle)
        return judgement() if len(calls) == 1 else made

    mesh.service.engine.judge = first_with_a_strange_key
    kernel = await mesh.settled(await mesh.submit(sound()))
    assert kernel_pb2.KERNEL_STATE_VALIDATED == kernel.state
    assert 2 == len(calls)
    assert 1 == mesh.service.board.validated
