"""The controller as a service: real servers, a real library and a real bus on one port."""

import asyncio
import contextlib
import time

import grpc
import grpc.aio
import pytest

from esper.kasmina.control import Action
from esper.kasmina.convert import (
    advice_from_proto,
    boundary_state_to_proto,
    run_hello_to_proto,
)
from esper.kasmina.signature import Layout, Signature
from esper.mesh.bus import BusSubscriber
from esper.mesh.errors import from_rpc_error
from esper.mesh.identity import Role
from esper.tamiyo.preparation import PreparationRules
from esper.tamiyo.rules import Rules
from esper.tamiyo.service import Config
from esper.tamiyo.store import DecisionStore, Entry
from esper.v1 import build_pb2, oona_service_pb2, urza_service_pb2
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from tests.services.tamiyo.tamiyo_mesh import any_bytes, open_mesh
from tests.services.tamiyo.tamiyo_worlds import make_hello, make_seed, make_site, make_state, with_state

CONFIG = Config(preparation=PreparationRules(prepare_blueprints=2, wait_s=0.2))


@pytest.fixture
async def mesh(tmp_path):
    """A mesh with short patience."""
    async with open_mesh(tmp_path, config=CONFIG) as opened:
        yield opened


class Talk:
    """One Advise stream."""

    def __init__(self, mesh, hello=None):
        self.call = TamiyoServiceStub(mesh.channel()).Advise()
        self.hello = make_hello() if hello is None else hello

    async def start(self):
        """Say hello and hear ready."""
        await self.call.write(pb.AdviseRequest(hello=run_hello_to_proto(self.hello)))
        return (await self.call.read()).ready

    async def ask(self, state):
        """The advice for a state."""
        await self.call.write(pb.AdviseRequest(state=boundary_state_to_proto(state)))
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF
        return advice_from_proto(answer.advice)

    async def _to_the_end(self):
        while await self.call.read() is not grpc.aio.EOF:
            pass

    async def error(self):
        """What ended the stream."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._to_the_end()
        return from_rpc_error(caught.value)


async def until(condition, timeout_s=10.0):
    """Wait for a condition that background work brings about."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  # the services tell nobody
            await asyncio.sleep(0.01)


async def prepare(mesh, hello=None, timeout_s=5.0):
    """PrepareRun."""
    request = pb.PrepareRunRequest(hello=run_hello_to_proto(make_hello() if hello is None else hello))
    return await TamiyoServiceStub(mesh.channel()).PrepareRun(request, timeout=timeout_s)


async def grown_library(mesh):
    """Blueprints submitted, built and validated; ids of the kernels that a run can grow."""
    await mesh.submit("depthwise_separable", "conv_bottleneck", "low_rank")
    answer = None

    async def ready():
        nonlocal answer
        await mesh.forge(any_bytes)
        await mesh.judge()
        with contextlib.suppress(grpc.aio.AioRpcError):
            answer = await prepare(mesh)
        return answer is not None and answer.pending == 0 and len(answer.kernel_ids) >= 2

    await until(ready)
    return list(answer.kernel_ids)


async def test_an_empty_library_is_said_to_be_empty(mesh):
    """A run that prepares before the forge has submitted anything is told to come again."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await prepare(mesh)
    error = from_rpc_error(caught.value)
    assert ("LIBRARY_EMPTY", 1.0) == (error.reason, error.retry_after_s)


async def test_preparing_asks_for_builds_and_counts_what_is_missing(mesh):
    """Pending counts builds, then kernels that are not judged; the rejected ones are counted as failed."""
    await mesh.submit("depthwise_separable", "conv_bottleneck", "low_rank")
    first = await prepare(mesh)
    assert (2, 0, []) == (first.pending, first.failed, list(first.kernel_ids))
    library = mesh.library()
    builds = (await library.ListBuilds(urza_service_pb2.ListBuildsRequest())).builds
    assert {build_pb2.TIER_PORTABLE, build_pb2.TIER_STANDARD} == {build.tier for build in builds}
    awaited = [build for build in builds if build.priority > 60]
    assert 2 == len(awaited)
    await mesh.forge(any_bytes)
    await mesh.judge(passed=lambda kernel: kernel.build_id != awaited[0].id)

    async def settled():
        answer = await prepare(mesh)
        return (0, 1) == (answer.pending, answer.failed) and len(answer.kernel_ids) >= 1

    await until(settled)


async def test_an_unreachable_build_queue_is_an_error_of_prepare(mesh):
    """A blueprint archived between listing and request is the library's refusal, not a silent success."""
    (blueprint,) = await mesh.submit("depthwise_separable")

    async def known():
        with contextlib.suppress(grpc.aio.AioRpcError):
            return (await prepare(mesh)).pending == 1
        return False

    await until(known)
    request = urza_service_pb2.ArchiveBlueprintRequest(blueprint_id=blueprint)
    await mesh.library(Role.OPERATOR).ArchiveBlueprint(request)

    async def gone():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await prepare(mesh, timeout_s=0.7)
        return from_rpc_error(caught.value).reason == "LIBRARY_EMPTY"

    await until(gone)


