"""Tolaria behind a real server: runs from request to end, through restarts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import uuid
from typing import TYPE_CHECKING

import grpc
import pytest

from esper.mesh.errors import Conflict, EsperError, InvalidInput, LimitExceeded, NotFound, Unavailable, from_rpc_error
from esper.mesh.testing import serve, service_context
from esper.tolaria.core import RunState
from esper.tolaria.service import Config, build
from esper.v1 import tolaria_service_pb2 as pb
from esper.v1.run_pb2 import (
    ARM_GROWN,
    ARM_HOST,
    ARM_STATIC,
    RUN_STATE_FAILED,
    RUN_STATE_INTERRUPTED,
    RUN_STATE_PAUSED,
    RUN_STATE_PREPARING,
    RUN_STATE_STOPPED,
    RUN_STATE_SUCCEEDED,
    Run,
    RunSpec,
)
from esper.v1.tolaria_service_pb2_grpc import TolariaServiceStub

if TYPE_CHECKING:
    from pathlib import Path

QUICK = {"schedule.epochs": 2, "artifacts.export": False, "control.prepare_wait_s": 0}
ENDLESS = {"schedule.epochs": 100_000, "control.prepare_wait_s": 0}


def spec(arm: int = ARM_HOST, *, reference: str = "", group: str = "", recipe: str = "digits", **overrides) -> RunSpec:
    """What to train."""
    message = RunSpec(recipe=recipe, arm=arm, reference_run_id=reference, group=group)
    message.overrides.update(overrides or QUICK)
    return message


class Client:
    """The calls of these tests, with deadlines."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = TolariaServiceStub(channel)

    async def start(self, message: RunSpec, request_id: str = "") -> Run:
        request = pb.StartRunRequest(spec=message, request_id=request_id or str(uuid.uuid4()))
        return (await self.stub.StartRun(request, timeout=20)).run

    async def get(self, run_id: str) -> Run:
        return (await self.stub.GetRun(pb.GetRunRequest(run_id=run_id), timeout=20)).run

    async def settled(self, run_id: str) -> list[Run]:
        async with asyncio.timeout(120):
            watched = self.stub.WatchRun(pb.WatchRunRequest(run_id=run_id))
            return [response.run async for response in watched]

    async def until_step(self, run_id: str, step: int) -> Run:
        async with asyncio.timeout(120):
            async for response in self.stub.WatchRun(pb.WatchRunRequest(run_id=run_id)):
                if response.run.progress.step >= step:
                    return response.run
        raise AssertionError("the run settled before that step")

    async def page(self, **fields) -> pb.ListRunsResponse:
        return await self.stub.ListRuns(pb.ListRunsRequest(**fields), timeout=20)

    async def stop(self, run_id: str) -> Run:
        return (await self.stub.StopRun(pb.StopRunRequest(run_id=run_id), timeout=30)).run

    async def pause(self, run_id: str) -> Run:
        return (await self.stub.PauseRun(pb.PauseRunRequest(run_id=run_id), timeout=20)).run

    async def resume(self, run_id: str, **fields) -> Run:
        return (await self.stub.ResumeRun(pb.ResumeRunRequest(run_id=run_id, **fields), timeout=20)).run


@contextlib.asynccontextmanager
async def tolaria(folder: Path, **config):
    """The service on a data directory."""
    context = service_context("tolaria", folder, address=lambda _: "127.0.0.1:9")
    service = await build(Config(**config), context)
    async with serve(service, drain=context.drain) as (_, channel):
        yield Client(channel), service


