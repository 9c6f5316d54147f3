"""The RPCs of the library, over a real server."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from esper.kasmina.kernels.signing import CheckResult, SigningKey
from esper.mesh.errors import Code
from esper.mesh.identity import Role
from esper.mesh.testing import channel_as, settings_with
from esper.urza.service import POLICY, SERVICE_NAME, Config
from esper.v1 import blob_pb2, blueprint_pb2, build_pb2, kernel_pb2, lease_pb2, urza_service_pb2_grpc, verdict_pb2
from esper.v1 import urza_service_pb2 as pb
from tests.services.urza.urza_calls import (
    SIGNATURE,
    Served,
    digest_of,
    parts_of,
    refusal,
    seconds,
    serve_library,
    stream,
    until,
)
from tests.services.urza.urza_world import statement_over, tampered

COMPILE, EVALUATE = lease_pb2.WORK_KIND_COMPILE, lease_pb2.WORK_KIND_EVALUATE
NOTHING = "sha256:" + "0" * 64


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A library behind a real server."""
    async with serve_library(tmp_path) as opened:
        yield opened


def stored_files(served: Served) -> list[str]:
    """Every blob on the disk, finished or not."""
    return sorted(path.name for path in (served.directory / "blobs").rglob("*") if path.is_file())


def test_every_rpc_has_a_policy() -> None:
    """No method is forgotten: the policy lists exactly what the contract offers."""
    methods = pb.DESCRIPTOR.services_by_name["UrzaService"].methods
    assert {f"/{SERVICE_NAME}/{method.name}" for method in methods} == set(POLICY)
    assert all(Role.ANONYMOUS not in roles for roles in POLICY.values())


async def test_from_blueprint_to_download(served: Served) -> None:
    """One pass through the slow clock: submitted, built, uploaded, judged, listed, downloaded, with its lineage."""
    data = os.urandom(2_500_000)
    kernel = await served.validated(data)
    assert kernel_pb2.KERNEL_STATE_VALIDATED == kernel.state
    assert (digest_of(data), len(data)) == (kernel.id, kernel.size_bytes)
    assert data == await served.download(kernel.id)
    shown = (await served.client.GetKernel(pb.GetKernelRequest(kernel=kernel.id[:15]))).kernel
    assert kernel == shown
    assert "low_rank" == shown.blueprint_name
    assert statement_over(kernel.id).to_bytes() == shown.verdict.statement
    lineage = await served.client.GetLineage(pb.GetLineageRequest(kernel_id=kernel.id))
    assert kernel == lineage.kernel
    assert build_pb2.BUILD_STATE_SUCCEEDED == lineage.build.state
    assert [kernel.blueprint_id] == [blueprint.id for blueprint in lineage.blueprints]
    assert not lineage.blueprints[0].ir
    unspecified, staged, validated = 0, kernel_pb2.KERNEL_STATE_STAGED, kernel_pb2.KERNEL_STATE_VALIDATED
    assert [(unspecified, staged), (staged, validated)] == [(t.from_state, t.to_state) for t in lineage.transitions]
    request = pb.ListKernelsRequest(states=[validated], signatures=[SIGNATURE], max_latency_us=20, causal_only=True)
    assert [kernel] == list((await served.client.ListKernels(request)).kernels)
    build = (await served.client.GetBuild(pb.GetBuildRequest(build_id=kernel.build_id))).build
    assert (kernel.id, 1) == (build.kernel_id, build.attempts)


async def test_blueprints(served: Served) -> None:
    """Submitting, reading, listing, archiving; the archive hides a blueprint until it is submitted again."""
    blueprint_id = await served.submit()
    read = (await served.client.GetBlueprint(pb.GetBlueprintRequest(blueprint="low_rank"))).blueprint
    assert (blueprint_id, digest_of(read.ir)) == (read.id, read.id)
    assert "client:local" == read.author
    again = await served.client.SubmitBlueprint(pb.SubmitBlueprintRequest(ir=read.ir))
    assert (False, read) == (again.created, again.blueprint)
    listed = (await served.client.ListBlueprints(pb.ListBlueprintsRequest())).blueprints
    assert [(blueprint_id, b"")] == [(blueprint.id, blueprint.ir) for blueprint in listed]
    archived = await served.operator.ArchiveBlueprint(pb.ArchiveBlueprintRequest(blueprint_id=blueprint_id))
    assert blueprint_pb2.BLUEPRINT_STATE_ARCHIVED == archived.blueprint.state
    assert not (await served.client.ListBlueprints(pb.ListBlueprintsRequest())).blueprints
    assert (await served.client.ListBlueprints(pb.ListBlueprintsRequest(include_archived=True))).blueprints
    error = await refusal(served.client.SubmitBlueprint(pb.SubmitBlueprintRequest(ir=b'{"not": "a blueprint"}')))
    assert (Code.INVALID_ARGUMENT, "BLUEPRINT_MALFORMED") == (error.code, error.reason)