async def test_hello_alone_asks_for_builds(mesh):
    """A run that does not prepare still gets its kernels, in the background."""
    await mesh.submit("depthwise_separable")
    ready = await Talk(mesh).start()
    assert ("heuristic", "2") == (ready.policy, ready.policy_version)
    library = mesh.library()

    async def asked():
        return bool((await library.ListBuilds(urza_service_pb2.ListBuildsRequest())).builds)

    await until(asked)


async def test_a_run_is_advised_with_kernels_of_the_library(mesh):
    """The kernel of a decision is one that the library validated, of the site's signature, measured latency and all."""
    kernels = await grown_library(mesh)
    talk = Talk(mesh)
    await talk.start()
    advice = await talk.ask(make_state(1))
    (decision,) = advice.decisions
    assert (Action.GERMINATE, "1.0.0", "SATURATED") == (decision.action, decision.decision_id, decision.reason)
    assert decision.kernel.kernel_id in kernels
    assert "20 us" in advice.explanation
    assert advice.prefetch[0] in kernels


async def test_a_new_kernel_is_seen_by_a_run_that_is_under_way(mesh):
    """The watch of the library reaches open conversations."""
    await mesh.submit("depthwise_separable")
    talk = Talk(mesh)
    await talk.start()
    assert () == (await talk.ask(make_state(1))).decisions
    boundary = 1

    async def decided():
        nonlocal boundary
        await mesh.forge(any_bytes)
        await mesh.judge()
        boundary += 1
        return bool((await talk.ask(make_state(boundary, step=100, epoch=1.0))).decisions)

    await until(decided)


async def test_another_stream_goes_on_with_the_state_of_the_first(mesh):
    """Equal hello, states and catalogue give equal advice over the wire, also from a state in the middle."""
    await grown_library(mesh)
    states = [make_state(b, [make_seed(0)] if b > 1 else []) for b in range(1, 5)]
    talk = Talk(mesh)
    await talk.start()
    whole = [await talk.ask(state) for state in states]
    other = Talk(mesh, with_state(make_hello(), whole[1].controller_state))
    await other.start()
    assert whole[2:] == [await other.ask(state) for state in states[2:]]
    assert "RUN_TAKEN_OVER" == (await talk.error()).reason


async def test_the_order_of_words_is_the_contract(mesh):
    """A state first, a second hello, a boundary that does not ascend: INVALID_ARGUMENT with its reason."""
    talk = Talk(mesh)
    await talk.call.write(pb.AdviseRequest(state=boundary_state_to_proto(make_state(1))))
    assert "ADVISE_ORDER" == (await talk.error()).reason
    talk = Talk(mesh)
    await talk.start()
    await talk.call.write(pb.AdviseRequest(hello=run_hello_to_proto(make_hello())))
    assert "ADVISE_ORDER" == (await talk.error()).reason
    talk = Talk(mesh)
    await talk.start()
    await talk.ask(make_state(2))
    await talk.call.write(pb.AdviseRequest(state=boundary_state_to_proto(make_state(2))))
    assert "BOUNDARY_ORDER" == (await talk.error()).reason
    talk = Talk(mesh, make_hello(controller_state=b"nonsense"))
    await talk.call.write(pb.AdviseRequest(hello=run_hello_to_proto(talk.hello)))
    assert "CONTROLLER_STATE" == (await talk.error()).reason


async def test_a_stream_that_the_client_closes_ends_well(mesh):
    """Half-closing is how a run says goodbye."""
    talk = Talk(mesh)
    await talk.start()
    await talk.call.done_writing()
    assert await talk.call.read() is grpc.aio.EOF
    assert grpc.StatusCode.OK is await talk.call.code()


async def test_a_draining_server_ends_the_stream_at_once(tmp_path):
    """UNAVAILABLE, so that the run opens another; the server does not wait for the grace."""
    async with open_mesh(tmp_path, config=CONFIG) as mesh:
        talk = Talk(mesh)
        await talk.start()
        began = time.monotonic()
        stopping = asyncio.create_task(mesh.server.stop(grace_s=60.0))
        error = await talk.error()
        assert (grpc.StatusCode.UNAVAILABLE.value[0], "DRAINING") == (error.code, error.reason)
        await stopping
        assert time.monotonic() - began < 30.0


