"""A real mesh for tests: library, bus and controller on one port; forge and gauntlet do as they are told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio

from esper.kasmina.blueprints.catalogue import get
from esper.kasmina.convert import signature_from_proto, signature_to_proto
from esper.kasmina.kernels.bundle import Tier, kernel_id_of
from esper.kasmina.kernels.signing import CheckResult, Figure, SignedVerdict, SigningKey, Statement
from esper.kasmina.signature import Signature
from esper.mesh.channel import open_channel
from esper.mesh.identity import Role
from esper.mesh.server import MeshServer
from esper.mesh.service import Service
from esper.mesh.testing import TEST_SETTINGS, issuer, service_context, settings_with, token_for
from esper.oona.service import Config as OonaConfig
from esper.oona.service import build as build_oona
from esper.tamiyo.service import Config as TamiyoConfig
from esper.tamiyo.service import build as build_tamiyo
from esper.urza.service import Config as UrzaConfig
from esper.urza.service import build as build_urza
from esper.v1 import blueprint_pb2, build_pb2, kernel_pb2, lease_pb2, urza_service_pb2, verdict_pb2
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub


@dataclass
class Mesh:
    """A running mesh."""

    server: MeshServer
    key: SigningKey = field(default_factory=SigningKey.generate)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def target(self) -> str:
        """Its address."""
        return self.server.target

    def channel(self, role: Role | None = None) -> grpc.aio.Channel:
        """A channel that calls as a role, closed with the mesh."""
        channel = open_channel(self.target, token=None if role is None else token_for(role))
        self._stack.push_async_callback(channel.close)
        return channel

    def library(self, role: Role | None = None) -> UrzaServiceStub:
        """The library, called as a role."""
        return UrzaServiceStub(self.channel(role))

    async def submit(self, *names: str) -> list[str]:
        """Submit blueprints of the catalogue; their ids."""
        ids = []
        for name in names:
            request = urza_service_pb2.SubmitBlueprintRequest(ir=get(name).canonical_json().encode())
            ids.append((await self.library().SubmitBlueprint(request)).blueprint.id)
        return ids

    async def order(self, blueprint_id: str, signature: Signature) -> None:
        """Ask for a portable build."""
        build = build_pb2.Build(
            blueprint_id=blueprint_id, signature=signature_to_proto(signature), tier=build_pb2.TIER_PORTABLE
        )
        await self.library().RequestBuilds(urza_service_pb2.RequestBuildsRequest(builds=[build]))

    async def forge(self, make: Callable[[lease_pb2.CompileWork], bytes]) -> list[str]:
        """Do the work that is queued, with `make` for a compiler; ids of the kernels."""
        library, kernels = self.library(Role.TEZZERET), []
        while lease := await self._lease(library, lease_pb2.WORK_KIND_COMPILE):
            work = lease.compile
            data = await asyncio.to_thread(make, work)
            kernel = kernel_pb2.Kernel(
                build_id=work.build.id,
                blueprint_id=work.build.blueprint_id,
                signature=work.build.signature,
                tier=work.build.tier,
                target=work.build.target or "any",
                birth=blueprint_pb2.BIRTH_ZERO,
                causal=work.blueprint.causal,
                parameters=300,
                flops_per_position=600,
            )
            answer = await library.UploadKernel(_upload(kernel, data))
            kernels.append(answer.kernel.id)
            done = urza_service_pb2.CompleteWorkRequest(lease_id=lease.id, kernel_id=answer.kernel.id)
            await library.CompleteWork(done)
        return kernels

    async def judge(self, *, passed: Callable[[kernel_pb2.Kernel], bool] = lambda _: True) -> None:
        """Judge whatever is staged."""
        library = self.library(Role.URABRASK)
        public = self.key.public
        await library.RegisterSigningKey(
            urza_service_pb2.RegisterSigningKeyRequest(
                key=verdict_pb2.SigningKey(key_id=public.key_id, public_key=public.raw)
            )
        )
        while lease := await self._lease(library, lease_pb2.WORK_KIND_EVALUATE):
            verdict = verdict_over(self.key, lease.evaluate.kernel.id, passed=passed(lease.evaluate.kernel))
            await library.CompleteWork(urza_service_pb2.CompleteWorkRequest(lease_id=lease.id, verdict=verdict))

    async def _lease(self, library: UrzaServiceStub, kind: lease_pb2.WorkKind) -> lease_pb2.Lease | None:
        tiers = [build_pb2.TIER_PORTABLE] if kind == lease_pb2.WORK_KIND_COMPILE else []
        answer = await library.LeaseWork(urza_service_pb2.LeaseWorkRequest(kind=kind, holder="test", tiers=tiers))
        return answer.leases[0] if answer.leases else None

    async def stop(self) -> None:
        """Drain and close; the mesh can be opened again over the same directory and port."""
        await self._stack.aclose()
        await self.server.stop()


def verdict_over(key: SigningKey, kernel_id: str, *, passed: bool = True) -> verdict_pb2.Verdict:
    """A signed verdict as it travels."""
    statement = Statement(
        kernel_id=kernel_id,
        passed=passed,
        checks=(CheckResult("contract.shape", passed, "as promised" if passed else "another shape"),),
        measurements=(Figure("latency.forward.p50", 0.02, "ms"),),
        target="cpu/test",
        gauntlet_version="1",
        issued_at=datetime(2026, 11, 23, 12, tzinfo=UTC),
    )
    return signed_to_proto(key.sign(statement), statement)


def signed_to_proto(signed: SignedVerdict, statement: Statement) -> verdict_pb2.Verdict:
    """Statement and signature in a message."""
    message = verdict_pb2.Verdict(
        kernel_id=statement.kernel_id,
        passed=statement.passed,
        checks=[
            verdict_pb2.Check(name=check.name, passed=check.passed, finding=check.finding) for check in statement.checks
        ],
        measurements=[
            verdict_pb2.Measurement(name=figure.name, value=figure.value, unit=figure.unit)
            for figure in statement.measurements
        ],
        target=statement.target,
        gauntlet_version=statement.gauntlet_version,
        statement=signed.statement,
        signature=signed.signature,
        key_id=signed.key_id,
    )
    message.issue_time.FromDatetime(statement.issued_at)
    return message


async def _upload(kernel: kernel_pb2.Kernel, data: bytes) -> AsyncIterator[urza_service_pb2.UploadKernelRequest]:
    from esper.mesh.blobs import chunk
    from esper.v1 import blob_pb2

    yield urza_service_pb2.UploadKernelRequest(kernel=kernel)
    offset = 0
    for part in chunk(data):
        yield urza_service_pb2.UploadKernelRequest(chunk=blob_pb2.BlobChunk(offset=offset, data=part))
        offset += len(part)
    yield urza_service_pb2.UploadKernelRequest(
        digest=blob_pb2.BlobDigest(digest=kernel_id_of(data), size_bytes=len(data))
    )


def real_kernel(work: lease_pb2.CompileWork) -> bytes:
    """A portable build by the real builder."""
    from esper.kasmina.blueprints.ir import Blueprint
    from esper.kasmina.kernels.build import build

    blueprint = Blueprint.from_json(work.blueprint.ir.decode())
    return build(blueprint, signature_from_proto(work.build.signature), Tier.PORTABLE)


def any_bytes(work: lease_pb2.CompileWork) -> bytes:
    """Something that only the library has to believe in."""
    return f"kernel of {work.build.id}".encode() * 10


@contextlib.asynccontextmanager
async def open_mesh(
    directory: Path,
    *,
    config: TamiyoConfig | None = None,
    port: int = 0,
    key: SigningKey | None = None,
    extra: Sequence[Service] = (),
) -> AsyncIterator[Mesh]:
    """Library, bus and controller on one port; pass the port of an earlier one to come back."""
    drain = asyncio.Event()
    opened: list[grpc.aio.Channel] = []

    def channel(_name: str) -> grpc.aio.Channel:
        if not opened:
            opened.append(open_channel(server.target, token=token_for(Role.TAMIYO)))
        return opened[0]

    services = [
        await build_oona(OonaConfig(), service_context("oona", directory / "oona", drain=drain)),
        await build_urza(UrzaConfig(), service_context("urza", directory / "urza", drain=drain, channel=channel)),
        await build_tamiyo(
            TamiyoConfig() if config is None else config,
            service_context("tamiyo", directory / "tamiyo", drain=drain, channel=channel),
        ),
        *extra,
    ]
    settings = TEST_SETTINGS if port == 0 else settings_with(port=port)
    server = MeshServer(settings, services, issuer=issuer, drain=drain)
    await server.start()
    mesh = Mesh(server) if key is None else Mesh(server, key)
    try:
        yield mesh
    finally:
        await mesh.stop()
        for one in opened:
            await one.close()