async def test_pages(served: Served) -> None:
    """Pages neither skip nor repeat, a token belongs to its query, and a foreign token is refused."""
    ids = [await served.submit(f"b{number}") for number in range(5)]
    found, token = [], ""
    while True:
        request = pb.ListBlueprintsRequest(page_size=2, page_token=token)
        page = await served.client.ListBlueprints(request)
        found += [blueprint.id for blueprint in page.blueprints]
        if not (token := page.next_page_token):
            break
        last = token
    assert list(reversed(ids)) == found
    for wrong in (
        pb.ListBlueprintsRequest(page_token=last, include_archived=True),
        pb.ListBlueprintsRequest(page_token="bm8"),
        pb.ListBlueprintsRequest(page_token="%%"),
    ):
        error = await refusal(served.client.ListBlueprints(wrong))
        assert (Code.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID") == (error.code, error.reason)
    for width in (1, 2, 3):
        signature = type(SIGNATURE)()
        signature.CopyFrom(SIGNATURE)
        signature.in_features = width
        await served.order(ids[0], signature=signature)
    first = await served.client.ListBuilds(pb.ListBuildsRequest(page_size=2, states=[build_pb2.BUILD_STATE_QUEUED]))
    rest = await served.client.ListBuilds(
        pb.ListBuildsRequest(page_token=first.next_page_token, states=[build_pb2.BUILD_STATE_QUEUED])
    )
    assert [3, 2, 1] == [build.signature.in_features for build in (*first.builds, *rest.builds)]
    assert not rest.next_page_token


async def test_a_page_of_large_verdicts_fits_a_message(served: Served) -> None:
    """Kernels with verdicts of a quarter of a mebibyte are cut into more pages instead of one that is too large."""
    await served.register()
    long = "x" * 1000
    for number in range(24):
        data = f"bundle {number}".encode()
        kernel = await served.staged(data) if number == 0 else await _another(served, number, data)
        lease = await served.lease(EVALUATE)
        checks = tuple(CheckResult(f"check.{n}", passed=True, finding=long, elapsed_ms=1.0) for n in range(64))
        verdict = served.verdict(kernel.id, checks=checks)
        await served.judge.CompleteWork(pb.CompleteWorkRequest(lease_id=lease.id, verdict=verdict))
    found, token, pages = set(), "", 0
    while True:
        page = await served.client.ListKernels(pb.ListKernelsRequest(page_token=token))
        assert page.ByteSize() < 4 << 20
        found |= {kernel.id for kernel in page.kernels}
        pages += 1
        if not (token := page.next_page_token):
            break
    assert (24, 2) == (len(found), pages)


async def _another(served: Served, number: int, data: bytes) -> kernel_pb2.Kernel:
    signature = type(SIGNATURE)()
    signature.CopyFrom(SIGNATURE)
    signature.in_features = number
    build = await served.order(signature=signature)
    return (await served.forge.UploadKernel(stream(*parts_of(served.kernel_for(build), data)))).kernel


class TestUpload:
    """The stream of a bundle on its way in."""

    async def test_the_same_again(self, served: Served) -> None:
        """A bundle that is there already is returned as it is."""
        build = await served.order()
        first = await served.forge.UploadKernel(stream(*parts_of(served.kernel_for(build), b"bundle")))
        again = await served.forge.UploadKernel(stream(*parts_of(served.kernel_for(build), b"bundle")))
        assert (True, False, first.kernel) == (first.created, again.created, again.kernel)

    async def test_streams_out_of_order(self, served: Served) -> None:
        """Whatever is wrong with the order, an offset or a length is BLOB_MALFORMED, and nothing is kept."""
        build = await served.order()
        kernel, chunk, digest = parts_of(served.kernel_for(build), b"bundle")
        later = pb.UploadKernelRequest(chunk=blob_pb2.BlobChunk(offset=7, data=b"x"))
        longer = pb.UploadKernelRequest(digest=blob_pb2.BlobDigest(digest=digest_of(b"bundle"), size_bytes=7))
        announced = pb.UploadKernelRequest(kernel=served.kernel_for(build, size_bytes=99))
        for parts in (
            (),
            (chunk, digest),
            (kernel,),
            (kernel, chunk),
            (kernel, digest),
            (kernel, kernel, chunk, digest),
            (kernel, chunk, chunk, digest),
            (kernel, later, digest),
            (kernel, chunk, digest, digest),
            (kernel, chunk, digest, later),
            (kernel, chunk, longer),
            (announced, chunk, digest),
        ):
            error = await refusal(served.forge.UploadKernel(stream(*parts)))
            assert (Code.INVALID_ARGUMENT, "BLOB_MALFORMED") == (error.code, error.reason), parts
        assert [] == stored_files(served)
        assert not (await served.client.ListKernels(pb.ListKernelsRequest())).kernels

    async def test_wrong_digest(self, served: Served) -> None:
        """Bytes with another digest than said, before or after, are DATA_LOSS and leave nothing."""
        build = await served.order()
        kernel, chunk, digest = parts_of(served.kernel_for(build), b"bundle")
        other = pb.UploadKernelRequest(digest=blob_pb2.BlobDigest(digest=NOTHING, size_bytes=6))
        announced = pb.UploadKernelRequest(kernel=served.kernel_for(build, id=NOTHING))
        for parts in ((kernel, chunk, other), (announced, chunk, digest)):
            error = await refusal(served.forge.UploadKernel(stream(*parts)))
            assert (Code.DATA_LOSS, "DIGEST_MISMATCH") == (error.code, error.reason)
        assert [] == stored_files(served)

    async def test_too_large_too_unknown_too_different(self, tmp_path: Path) -> None:
        """Size, build and description are checked; each has its own reason."""
        async with serve_library(tmp_path, Config(announce=False, max_kernel_bytes=1000)) as served:
            build = await served.order()
            good = served.kernel_for(build)

            async def upload(kernel: kernel_pb2.Kernel, size: int = 10) -> tuple[Code, str]:
                error = await refusal(served.forge.UploadKernel(stream(*parts_of(kernel, bytes(size), chunk=600))))
                return error.code, error.reason

            assert (Code.RESOURCE_EXHAUSTED, "BLOB_TOO_LARGE") == await upload(good, 1001)
            assert (Code.RESOURCE_EXHAUSTED, "BLOB_TOO_LARGE") == await upload(
                served.kernel_for(build, size_bytes=1001)
            )
            good.build_id = NOTHING
            assert (Code.NOT_FOUND, "BUILD_NOT_FOUND") == await upload(good)
            other = served.kernel_for(build, birth=blueprint_pb2.BIRTH_RANDOM)
            assert (Code.INVALID_ARGUMENT, "KERNEL_MISMATCH") == await upload(other)
            huge = served.kernel_for(build, flops_per_position=1 << 63)
            assert (Code.INVALID_ARGUMENT, "NUMBER_TOO_LARGE") == await upload(huge)
            assert [] == stored_files(served)

    async def test_a_forge_that_goes_away_leaves_nothing(self, served: Served) -> None:
        """A call that is cancelled in the middle of its chunks leaves neither a kernel nor a file."""
        build = await served.order()
        kernel, chunk, _ = parts_of(served.kernel_for(build), b"bundle")
        sent = asyncio.Event()

        async def parts() -> AsyncIterator[pb.UploadKernelRequest]:
            yield kernel
            yield chunk
            sent.set()
            await asyncio.Event().wait()

        call = served.forge.UploadKernel(parts())
        await sent.wait()
        await until(lambda: stored_files(served))
        call.cancel()
        await until(lambda: not stored_files(served))
        assert not (await served.client.ListKernels(pb.ListKernelsRequest())).kernels

    async def test_only_forges_upload(self, served: Served) -> None:
        """Everybody else is refused before the first byte is taken."""
        build = await served.order()
        for stub in (served.client, served.judge, served.operator):
            error = await refusal(stub.UploadKernel(stream(*parts_of(served.kernel_for(build), b"bundle"))))
            assert Code.PERMISSION_DENIED == error.code


class TestDownload:
    """The stream of a bundle on its way out."""

    async def test_bit_rot(self, served: Served) -> None:
        """One turned byte on the disk ends the download with BLOB_CORRUPT and without a digest."""
        kernel = await served.validated(os.urandom(1_500_000))
        (name,) = stored_files(served)
        path = next((served.directory / "blobs").rglob(name))
        with path.open("r+b") as file:
            file.seek(1_200_000)
            byte = file.read(1)
            file.seek(1_200_000)
            file.write(bytes([byte[0] ^ 1]))
        error = await refusal(served.client.DownloadKernel(pb.DownloadKernelRequest(kernel_id=kernel.id)))
        assert (Code.DATA_LOSS, "BLOB_CORRUPT") == (error.code, error.reason)

    async def test_what_is_not_served(self, served: Served) -> None:
        """An unknown kernel is NOT_FOUND, a quarantined one FAILED_PRECONDITION."""
        error = await refusal(served.client.DownloadKernel(pb.DownloadKernelRequest(kernel_id=NOTHING)))
        assert (Code.NOT_FOUND, "KERNEL_NOT_FOUND") == (error.code, error.reason)
        kernel = await served.validated()
        harm = pb.QuarantineKernelRequest(kernel_id=kernel.id, reason="diverges on bfloat16")
        gone = (await served.judge.QuarantineKernel(harm)).kernel
        assert kernel_pb2.KERNEL_STATE_QUARANTINED == gone.state
        error = await refusal(served.client.DownloadKernel(pb.DownloadKernelRequest(kernel_id=kernel.id)))
        assert (Code.FAILED_PRECONDITION, "KERNEL_QUARANTINED") == (error.code, error.reason)
        error = await refusal(served.operator.ArchiveKernel(pb.ArchiveKernelRequest(kernel_id=kernel.id)))
        assert (Code.FAILED_PRECONDITION, "UNLAWFUL_TRANSITION") == (error.code, error.reason)

    async def test_archived_kernels_are_still_served(self, served: Served) -> None:
        """Runs that use an archived kernel can still fetch it."""
        kernel = await served.validated(b"archived")
        archived = await served.operator.ArchiveKernel(pb.ArchiveKernelRequest(kernel_id=kernel.id))
        assert kernel_pb2.KERNEL_STATE_ARCHIVED == archived.kernel.state
        assert b"archived" == await served.download(kernel.id)

    async def test_the_loop_lives_while_bundles_flow(self, served: Served) -> None:
        """Large downloads and uploads leave the event loop to others: a ping beside them stays below 200 ms."""
        data = os.urandom(12 << 20)
        kernel = await served.staged(data)
        worst = 0.0
        flowing = asyncio.gather(*(served.download(kernel.id) for _ in range(3)))
        while not flowing.done():
            start = time.perf_counter()
            await served.client.GetBuild(pb.GetBuildRequest(build_id=kernel.build_id))
            worst = max(worst, time.perf_counter() - start)
        assert [data] * 3 == await flowing
        # Generous: tests share their cores. A read of 12 MiB on the loop would take seconds at this load.
        assert worst < 2.0


class TestRoles:
    """Who may do what."""

    async def test_someone_who_is_not_urabrask_cannot_validate(self, served: Served) -> None:
        """A verdict, however well signed, is refused from forge, operator and client; the kernel stays STAGED."""
        kernel = await served.staged()
        await served.register()
        lease = await served.lease(EVALUATE)
        request = pb.CompleteWorkRequest(lease_id=lease.id, verdict=served.verdict(kernel.id))
        error = await refusal(served.forge.CompleteWork(request))
        assert (Code.PERMISSION_DENIED, "NOT_THE_EVALUATOR") == (error.code, error.reason)
        for stub in (served.operator, served.client):
            assert Code.PERMISSION_DENIED == (await refusal(stub.CompleteWork(request))).code
        staged = (await served.client.GetKernel(pb.GetKernelRequest(kernel=kernel.id))).kernel
        assert kernel_pb2.KERNEL_STATE_STAGED == staged.state
        assert not staged.HasField("verdict")

    async def test_verdicts_that_do_not_count(self, served: Served) -> None:
        """Another's key, a turned bit, another kernel, fields that say something else: VERDICT_INVALID each time."""
        kernel = await served.staged()
        await served.register()
        lease = await served.lease(EVALUATE)
        statement = statement_over(kernel.id)
        lying = served.verdict(kernel.id, passed=False)
        lying.passed = True
        for verdict in (
            served.signed(SigningKey.generate().sign(statement), statement),
            served.signed(tampered(served.key.sign(statement)), statement),
            served.verdict(NOTHING),
            lying,
        ):
            error = await refusal(served.judge.CompleteWork(pb.CompleteWorkRequest(lease_id=lease.id, verdict=verdict)))
            assert (Code.INVALID_ARGUMENT, "VERDICT_INVALID") == (error.code, error.reason)
        request = pb.CompleteWorkRequest(lease_id=lease.id, verdict=served.verdict(kernel.id, passed=False))
        rejected = (await served.judge.CompleteWork(request)).kernel
        assert kernel_pb2.KERNEL_STATE_REJECTED == rejected.state
        assert rejected == (await served.judge.CompleteWork(request)).kernel

    async def test_what_belongs_to_operators(self, served: Served) -> None:
        """Archiving is for operators, quarantine for them and urabrask, keys for urabrask."""
        kernel = await served.validated()
        reason = pb.QuarantineKernelRequest(kernel_id=kernel.id, reason="x")
        archive = pb.ArchiveBlueprintRequest(blueprint_id=kernel.blueprint_id)
        public = SigningKey.generate().public
        key = verdict_pb2.SigningKey(key_id=public.key_id, public_key=public.raw)
        for call in (
            served.client.ArchiveKernel(pb.ArchiveKernelRequest(kernel_id=kernel.id)),
            served.judge.ArchiveKernel(pb.ArchiveKernelRequest(kernel_id=kernel.id)),
            served.client.QuarantineKernel(reason),
            served.forge.QuarantineKernel(reason),
            served.client.ArchiveBlueprint(archive),
            served.forge.RegisterSigningKey(pb.RegisterSigningKeyRequest(key=key)),
            served.operator.RegisterSigningKey(pb.RegisterSigningKeyRequest(key=key)),
            served.client.LeaseWork(pb.LeaseWorkRequest(kind=COMPILE, holder="x")),
            served.judge.LeaseWork(pb.LeaseWorkRequest(kind=COMPILE, holder="x")),
            served.forge.LeaseWork(pb.LeaseWorkRequest(kind=EVALUATE, holder="x")),
        ):
            assert Code.PERMISSION_DENIED == (await refusal(call)).code

    async def test_keys(self, served: Served) -> None:
        """A key is listed once it is registered, under its own name only."""
        await served.register()
        (listed,) = (await served.client.ListSigningKeys(pb.ListSigningKeysRequest())).keys
        assert (served.key.public.key_id, served.key.public.raw) == (listed.key_id, listed.public_key)
        wrong = verdict_pb2.SigningKey(key_id="0" * 16, public_key=served.key.public.raw)
        error = await refusal(served.judge.RegisterSigningKey(pb.RegisterSigningKeyRequest(key=wrong)))
        assert (Code.INVALID_ARGUMENT, "KEY_ID_MISMATCH") == (error.code, error.reason)


class TestLeases:
    """Waiting for work, keeping it, losing it."""

    async def test_waiting_ends_when_work_comes(self, served: Served) -> None:
        """A forge that waits hears of new work at once, not at the end of its wait."""
        blueprint_id = await served.submit()
        request = pb.LeaseWorkRequest(kind=COMPILE, holder="x", wait=seconds(60), max_leases=3)
        waiting = asyncio.ensure_future(served.forge.LeaseWork(request, timeout=120))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        start = time.perf_counter()
        build = await served.order(blueprint_id)
        (lease,) = (await waiting).leases
        assert time.perf_counter() - start < 10
        assert (build.id, COMPILE, "x", 1) == (lease.compile.build.id, lease.kind, lease.holder, lease.attempt)
        assert blueprint_id == digest_of(lease.compile.blueprint.ir)

    async def test_waiting_ends_with_the_time(self, served: Served) -> None:
        """Without work the answer is an empty list, when the wait is over or just before the caller's deadline."""
        start = time.perf_counter()
        short = pb.LeaseWorkRequest(kind=COMPILE, holder="x", wait=seconds(0.2))
        assert not (await served.forge.LeaseWork(short)).leases
        assert 0.2 <= time.perf_counter() - start
        long = pb.LeaseWorkRequest(kind=COMPILE, holder="x", wait=seconds(60))
        assert not (await served.forge.LeaseWork(long, timeout=1.0)).leases

    async def test_waiting_ends_at_the_drain(self, tmp_path: Path) -> None:
        """A server that stops sends waiting forges away with an empty list, without waiting for its grace."""
        async with serve_library(tmp_path, settings=settings_with(drain_grace_s=120)) as served, asyncio.timeout(60):
            request = pb.LeaseWorkRequest(kind=COMPILE, holder="x", wait=seconds(60))
            waiting = asyncio.ensure_future(served.forge.LeaseWork(request, timeout=120))
            await asyncio.sleep(0.1)
            stopping = asyncio.ensure_future(served.server.stop())
            assert not (await waiting).leases
            await stopping

    async def test_an_expired_lease_comes_back_by_itself(self, served: Served) -> None:
        """Who waits gets the work of a forge that fell silent when its lease runs out; the silent one is told."""
        await served.order()
        lost = await served.lease(COMPILE, lease_time=seconds(1))
        request = pb.LeaseWorkRequest(kind=COMPILE, holder="other", wait=seconds(60), lease_time=seconds(600))
        (lease,) = (await served.forge.LeaseWork(request, timeout=120)).leases
        assert (2, "other") == (lease.attempt, lease.holder)
        error = await refusal(served.forge.RenewLease(pb.RenewLeaseRequest(lease_id=lost.id)))
        assert (Code.ABORTED, "LEASE_LOST") == (error.code, error.reason)
        kept = await served.forge.RenewLease(pb.RenewLeaseRequest(lease_id=lease.id, lease_time=seconds(10)))
        assert kept.expire_time.ToDatetime() < lease.expire_time.ToDatetime()

    async def test_many_forges_no_double_lease(self, served: Served) -> None:
        """Twenty forges that wait and ask at once share thirty builds, each handed out exactly once."""
        blueprint_id = await served.submit()
        taken: list[str] = []

        async def forge() -> None:
            request = pb.LeaseWorkRequest(
                kind=COMPILE, holder="x", wait=seconds(1.0), lease_time=seconds(600), max_leases=2
            )
            while len(taken) < 30:
                leases = (await served.forge.LeaseWork(request, timeout=60)).leases
                taken.extend(lease.compile.build.id for lease in leases)

        async def orders() -> list[str]:
            ids = []
            for width in range(1, 31):
                signature = type(SIGNATURE)()
                signature.CopyFrom(SIGNATURE)
                signature.in_features = width
                ids.append((await served.order(blueprint_id, signature=signature)).id)
            return ids

        ids, *_ = await asyncio.gather(orders(), *(forge() for _ in range(20)))
        assert sorted(ids) == sorted(taken)

    async def test_failures(self, served: Served) -> None:
        """A failure that another attempt may mend queues the build again, another one ends it with its error."""
        build = await served.order()
        for retryable, state in ((True, build_pb2.BUILD_STATE_QUEUED), (False, build_pb2.BUILD_STATE_FAILED)):
            lease = await served.lease(COMPILE)
            failure = pb.WorkFailure(error="compiler said \x00 no", retryable=retryable)
            answer = await served.forge.CompleteWork(pb.CompleteWorkRequest(lease_id=lease.id, failure=failure))
            assert (state, "compiler said \ufffd no") == (answer.build.state, answer.build.error)
        again = (await served.client.RequestBuilds(pb.RequestBuildsRequest(builds=[build], retry=True))).builds[0]
        assert (build_pb2.BUILD_STATE_QUEUED, 0) == (again.state, again.attempts)


async def test_a_caller_that_leaves_does_not_hurt_the_others(served: Served) -> None:
    """Calls cancelled in mid-transaction leave the library working and its log without gaps."""
    for number in range(20):
        call = served.client.SubmitBlueprint(pb.SubmitBlueprintRequest(ir=(await _ir(f"cancelled_{number}"))))
        await asyncio.sleep(0.0005 * number)
        call.cancel()
    await served.submit("after_all")
    call = served.client.WatchLibrary(pb.WatchLibraryRequest(after_sequence=0))
    numbers: list[int] = []
    async for change in call:
        numbers.append(change.sequence)
        if change.blueprint.name == "after_all":
            break
    call.cancel()
    assert list(range(1, len(numbers) + 1)) == numbers


async def _ir(name: str) -> bytes:
    from tests.services.urza.urza_world import make_ir

    return make_ir(name).canonical_json().encode()


async def test_strangers_read_nothing(served: Served) -> None:
    """A role without entry in the policy is refused on every method."""
    async with channel_as(served.server, Role.ANONYMOUS) as channel:
        stub: Any = urza_service_pb2_grpc.UrzaServiceStub(channel)
        error = await refusal(stub.ListKernels(pb.ListKernelsRequest()))
        assert Code.UNAUTHENTICATED == error.code