async def test_decisions_are_listed_and_published(mesh):
    """Newest first, page by page, with policy and time; and on the bus, keyed by run."""
    await grown_library(mesh)
    talk = Talk(mesh, make_hello(max_active_seeds=4))
    await talk.start()
    for boundary in (1, 2, 3):
        state = make_state(boundary, [make_seed(i) for i in range(boundary - 1)])
        assert (await talk.ask(state)).decisions
    stub = TamiyoServiceStub(mesh.channel())
    first = await stub.ListDecisions(pb.ListDecisionsRequest(run_id="digits-1", page_size=2))
    assert ["3.2.0", "2.1.0"] == [entry.decision.id for entry in first.decisions]
    assert "heuristic/2" == first.decisions[0].policy
    assert first.decisions[0].HasField("decide_time")
    rest = await stub.ListDecisions(
        pb.ListDecisionsRequest(run_id="digits-1", page_size=2, page_token=first.next_page_token)
    )
    assert (["1.0.0"], "") == ([entry.decision.id for entry in rest.decisions], rest.next_page_token)
    assert [] == list((await stub.ListDecisions(pb.ListDecisionsRequest(run_id="unknown"))).decisions)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListDecisions(pb.ListDecisionsRequest(run_id="digits-1", page_token="x"))
    assert "PAGE_TOKEN_INVALID" == from_rpc_error(caught.value).reason
    async with BusSubscriber(mesh.channel(), "decisions", start=oona_service_pb2.START_POSITION_EARLIEST) as subscriber:
        seen = []
        async for delivery in subscriber:
            seen.append(delivery.event)
            if len(seen) == 3:
                break
    recorded = [pb.RecordedDecision.FromString(event.payload) for event in seen]
    assert ["1.0.0", "2.1.0", "3.2.0"] == [entry.decision.id for entry in recorded]
    assert {"digits-1"} == {event.key for event in seen}


async def test_the_policy_tells_its_numbers(tmp_path):
    """GetPolicy shows the rules in force, changed ones included."""
    async with open_mesh(tmp_path, config=Config(rules=Rules(probation_epochs=3.0))) as mesh:
        policy = (await TamiyoServiceStub(mesh.channel()).GetPolicy(pb.GetPolicyRequest())).policy
    assert ("heuristic", "2") == (policy.name, policy.version)
    assert 3.0 == policy.parameters["probation_epochs"]
    assert 3.0 == policy.parameters["learning_rate_scale"]
    assert set(Rules.model_fields) == set(policy.parameters)


async def test_without_a_library_the_controller_still_answers(tmp_path, monkeypatch):
    """A library that cannot be watched leaves an empty shelf, never a failed stream."""
    async with open_mesh(tmp_path, config=CONFIG) as mesh:
        hello = make_hello([make_site(0, signature=Signature(Layout.VECTOR, 3, 3))])
        talk = Talk(mesh, hello)
        await talk.start()
        advice = await talk.ask(make_state(1))
    assert () == advice.decisions
    assert "0 kernels in the library" in advice.explanation


async def test_the_store_is_bounded_and_replays_replace(tmp_path):
    """The oldest decisions go; a decision given again to a resumed run is not doubled; all survives a restart."""
    from datetime import UTC, datetime

    now = datetime(2026, 11, 23, tzinfo=UTC)

    def entry(number, policy="heuristic/1"):
        return Entry(run_id="r", decision_id=f"{number}.0.0", decision=b"x", policy=policy, decided=now)

    store = DecisionStore(tmp_path / "d.db", limit=3)
    await store.open()
    for number in range(1, 6):
        store.keep(entry(number))
    store.keep(entry(5, "other/2"))
    page = await store.page("r", 10, "")
    assert "5.0.0" == page.entries[0].decision_id
    assert "other/2" == page.entries[0].policy
    assert len(page.entries) <= 3
    await store.close()
    store = DecisionStore(tmp_path / "d.db", limit=3)
    await store.open()
    assert now == (await store.page("r", 1, "")).entries[0].decided
    await store.close()


async def test_a_store_that_cannot_write_costs_the_record_only(tmp_path):
    """A broken table is logged; keeping goes on, and closing ends."""
    from datetime import UTC, datetime

    store = DecisionStore(tmp_path / "d.db", limit=3)
    await store.open()
    await store._database.execute("DROP TABLE decisions")
    store.keep(
        Entry(run_id="r", decision_id="1.0.0", decision=b"x", policy="p", decided=datetime(2026, 1, 1, tzinfo=UTC))
    )
    async with asyncio.timeout(5):
        await store.close()
