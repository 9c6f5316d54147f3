"""A small world around a library: people who may call it, blueprints, bundles, verdicts."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from esper.kasmina.blueprints import catalogue
from esper.kasmina.blueprints import ir as blueprint_ir
from esper.kasmina.kernels.signing import CheckResult, Figure, SignedVerdict, SigningKey, Statement
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import EsperError
from esper.mesh.identity import Identity, Role
from esper.urza.blob_store import LocalBlobStore
from esper.urza.builds import Build, BuildOrder, Tier
from esper.urza.desk import Rules
from esper.urza.kernels import Kernel, KernelOffer
from esper.urza.leases import Built, Judged, Lease, Request, WorkKind
from esper.urza.library import Library
from esper.urza.store import Store

ALICE = Identity("alice", Role.CLIENT)
FORGE = Identity("forge-1", Role.TEZZERET)
JUDGE = Identity("gauntlet-1", Role.URABRASK)
OPERATOR = Identity("olga", Role.OPERATOR)
SIGNATURE = Signature(Layout.VECTOR, 16, 16)
TARGET = "cpu/x86_64/avx512/torch-2.13"


class FakeClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 23, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        """The present."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)


def make_ir(name: str = "low_rank", **changes: object) -> blueprint_ir.Blueprint:
    """A blueprint of the catalogue under any name."""
    return replace(catalogue()[0], name=name, **changes)


def statement_over(kernel_id: str, *, passed: bool = True, **changes: object) -> Statement:
    """What a gauntlet would say."""
    base = Statement(
        kernel_id=kernel_id,
        passed=passed,
        checks=(CheckResult("contract.shape", passed, "as promised" if passed else "another shape", 1.5),),
        measurements=(Figure("latency.forward.p50", 12.5, "us"), Figure("memory.peak", 4096.0, "bytes")),
        tags=("latency:fast",),
        target=TARGET,
        gauntlet_version="1",
        issued_at=datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC),
    )
    return replace(base, **changes)


@dataclass
class World:
    """A library and everybody who uses it."""

    library: Library
    clock: FakeClock
    key: SigningKey = field(default_factory=SigningKey.generate)

    async def submit(self, name: str = "low_rank", parents: Sequence[str] = (), **changes: object) -> str:
        """Submit a blueprint; return its id."""
        data = make_ir(name, **changes).canonical_json().encode()
        return (await self.library.submit_blueprint(data, parents, ALICE))[0].id

    async def order(
        self,
        blueprint_id: str | None = None,
        *,
        signature: Signature = SIGNATURE,
        tier: Tier = Tier.PORTABLE,
        target: str = "",
        priority: int = 0,
        retry: bool = False,
    ) -> Build:
        """Ask for a kernel."""
        blueprint_id = await self.submit() if blueprint_id is None else blueprint_id
        order = BuildOrder(blueprint_id=blueprint_id, signature=signature, tier=tier, target=target, priority=priority)
        return (await self.library.request_builds([order], retry=retry))[0]

    async def orders(self, count: int) -> list[Build]:
        """Ask for kernels of many widths."""
        blueprint_id = await self.submit()
        return [
            await self.order(blueprint_id, signature=Signature(Layout.VECTOR, width, 8))
            for width in range(1, count + 1)
        ]

    async def lease(self, kind: WorkKind, *, lease_time_s: float = 30.0, holder: str = "test", **more: object) -> Lease:
        """Take the one piece of work that there is."""
        request = Request(kind=kind, holder=holder, lease_time_s=lease_time_s, **more)
        by = FORGE if kind is WorkKind.COMPILE else JUDGE
        (lease,) = await self.library.desk.lease(request, by)
        return lease

    async def upload(self, build: Build, data: bytes | None = None, **changes: object) -> Kernel:
        """Upload a bundle for a build."""
        data = secrets.token_bytes(1000) if data is None else data
        offer = KernelOffer(
            build_id=build.id,
            blueprint_id=build.blueprint_id,
            signature=build.signature,
            tier=build.tier,
            target=build.target or TARGET,
            parameters=100,
            flops_per_position=200,
        )
        upload = await self.library.begin_upload(replace(offer, **changes))
        try:
            await upload.add(0, data)
            upload.end("sha256:" + hashlib.sha256(data).hexdigest(), len(data))
            kernel, _ = await self.library.finish_upload(upload, FORGE)
        finally:
            await upload.abort()
        return kernel

    async def staged(self, build: Build | None = None, data: bytes | None = None) -> Kernel:
        """Build a kernel as a forge does."""
        build = await self.order() if build is None else build
        lease = await self.lease(WorkKind.COMPILE)
        kernel = await self.upload(build, data)
        await self.library.desk.complete(lease.id, Built(kernel.id), FORGE)
        return kernel

    async def register(self) -> None:
        """Make the gauntlet's key known."""
        public = self.key.public
        await self.library.register_key(public.key_id, public.raw, JUDGE, revoked=False)

    def judged(self, statement: Statement, key: SigningKey | None = None) -> Judged:
        """A verdict as it travels."""
        return Judged((self.key if key is None else key).sign(statement), statement)

    async def judge(self, kernel: Kernel, *, passed: bool = True, **changes: object) -> Kernel:
        """Judge a kernel as the gauntlet does."""
        await self.register()
        lease = await self.lease(WorkKind.EVALUATE)
        assert lease.subject_id == kernel.id
        outcome = self.judged(statement_over(kernel.id, passed=passed, **changes))
        result = await self.library.desk.complete(lease.id, outcome, JUDGE)
        assert isinstance(result, Kernel)
        return result

    async def validated(self, build: Build | None = None) -> Kernel:
        """A kernel that may run."""
        return await self.judge(await self.staged(build))


@asynccontextmanager
async def open_world(
    url: str, directory: Path, *, rules: Rules | None = None, wrap: Callable[[World], World] = lambda world: world
) -> AsyncIterator[World]:
    """A started library over a database."""
    clock = FakeClock()
    store = await Store.open(url, clock=clock)
    library = Library(store, LocalBlobStore(directory / "blobs", max_bytes=1 << 22), rules=rules)
    await library.start()
    try:
        yield wrap(World(library, clock))
    finally:
        await library.close()


def tampered(verdict: SignedVerdict) -> SignedVerdict:
    """A verdict with one bit of its statement turned."""
    changed = bytearray(verdict.statement)
    changed[len(changed) // 2] ^= 1
    return replace(verdict, statement=bytes(changed))


def resigned(outcome: Judged, data: bytes, key: SigningKey) -> Judged:
    """The same claims beside other bytes, which are signed all right."""
    verdict = SignedVerdict(data, key._key.sign(data), key.public.key_id)
    return replace(outcome, verdict=verdict)


async def refused(kind: type[EsperError], reason: str, work: object) -> EsperError:
    """Await something that must fail in one way."""
    with pytest.raises(kind) as caught:
        await work
    assert reason == caught.value.reason
    return caught.value
