"""A hand-written loop grows through a real mesh: builds, verdicts, advice, kernels over gRPC, and one seed stays."""

import asyncio

import pytest
import torch
from torch import nn

from esper.kasmina import wrap
from esper.kasmina.control import SiteKind
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1.seed_pb2 import SEED_STAGE_FOSSILIZED
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from tests.services.tamiyo.tamiyo_mesh import open_mesh, real_kernel

EPOCHS, BATCH, ROWS = 16, 40, 1200


def _data():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]


def _train(target, cache_dir, library_ready):
    """Three lines of growth in a plain loop; fossilized seeds and the losses of every validation."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = _data()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3), nn.ReLU(), nn.Linear(3, 32), nn.ReLU())
    model.append(nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    growth = wrap(
        model,
        optimizer,
        mesh=target,
        cache_dir=cache_dir,
        sites=lambda site: site.kind is SiteKind.PARALLEL and site.name == "0..4",
        example_inputs=(x[:8],),
        run_id="loop-1",
        total_steps=EPOCHS * ROWS // BATCH,
        decay_start=0.9,
        advise_deadline_s=5.0,
        sample_every=2,
    )

    batches = list(zip(x[ROWS:].split(50), y[ROWS:].split(50), strict=True))

    def validate():
        with torch.no_grad():
            return [nn.functional.cross_entropy(model(a), b) for a, b in batches]

    losses = []
    for _ in range(EPOCHS):
        for start in range(0, ROWS, BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH])
            loss.backward()
            optimizer.step()
            growth.step(loss)
        growth.boundary(validate)
        losses.append(float(torch.stack(validate()).mean()))
        library_ready()  # a test must not depend on whether a build is faster than an epoch
    fossilized = growth.life.fossilized
    growth.close()
    return fossilized, losses


@pytest.mark.slow
async def test_a_loop_grows_through_the_mesh(tmp_path):
    """A bottlenecked host gets a branch around its narrow part, keeps it, and is much better for it."""
    async with open_mesh(tmp_path / "mesh") as mesh:
        await mesh.submit("norm_linear")
        loop = asyncio.get_running_loop()

        async def work():
            while not await mesh.forge(real_kernel):  # noqa: ASYNC110  # the run asks for its build when it says hello
                await asyncio.sleep(0.05)
            await mesh.judge()

        working = loop.create_task(work())

        def library_ready():
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(asyncio.shield(working), 60), loop).result()

        fossilized, losses = await asyncio.to_thread(_train, mesh.target, tmp_path / "cache", library_ready)
        answer = await TamiyoServiceStub(mesh.channel()).ListDecisions(pb.ListDecisionsRequest(run_id="loop-1"))
    assert {0} == set(fossilized)
    assert losses[-1] < 0.5 * losses[1]
    kept = [entry.decision for entry in answer.decisions if entry.decision.to_stage == SEED_STAGE_FOSSILIZED]
    assert ["PROBATION_PASSED"] == [decision.reason for decision in kept]
