"""Several processes train one model, which grows: a whole life, commanded by hand, ends in the same bits on every rank.

    torchrun --nproc-per-node 2 examples/ranks.py               # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/ranks.py sharded       # fully_shard (FSDP2)

With a mesh the decisions would be Tamiyo's: ``wrap(model, optimizer, mesh="localhost:7600")``, on every rank.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import esper.kasmina
from esper.kasmina.blueprints import get
from esper.kasmina.control import Action, BlendStrategy, Decision, KernelChoice, Stage
from esper.kasmina.kernels import Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.build import build
from esper.kasmina.local import LocalPlane

BATCH = 32


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes: the largest of ten linear functions of twenty numbers."""
    rule = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return x, (x @ rule).argmax(1)


def main(*, sharded: bool) -> None:
    """Train, grow around the layer of two units, and compare the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2), nn.ReLU(), nn.Linear(2, 10))
    model: nn.Module = host
    if sharded:
        fully_shard(host)
    else:
        model = DistributedDataParallel(host)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = data(1024, seed=1)
    held_out_x, held_out_y = (part[rank::size] for part in data(512, seed=2))  # each rank its share

    def validate() -> dict[str, object]:
        losses = nn.functional.cross_entropy(model(held_out_x), held_out_y, reduction="none")
        return {"loss": losses.view(-1, BATCH).mean(1).tolist()}

    plane = LocalPlane()
    growth = esper.kasmina.wrap(
        model, optimizer, mesh=plane, sites=lambda site: site.narrowest_width == 2, parameter_budget=5000
    )
    seed, kernel_id, stage = 0, "", Stage.GRAFTING
    for epoch in range(12):
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).view(-1, size, BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch[rank]]), y[batch[rank]])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            growth.step(loss)
        kernel = None
        if not kernel_id:
            seed = next(s.index for s in growth.sites if s.descriptor.granularity == "span")
            bundle = build(get("bottleneck_mlp"), growth.sites[seed].descriptor.signature, Tier.PORTABLE)
            kernel_id = kernel_id_of(bundle)
            plane.kernels[kernel_id] = load_candidate(bundle, kernel_id)
            kernel = KernelChoice(
                kernel_id=kernel_id,
                blueprint_name="bottleneck_mlp",
                blend=BlendStrategy.IMMEDIATE,
                blend_steps=1,
                learning_rate_scale=3.0,
            )
        decision = Decision(
            decision_id=f"by-hand/{epoch}",
            boundary=growth.boundaries + 1,
            seed=seed,
            action=Action.ADVANCE if kernel is None else Action.GERMINATE,
            reason="BY_HAND",
            explanation="as an example",
            to_stage=stage,
            kernel=kernel,
        )
        report = growth.boundary(validate, decisions=[decision] if stage <= Stage.FOSSILIZED else [])
        if report.applied and report.applied[0].done:
            stage = Stage(stage + 1)
        if rank == 0:
            print(f"epoch {epoch:2}: loss {report.loss:.3f}, {growth.life.stage(seed).name}")
    found: list[object] = [None] * size
    dist.all_gather_object(found, [value.tolist() for value in growth.state_dict()["seeds"][0]["module"].values()])
    if rank == 0:
        print("the ranks agree" if all(other == found[0] for other in found) else "the ranks differ")
    growth.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sharded="sharded" in sys.argv[1:])
