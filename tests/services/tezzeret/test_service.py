"""The forge as users meet it: orders filled over gRPC, IRs judged, builds watched, machines without a compiler."""

import asyncio
import json

import grpc
import pytest

from esper.kasmina.blueprints import catalogue, get
from esper.kasmina.convert import signature_to_proto
from esper.kasmina.kernels import Tier, load_candidate, unpack
from esper.kasmina.kernels.build import limitations
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import InvalidInput, from_rpc_error
from esper.mesh.identity import Role
from esper.mesh.testing import channel_as, serve, service_context
from esper.tezzeret import worker
from esper.tezzeret.check import judge
from esper.tezzeret.convert import task_from_proto, tier_from_proto
from esper.tezzeret.orders import BuildFailed, trim
from esper.tezzeret.service import Config, _prepare, build
from esper.v1 import build_pb2, forge_pb2, lease_pb2, tezzeret_service_pb2, tezzeret_service_pb2_grpc, urza_service_pb2
from tests.services.tezzeret.conftest import VECTOR, sample, until


@pytest.fixture
async def forge(urza, forge_channel, tmp_path, request):
    """A forge behind a server of its own; gives the stub that its clients use."""
    drain = asyncio.Event()
    context = service_context("tezzeret", tmp_path / "tezzeret", channel=lambda _: forge_channel, drain=drain)
    service = await build(Config(wait_s=1.0, drain_s=0.2), context)
    async with serve(service, drain=drain) as (server, _), channel_as(server, Role.CLIENT) as channel:
        yield tezzeret_service_pb2_grpc.TezzeretServiceStub(channel)


async def test_orders_become_kernels_in_the_library(forge, client):
    """From an order to a staged kernel that loads: digest, manifest and what the library was told agree."""
    watch = forge.WatchBuilds(tezzeret_service_pb2.WatchBuildsRequest())
    await watch.initial_metadata()
    signature = Signature(Layout.IMAGE, 6, 9)
    built = await client.filled(get("wide_residual"), signature)
    assert (build_pb2.BUILD_STATE_SUCCEEDED, "") == (built.state, built.error)
    kernel, bundle = await client.download(built.kernel_id)
    loaded = load_candidate(bundle, built.kernel_id, signature)
    manifest = loaded.manifest
    assert (kernel.blueprint_id, kernel.blueprint_name, kernel.causal) == (
        get("wide_residual").id,
        "wide_residual",
        False,
    )
    assert (kernel.parameters, kernel.flops_per_position) == (manifest.parameter_count, manifest.flops_per_position)
    assert signature_to_proto(signature) == kernel.signature
    seen = []
    async for response in watch:
        seen.append(response.progress)
        if response.progress.build.id == built.id and response.progress.phase == forge_pb2.BUILD_PHASE_SUCCEEDED:
            break
    names = [forge_pb2.BuildPhase.Name(step.phase).removeprefix("BUILD_PHASE_") for step in seen]
    assert ["LEASED", "EXPORTING", "UPLOADING", "SUCCEEDED"] == names
    assert built.kernel_id == seen[-1].kernel_id
    assert 0 < seen[-1].elapsed.ToNanoseconds()
    async with asyncio.timeout(60):
        idle = False
        while not idle:  # a worker of a busy machine may still be starting
            state = await forge.GetForge(tezzeret_service_pb2.GetForgeRequest())
            idle = {forge_pb2.WORKER_STATE_IDLE} == {worker.state for worker in state.workers}
            await asyncio.sleep(0.05)
    assert (1, 0) == (state.succeeded, state.failed)
    assert state.target.startswith("cpu/")
    assert build_pb2.TIER_PORTABLE in state.tiers


async def test_an_order_that_cannot_be_built_fails_once_with_the_node(forge, client):
    """The static check's finding is the build's error; nobody tries again."""
    failed = await client.filled(sample(features="in + 1"))
    assert (build_pb2.BUILD_STATE_FAILED, 1) == (failed.state, failed.attempts)
    assert "node 'out' at vector:4->4:float32: expected 4 output features, found 5" in failed.error