@contextlib.asynccontextmanager
async def refused(kind: type[EsperError], reason: str):
    """The call is answered with this error."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    error = from_rpc_error(caught.value)
    assert isinstance(error, kind), error
    assert reason == error.reason


async def test_a_run_goes_from_request_to_result(tmp_path):
    """Started, watched to its end, downloaded with digests; the request id makes starting idempotent."""
    async with tolaria(tmp_path) as (client, _):
        run = await client.start(spec(), "request-1")
        assert run.state == RUN_STATE_PREPARING
        assert run.id == (await client.start(spec(), "request-1")).id
        seen = await client.settled(run.id)
        last = seen[-1]
        assert last.state == RUN_STATE_SUCCEEDED, last.error
        assert last.result.final_parameters == last.result.host_parameters > 0
        assert last.result.weights_digest.startswith("sha256:")
        sequences = [r.progress.sequence for r in seen if r.HasField("progress")]
        assert sequences == sorted(sequences)
        assert [last.id] == [r.id for r in (await client.page()).runs]
        await _downloads(client, run.id, tmp_path)
        async with refused(Conflict, "RUN_NOT_RUNNING"):
            await client.pause(run.id)
        async with refused(Conflict, "RUN_FINISHED"):
            await client.stop(run.id)
        async with refused(Conflict, "RUN_NOT_RESUMABLE"):
            await client.resume(run.id)


async def _downloads(client: Client, run_id: str, folder: Path) -> None:
    listed = (await client.stub.ListArtifacts(pb.ListArtifactsRequest(run_id=run_id), timeout=20)).artifacts
    names = [a.name for a in listed]
    assert names == sorted(names)
    assert {"config.json", "report.json", "report.html", "lineage.json", "log.txt"} <= set(names)
    assert "run.json" not in names
    page = next(a for a in listed if a.name == "report.html")
    assert "text/html" == page.media_type
    data, digest, first = b"", "", None
    async for part in client.stub.DownloadArtifact(
        pb.DownloadArtifactRequest(run_id=run_id, name=page.name), timeout=20
    ):
        first = first or part.WhichOneof("part")
        if part.HasField("chunk"):
            assert len(data) == part.chunk.offset
            data += part.chunk.data
        elif part.HasField("digest"):
            digest = part.digest.digest
    assert "artifact" == first
    assert (folder / "runs" / run_id / "report.html").read_bytes() == data
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
    for name in ("run.json", "../../runs", "checkpoints"):
        async with refused(NotFound, "ARTIFACT_NOT_FOUND"):
            async for _ in client.stub.DownloadArtifact(
                pb.DownloadArtifactRequest(run_id=run_id, name=name), timeout=20
            ):
                pass


async def test_requests_that_can_never_succeed_are_refused_before_anything_starts(tmp_path):
    """Recipe, overrides, data and references are checked by the service."""
    async with tolaria(tmp_path) as (client, _):
        async with refused(NotFound, "RECIPE_NOT_FOUND"):
            await client.start(spec(recipe="mnist"))
        async with refused(InvalidInput, "OVERRIDE_UNKNOWN"):
            await client.start(spec(**{"schedule.epoch": 3}))
        async with refused(InvalidInput, "OVERRIDE_INVALID"):
            await client.start(spec(**{"schedule.epochs": "many"}))
        async with refused(InvalidInput, "OVERRIDE_INVALID"):
            await client.start(spec(seed=7))
        async with refused(Conflict, "DATA_MISSING"):
            await client.start(spec(recipe="cifar10", **{"data.dir": str(tmp_path)}))
        async with refused(Conflict, "REFERENCE_WRONG"):
            await client.start(spec(ARM_STATIC))
        async with refused(Conflict, "REFERENCE_WRONG"):
            await client.start(spec(ARM_HOST, reference="digits-1"))
        async with refused(NotFound, "RUN_NOT_FOUND"):
            await client.start(spec(ARM_STATIC, reference="digits-1"))
        for call in (client.get, client.settled, client.pause, client.resume, client.stop):
            async with refused(NotFound, "RUN_NOT_FOUND"):
                await call("digits-1")
        async with refused(InvalidInput, "PAGE_TOKEN_INVALID"):
            await client.page(page_token="bm9uc2Vuc2U=")
        assert [] == list((await client.page()).runs)


async def test_recipes_are_listed_with_their_configuration(tmp_path):
    """Every recipe with description and full configuration."""
    async with tolaria(tmp_path) as (client, _):
        found = (await client.stub.ListRecipes(pb.ListRecipesRequest(), timeout=20)).recipes
        assert ["cifar10", "digits", "stdlib-lm"] == [r.name for r in found]
        assert found[1].config["schedule"]["epochs"] > 0


async def test_pause_resume_and_stop(tmp_path):
    """A running run pauses at its next step, goes on from there, and is stopped for good."""
    async with tolaria(tmp_path) as (client, _):
        run = await client.start(spec(**ENDLESS))
        await client.until_step(run.id, 20)
        await client.pause(run.id)
        paused = (await client.settled(run.id))[-1]
        assert paused.state == RUN_STATE_PAUSED
        assert (await client.pause(run.id)).state == RUN_STATE_PAUSED
        async with refused(NotFound, "CHECKPOINT_NOT_FOUND"):
            await client.resume(run.id, boundary=77_777)
        assert (await client.resume(run.id)).state == RUN_STATE_PREPARING
        on = await client.until_step(run.id, paused.progress.step + 1)
        assert on.progress.sequence > paused.progress.sequence
        stopped = await client.stop(run.id)
        assert stopped.state == RUN_STATE_STOPPED
        assert (await client.stop(run.id)).state == RUN_STATE_STOPPED
        async with refused(Conflict, "RUN_NOT_RESUMABLE"):
            await client.resume(run.id)


async def test_the_queue_is_first_come_first_served_and_bounded(tmp_path):
    """One trains, the next waits, the one after that is refused; a waiting run can be paused, resumed and stopped."""
    async with tolaria(tmp_path, max_parallel_runs=1, max_queued_runs=1) as (client, service):
        first = await client.start(spec(**ENDLESS))
        await client.until_step(first.id, 1)
        second = await client.start(spec(**ENDLESS))
        async with refused(LimitExceeded, "TOO_MANY_RUNS"):
            await client.start(spec(**ENDLESS))
        assert service.orchestrator.store.record(second.id).process is None
        assert "waits for its turn" == (await client.get(second.id)).progress.phase
        assert (await client.pause(second.id)).state == RUN_STATE_PAUSED
        assert (await client.resume(second.id)).state == RUN_STATE_PREPARING
        assert (await client.resume(second.id)).state == RUN_STATE_PREPARING
        assert (await client.stop(second.id)).state == RUN_STATE_STOPPED
        await client.stop(first.id)


async def test_a_static_run_waits_for_its_reference_and_fails_with_it(tmp_path):
    """Asked for at once, begun never: its reference was stopped."""
    async with tolaria(tmp_path) as (client, _):
        grown = await client.start(spec(ARM_GROWN, **ENDLESS))
        static = await client.start(spec(ARM_STATIC, reference=grown.id, **ENDLESS))
        host = await client.start(spec(ARM_HOST, **ENDLESS))
        async with refused(Conflict, "REFERENCE_NOT_GROWN"):
            await client.start(spec(ARM_STATIC, reference=host.id, **ENDLESS))
        await client.until_step(host.id, 1)
        waiting = await client.get(static.id)
        assert waiting.state == RUN_STATE_PREPARING
        assert f"waits for run {grown.id}" == waiting.progress.phase
        await client.stop(grown.id)
        failed = (await client.settled(static.id))[-1]
        assert failed.state == RUN_STATE_FAILED
        assert grown.id in failed.error
        await client.stop(host.id)


async def test_training_outlives_the_service_and_is_found_again(tmp_path):
    """A drain ends the watchers and leaves the process; the next service adopts it, and a killed one is INTERRUPTED."""
    async with tolaria(tmp_path) as (client, service):
        run = await client.start(spec(**ENDLESS))
        before = await client.until_step(run.id, 5)
        watching = asyncio.create_task(client.settled(run.id))
        await asyncio.sleep(0.3)
        mark = service.orchestrator.store.record(run.id).process
        assert mark is not None
        service._context.drain.set()
        with pytest.raises(grpc.RpcError) as caught:
            await watching
        assert isinstance(from_rpc_error(caught.value), Unavailable)
    os.kill(mark.pid, 0)
    async with tolaria(tmp_path) as (client, service):
        after = await client.until_step(run.id, before.progress.step + 1)
        assert mark == service.orchestrator.store.record(run.id).process
        assert after.id == run.id
        os.kill(mark.pid, signal.SIGKILL)
        gone = (await client.settled(run.id))[-1]
        assert gone.state == RUN_STATE_INTERRUPTED
        assert "ResumeRun" in gone.error
        await client.resume(run.id)
        await client.until_step(run.id, before.progress.step)
        while (mark := service.orchestrator.store.record(run.id).process) is None:  # noqa: ASYNC110  # see below
            await asyncio.sleep(0.05)
        # One that a kernel took down is followed by another at once.
        folder = service.orchestrator.store.run_dir(run.id).path
        (folder / "flight").write_text(f"sha256:{'ab' * 32} forward\n")
        (folder / "stacks.txt").write_text("Fatal Python error: Segmentation fault")
        os.kill(mark.pid, signal.SIGKILL)
        while service.orchestrator.store.record(run.id).attempt < 3:  # noqa: ASYNC110  # a supervisor's look sets no event
            await asyncio.sleep(0.05)
        await client.until_step(run.id, before.progress.step)
        await client.stop(run.id)


async def test_runs_are_listed_page_by_page(tmp_path):
    """Newest first, each once, by state and by group; pages continue where they ended."""
    async with tolaria(tmp_path, max_parallel_runs=1) as (client, service):
        ids = []
        for number in range(5):
            run = await client.start(spec(group="even" if number % 2 == 0 else "odd", **ENDLESS))
            ids.append(run.id)
            await client.pause(run.id) if number else None
        await client.stop(ids[0])
        found, token = [], ""
        while True:
            page = await client.page(page_size=2, page_token=token)
            assert len(page.runs) <= 2
            found += [r.id for r in page.runs]
            token = page.next_page_token
            if not token:
                break
        assert list(reversed(ids)) == found
        assert {ids[0], ids[2], ids[4]} == {r.id for r in (await client.page(group="even")).runs}
        assert [ids[0]] == [r.id for r in (await client.page(states=[RUN_STATE_STOPPED])).runs]
        assert RunState.PAUSED is service.orchestrator.store.view(ids[1]).state