async def test_the_catalogue_is_offered_and_archives_are_respected(forge, client, urza, forge_channel, tmp_path):
    """Every shipped blueprint is in the library soon after the start; what an operator archived stays archived."""

    async def listed(*, archived=False):
        request = urza_service_pb2.ListBlueprintsRequest(page_size=1000, include_archived=archived)
        return {b.id for b in (await client.urza.ListBlueprints(request)).blueprints}

    everything = {b.id for b in catalogue()}
    async with asyncio.timeout(20):
        while await listed() != everything:  # noqa: ASYNC110  # the library is asked
            await asyncio.sleep(0.02)
    async with channel_as(urza, Role.OPERATOR) as operator:
        archive = urza_service_pb2.ArchiveBlueprintRequest(blueprint_id=get("wide_mlp").id)
        await type(client)(operator).urza.ArchiveBlueprint(archive)
    again = await build(Config(), service_context("tezzeret", tmp_path / "two", channel=lambda _: forge_channel))
    async with serve(again):
        bench = again._bench
        await until(bench._tasks[0].done)
    assert everything - {get("wide_mlp").id} == await listed()
    assert everything == await listed(archived=True)


async def test_without_a_compiler_portable_orders_are_filled_and_standard_ones_say_why(
    urza, forge_channel, client, tmp_path, monkeypatch
):
    """A machine without a C++ compiler fails standard orders with that reason, at once, and goes on."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    service = await build(Config(), service_context("tezzeret", tmp_path / "t", channel=lambda _: forge_channel))
    async with serve(service) as (_, channel):
        failed = await client.filled(sample("one"), tier=Tier.STANDARD)
        assert (build_pb2.BUILD_STATE_FAILED, 1) == (failed.state, failed.attempts)
        assert "needs a C++ compiler" in failed.error
        assert build_pb2.BUILD_STATE_SUCCEEDED == (await client.filled(sample("two"))).state
        stub = tezzeret_service_pb2_grpc.TezzeretServiceStub(channel)
        state = await stub.GetForge(tezzeret_service_pb2.GetForgeRequest())
        assert [build_pb2.TIER_PORTABLE] == list(state.tiers)
        assert "needs a C++ compiler" in state.limitations[0]


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.skipif(bool(limitations(Tier.STANDARD)), reason="needs a C++ compiler")
async def test_standard_orders_are_compiled_in_the_confined_worker(forge, client):
    """Ahead-of-time compilation works within the limits of the worker, and the kernel runs natively here."""
    built = await client.filled(get("bottleneck_mlp"), VECTOR, Tier.STANDARD, limit_s=280)
    assert (build_pb2.BUILD_STATE_SUCCEEDED, "") == (built.state, built.error)
    kernel, bundle = await client.download(built.kernel_id)
    loaded = load_candidate(bundle, built.kernel_id, VECTOR)
    assert Tier.STANDARD is loaded.running_tier
    assert kernel.target == loaded.manifest.target


async def test_an_ir_is_judged_over_grpc(forge):
    """CheckBlueprint answers with id and cost, or with every problem and its node."""
    request = tezzeret_service_pb2.CheckBlueprintRequest
    ir = get("low_rank").canonical_json().encode()
    good = await forge.CheckBlueprint(request(ir=ir, signature=signature_to_proto(VECTOR)))
    plan = get("low_rank").check(VECTOR)
    assert (True, get("low_rank").id, plan.parameters, round(plan.flops)) == (
        good.ok,
        good.blueprint_id,
        good.parameters,
        good.flops_per_position,
    )
    assert (await forge.CheckBlueprint(request(ir=ir))).ok
    document = json.loads(ir)
    document["nodes"][1]["op"] = "conv9d"
    bad = await forge.CheckBlueprint(request(ir=json.dumps(document).encode()))
    assert (False, ["down"]) == (bad.ok, [problem.node for problem in bad.problems])
    assert "op 'conv9d' is not known; expected one of linear" in bad.problems[0].message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await forge.CheckBlueprint(request(ir=b"{]"))
    refused = from_rpc_error(caught.value)
    assert ("BLUEPRINT_MALFORMED", InvalidInput) == (refused.reason, type(refused))


def test_without_a_signature_typical_ones_are_tried():
    """An IR that fails at some typical width says so, each problem once."""
    report = judge(sample(features="in // 2 + in // 2").canonical_json().encode(), None)
    assert {"out"} == {problem.field for problem in report.problems}
    assert (0, 0) == (report.parameters, report.flops_per_position)
    assert len(report.problems) == len(set(report.problems))
    assert judge(get("gated_ffn").canonical_json().encode(), None).problems == ()


def test_a_signature_of_another_layout_is_a_problem_of_the_whole():
    """A finding that is about no node has an empty node."""
    report = judge(get("dilated_conv").canonical_json().encode(), VECTOR)
    assert [""] == [problem.field for problem in report.problems]


async def test_a_watch_ends_at_the_drain(urza, forge_channel, tmp_path):
    """Watchers are sent away with UNAVAILABLE when the forge drains."""
    drain = asyncio.Event()
    context = service_context("tezzeret", tmp_path / "t", channel=lambda _: forge_channel, drain=drain)
    service = await build(Config(offer_catalogue=False), context)
    async with serve(service, drain=drain) as (_, channel):
        watch = tezzeret_service_pb2_grpc.TezzeretServiceStub(channel).WatchBuilds(
            tezzeret_service_pb2.WatchBuildsRequest()
        )
        await watch.initial_metadata()
        drain.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert grpc.StatusCode.UNAVAILABLE == caught.value.code()


def test_a_worker_builds_refuses_and_tells_its_machine():
    """The worker's one function: a bundle for a good order, words for a bad one, the machine for none."""
    ir = sample().canonical_json().encode()
    phases = []
    order = {"ir": ir, "signature": str(VECTOR), "tier": "portable", "target": ""}
    bundle = worker.compile_job(order, phases.append)["bundle"]
    assert [{"phase": "exporting"}] == phases
    assert sample().id == unpack(bundle).manifest.blueprint_id
    refused = worker.compile_job(order | {"signature": "image:4->4:float32"}, phases.append)
    assert "BLUEPRINT_INVALID" == refused["reason"]
    assert "expected a layout in" in refused["refused"]
    foreign = worker.compile_job(order | {"tier": "standard", "target": "cpu/riscv64/x/torch-2.13"}, phases.append)
    assert foreign["reason"] in {"TARGET_NOT_HERE", "TOOL_MISSING"}
    machine = worker.compile_job({}, phases.append)
    assert machine["target"].startswith("cpu/")
    assert {tier.value: limitations(tier) for tier in Tier} == machine["limitations"]


def test_an_overgrown_compiler_cache_is_emptied(tmp_path):
    """Beyond its limit the cache starts anew; below it stays."""
    cache = tmp_path / "compiler-cache"
    _prepare(cache, 10)
    (cache / "object").write_bytes(b"0" * 8)
    _prepare(cache, 10_000)
    assert (cache / "object").exists()
    _prepare(cache, 7)
    assert [] == list(cache.iterdir())


async def test_a_forge_that_was_never_started_can_be_closed(tmp_path):
    """close() works whatever came before."""
    service = await build(Config(), service_context("tezzeret", tmp_path / "t"))
    await service.drain()
    await service.close()


def test_long_words_keep_beginning_and_end():
    """A trimmed error fits the contract, in bytes, and names cause and effect."""
    text = "error: no such thing\n" + "é" * 9000 + "\nld returned 1"
    short = BuildFailed(text, retryable=False).public
    assert len(short.encode()) <= 8192
    assert short.startswith("error: no such thing")
    assert short.endswith("ld returned 1")
    assert "short" == trim("short")


def test_orders_of_no_known_tier_are_refused():
    """A lease that this forge cannot read is an error that says what it expected."""
    assert Tier.AGGRESSIVE is tier_from_proto(build_pb2.TIER_AGGRESSIVE)
    with pytest.raises(InvalidInput, match="expected portable, standard or aggressive, found TIER_UNSPECIFIED"):
        tier_from_proto(build_pb2.TIER_UNSPECIFIED)
    with pytest.raises(InvalidInput, match="found 77"):
        tier_from_proto(77)
    with pytest.raises(InvalidInput, match="expected compile work, found None"):
        task_from_proto(lease_pb2.Lease(id="l"))
