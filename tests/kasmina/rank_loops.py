"""Two processes that train one model: what each rank does, to be started by `test_distributed`."""

from __future__ import annotations

import os
import pickle
import traceback
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from esper.kasmina import distributed
from esper.kasmina.control import Action, Advice, BlendStrategy, Decision, SiteHealth, Stage
from esper.kasmina.distributed import RankLost, Ranks
from esper.mesh.errors import Conflict, NotFound
from tests.kasmina.hosts import BrokenDelta, TinyKernel, choice, mlp
from tests.kasmina.loops import KERNEL, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


S = Stage
SIZE = 2


class RankRun(Run):
    """A run that trains and validates on this rank's share of every batch; on all of it where it is alone."""

    def __init__(
        self, rank: int, *, alone: bool = False, make: Any = None, accumulate: int = 1, **options: Any
    ) -> None:
        self.rank, self.size = (0, 1) if alone else (rank, SIZE)
        self.accumulate = accumulate
        self.clip = 1.0
        self.epoch = 8
        self.told: Callable[[Tensor], Any] = lambda loss: loss
        build = make or (mlp if alone else lambda: DistributedDataParallel(mlp()))
        super().__init__(make=build, distributed=not alone, isolation_learning_rate=1e-2, **options)

    def steps(self, count: int | None = None) -> None:
        """As its base, in one part or several."""
        x, y = self.train
        for i in range(self.epoch if count is None else count):
            at = 8 * (i % 16)
            mine = slice(at + self.rank, at + 8, self.size)
            parts = list(zip(x[mine].chunk(self.accumulate), y[mine].chunk(self.accumulate), strict=True))
            self.optimizer.zero_grad()
            for place, (features, labels) in enumerate(parts):
                last = place == len(parts) - 1
                with nullcontext() if last or self.size == 1 else self.model.no_sync():
                    loss = nn.functional.cross_entropy(self.model(features), labels)
                    (loss / len(parts)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.scheduler.step()
            self.growth.step(self.told(loss.detach()))

    def kernel(self, birth: str = "zero", name: str = "first..head", kind: str = "parallel", **more: Any) -> TinyKernel:
        """One that can be told to fail."""
        return super().kernel(birth, name, kind, **({"delta": BrokenDelta} | more))

    def _validate(self) -> dict[str, Any]:
        x, y = self.held_out
        pairs = list(zip(x.split(8), y.split(8), strict=True))[self.rank :: self.size]
        return {"loss": [float(nn.functional.cross_entropy(self.growth.model(a), b)) for a, b in pairs]}

    def state(self) -> dict[str, Tensor]:
        """Copies of all that the model holds."""
        return {name: value.detach().clone() for name, value in self.growth.model.state_dict().items()}

    def everywhere_the_same(self) -> bool:
        """True where all ranks hold the same bits, and their seeds stand at the same stages."""
        stages = {seed: self.growth.life.stage(seed).name for seed in self.growth.life.runs}
        mine = [stages, {name: value.tolist() for name, value in self.state().items()}]
        found: list[Any] = [None] * SIZE
        dist.all_gather_object(found, mine)
        return all(repr(other) == repr(found[0]) for other in found)

    def live(self, **more: Any) -> None:
        """From DORMANT to FOSSILIZED, born silent."""
        self.germinate(to=S.GRAFTING, **more)
        for stage in (S.STABILIZING, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED):
            assert stage is self.advance(stage), stage
        self.steps(4)


def a_whole_life(rank: int) -> None:
    """Both ranks end with the same bits, and with what one process finds that sees both their data."""
    run, one = RankRun(rank), RankRun(rank, alone=True)
    for each in (run, one):
        each.live()
    assert run.everywhere_the_same()
    for name, value in one.state().items():
        torch.testing.assert_close(run.state()[name], value, rtol=1e-3, atol=1e-4)
    # What was measured is of all batches, on every rank.
    own, alone = (each.growth.lineage()[0]["counterfactual"] for each in (run, one))
    assert own["batches"] == alone["batches"] == 8
    assert abs(own["mean_gain"] - alone["mean_gain"]) < 1e-2
    # One rank spoke for both.
    assert (rank == 0) == bool(run.plane.reports) == bool(run.plane.events)
    assert (rank == 0) == (run.plane.hello is not None)
    assert run.growth.run_id == "t"
    # Part of the host by now, its kernel fails on one rank: both do without it, for good.
    BrokenDelta.broken = rank == 1
    run.steps(3)
    BrokenDelta.broken = False
    run.steps(3)
    assert run.growth.life.runs[run.site()].attachment.seed.error
    assert run.everywhere_the_same()


def a_life_that_begins_loud(rank: int) -> None:
    """Isolation on data of its own, a ramp that follows what the seed does there: still the same bits on both ranks."""
    run = RankRun(rank)
    run.epoch = 16
    run.germinate("random", to=S.TRAINING, blend=BlendStrategy.DRIFT, steps=8)
    for stage in (S.GRAFTING, S.STABILIZING):
        assert stage is run.advance(stage)
    assert run.everywhere_the_same()
    run = RankRun(rank)
    run.epoch = 16
    run.germinate("random", to=S.TRAINING, blend=BlendStrategy.PERFORMANCE, steps=8)
    run.advance(S.GRAFTING)
    run.steps(5)
    assert run.everywhere_the_same()


def decisions_come_from_one_rank(rank: int) -> None:
    """The controller of the first rank is asked, and its word is carried out by both; its silence is silence."""
    run = RankRun(rank)
    kernel_of = {}

    def decide(state: Any) -> Advice:
        if rank:
            raise AssertionError("the second rank asked")
        if state.boundary == 2:
            raise ConnectionError("the controller died")
        given: tuple[Decision, ...] = ()
        if state.boundary == 1:
            given = (run_decision(run, kernel_of["id"]),)
        return Advice(boundary=state.boundary, decisions=given, explanation="", controller_state=b"x")

    run.plane.policy = decide
    run.steps()
    kernel_of["id"] = run.kernel().id
    report = run.boundary()
    assert report.applied[0].done, report
    assert b"x" == run.growth.controller_state
    run.steps(3)
    assert run.boundary().advice is None
    assert run.everywhere_the_same()
    assert S.GRAFTING is run.growth.life.stage(run.site())


def run_decision(run: RankRun, kernel_id: str) -> Decision:
    """Germinate and graft."""
    return Decision(
        decision_id="t/1",
        boundary=1,
        seed=run.site(),
        action=Action.GERMINATE,
        reason="TEST",
        explanation="",
        kernel=choice(kernel_id),
        to_stage=S.GRAFTING,
    )


def every_way_to_reduce(rank: int) -> None:
    """Accumulation, buckets as views, unused parameters, a static graph and hooks work on newborns as on the host."""
    ways: list[dict[str, Any]] = [
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {},
    ]

    def live(run: RankRun) -> None:
        run.germinate(to=S.GRAFTING)
        run.steps(6)
        run.boundary(run.decide(Action.CULL))
        run.steps(2)

    one = RankRun(rank, alone=True)
    live(one)
    for place, way in enumerate(ways):
        accumulate = 1 if "static_graph" in way else 2
        if place == 3:
            # Growth first, the wrapper afterwards.
            run = RankRun(rank, make=mlp, accumulate=accumulate)
            run.model = DistributedDataParallel(run.model)
            run.model.register_comm_hook(None, fp16_compress_hook)
        else:
            run = RankRun(rank, make=lambda way=way: DistributedDataParallel(mlp(), **way), accumulate=accumulate)
        live(run)
        assert run.everywhere_the_same(), way
        for name, value in one.state().items():
            # The hook rounds to 16 bits.
            torch.testing.assert_close(run.state()[name], value, rtol=1e-3, atol=1e-2 if place == 3 else 1e-4)


def a_spike_on_one_rank(rank: int) -> None:
    """The graft is rolled back on both, at the same step, and nobody waits for ever."""
    run = RankRun(rank)
    run.germinate(to=S.GRAFTING)
    run.steps(3)
    run.told = (lambda loss: loss * float("nan")) if rank else (lambda loss: loss)
    run.steps(3)
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())
    assert 1 == run.growth.counters["rollbacks"]
    assert run.everywhere_the_same()
    run.told = lambda loss: loss
    run.steps(3)
    assert run.boundary(metrics={}).boundary == 2
    assert run.everywhere_the_same()


def a_kernel_that_fails_on_one_rank(rank: int) -> None:
    """It is taken out on both, whether it fails in a forward or when it is made."""
    run = RankRun(rank)
    run.steps()
    kernel = run.kernel()
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(kernel.id), to_stage=S.GRAFTING))
    run.steps(2)
    BrokenDelta.broken = rank == 1
    run.steps(3)
    BrokenDelta.broken = False
    assert S.EMBARGOED is run.growth.life.stage(run.site())
    assert run.everywhere_the_same()
    assert ("another rank" in run.growth.records[0]["reason"]) == (rank == 0)

    run = RankRun(rank)
    run.steps()
    kernel = run.kernel()
    if rank:
        kernel.instantiate = _fail  # type: ignore[method-assign]  # of this object alone
    applied = run.boundary(run.decide(Action.GERMINATE, kernel=choice(kernel.id), to_stage=S.GRAFTING)).applied[0]
    assert not applied.done
    assert "no memory" in str(applied.refused[0])
    run.steps(3)
    assert run.everywhere_the_same()
    assert 1 == len(run.optimizer.param_groups)


def _fail(*_args: object) -> nn.Module:
    raise MemoryError("no memory on this rank")


class Late:
    """A plane's kernels, which come to one rank later than to the other, or not at all."""

    def __init__(self, kernel: TinyKernel) -> None:
        self.kernel = kernel
        self.here = False
        self.refused = False

    def get(self, _kernel_id: str) -> object | None:
        """As a mapping's."""
        if self.refused:
            raise NotFound("no such kernel on this rank")
        return self.kernel if self.here else None


def a_kernel_that_one_rank_lacks(rank: int) -> None:
    """No rank begins before all have it; where one is refused it, all give up."""
    run = RankRun(rank)
    run.steps()
    late = Late(run.kernel())
    late.here = rank == 0
    run.plane.kernels = late
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL)))
    refused = run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0]
    assert ["KERNEL_PENDING"] == [r.code for r in refused.refused]
    late.here = True
    assert run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0].done
    run.steps(2)
    assert run.everywhere_the_same()

    run = RankRun(rank)
    run.steps()
    late = Late(run.kernel())
    late.here, late.refused = True, rank == 1
    run.plane.kernels = late
    assert not run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL), to_stage=S.GRAFTING)).applied[0].done
    assert S.DORMANT is run.growth.life.stage(run.site()) or S.CANCELLED is run.growth.life.stage(run.site())
    assert run.everywhere_the_same()


def a_validation_that_fails_on_one_rank(rank: int) -> None:
    """It ends on both with an error, and the run can go on."""
    run = RankRun(rank)
    run.steps()

    def fail() -> dict[str, Any]:
        raise ZeroDivisionError("no batch left")

    try:
        run.growth.boundary(fail if rank else run.validate)
        raise AssertionError("expected an error on both ranks")
    except ZeroDivisionError:
        assert rank == 1
    except Conflict as error:
        assert "rank 1: ZeroDivisionError: no batch left" in error.public  # noqa: PT017  # nothing is raised on the other rank
    run.steps(1)
    assert run.boundary().loss is not None


def dormant_ranks_have_nothing_to_say(rank: int) -> None:
    """No collective but those of the training; at the boundary losses and health are the mean over ranks."""
    run = RankRun(rank, sample_every=1)
    states: list[Any] = []
    run.plane.policy = states.append
    run.told = lambda loss: torch.full_like(loss, 1.0 + 2.0 * rank)
    run.steps(1)  # learns the sites together
    calls: list[object] = []
    meet, distributed._meet = distributed._meet, calls.append
    try:
        run.steps(4)
    finally:
        distributed._meet = meet
    assert [] == calls
    run.boundary()
    assert rank == 1 or 2.0 == states[0].train_loss
    assert rank == 1 or len({health.index for health in states[0].sites}) == len(run.growth.sites)
    mine = (SiteHealth(index=0, saturation=0.5 * rank), *([] if rank else [SiteHealth(index=3, dead_fraction=0.5)]))
    both = (SiteHealth(index=0, saturation=0.25), SiteHealth(index=3, dead_fraction=0.5))
    assert both == run.growth.shared.health(mine)
    bare = DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step)
    x, y = run.train
    for place in (0, 0, 1, 2, 3):
        mine = slice(8 * place + rank, 8 * place + 8, SIZE)
        optimizer.zero_grad()
        nn.functional.cross_entropy(bare(x[mine]), y[mine]).backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for name, value in bare.module.state_dict().items():
        assert torch.equal(value, run.state()[name]), name


def a_checkpoint_of_one_rank(rank: int) -> None:
    """What the first rank saved brings both back, to the bits of the run that went on."""
    run = RankRun(rank)
    run.germinate(to=S.GRAFTING)
    run.steps(5)
    run.boundary()
    saved: list[Any] = [None]
    if rank == 0:
        saved = [pickle.dumps([run.growth.state_dict(), run.growth.model.state_dict(), run.optimizer.state_dict()])]
    dist.broadcast_object_list(saved)
    growth, model, optimizer = pickle.loads(saved[0])  # of the other rank
    again = RankRun(rank)
    again.growth.load_state_dict(growth, kernels=run.plane.kernels.get)
    again.growth.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.scheduler.load_state_dict(run.scheduler.state_dict())
    for each in (run, again):
        each.steps(20)
        each.boundary()
    assert again.everywhere_the_same()
    for name, value in run.state().items():
        torch.testing.assert_close(again.state()[name], value)


def a_compiled_wrapper(rank: int) -> None:
    """Compiled around ``DistributedDataParallel``, a life ends alike on both ranks."""
    run = RankRun(rank, make=lambda: torch.compile(DistributedDataParallel(mlp()), backend="aot_eager"))
    run.steps(3)
    run.boundary()
    run.germinate(to=S.GRAFTING)
    run.steps(6)
    assert run.everywhere_the_same()
    assert 9 == len(run.growth.sites)


def sharded() -> nn.Module:
    """The host under ``fully_shard``, layer by layer."""
    model = mlp()
    for layer in (model.first, model.second):
        fully_shard(layer)
    return fully_shard(model)


def a_sharded_life(rank: int) -> None:
    """Under FSDP2 dormant is absent, newborns are sharded as their host, and a life ends as in one process."""
    bare, dormant = sharded(), RankRun(rank, make=sharded)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    x, y = dormant.train
    for place in range(6):
        mine = slice(8 * place + rank, 8 * place + 8, SIZE)
        optimizer.zero_grad()
        nn.functional.cross_entropy(bare(x[mine]), y[mine]).backward()
        optimizer.step()
    dormant.scheduler.step = lambda: None  # type: ignore[method-assign]  # the rate stays
    dormant.clip = 1e9
    dormant.steps(6)
    dormant.boundary()
    for (name, value), (other, alone) in zip(
        dormant.model.state_dict().items(), bare.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(value.to_local(), alone.to_local()), name

    run, one = RankRun(rank, make=sharded), RankRun(rank, alone=True)
    for each in (run, one):
        each.live()
    born = run.growth.life.runs[run.site()].module
    assert all(isinstance(p, DTensor) for p in born.parameters())
    whole = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert list(one.state()) == list(whole)
        for name, value in one.state().items():
            torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-4)


def a_sharded_ramp_and_rollback(rank: int) -> None:
    """A loud birth is isolated, sharded and ramped; a spike brings every shard back."""
    run = RankRun(rank, make=sharded)
    run.epoch = 16
    run.germinate("random", to=S.TRAINING, blend=BlendStrategy.GRADIENT_NORM, steps=8)
    assert S.GRAFTING is run.advance(S.GRAFTING)
    before = [p.to_local().clone() for p in run.growth.model.first.parameters()]
    run.steps(6)
    seed = run.growth.life.runs[run.site()].attachment.seed
    assert 0.2 < float(seed.alpha) <= 1.0
    run.told = lambda loss: loss * float("inf") if rank else loss
    run.steps(2)
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())
    assert all(
        torch.equal(p.to_local(), was) for p, was in zip(run.growth.model.first.parameters(), before, strict=True)
    )
    run.told = lambda loss: loss
    run.steps(2)
    run.boundary()


def a_sharded_checkpoint(rank: int) -> None:
    """A run is saved whole, and resumed sharded, to the bits of the run that went on."""
    run = RankRun(rank, make=sharded)
    run.germinate(to=S.GRAFTING)
    run.steps(5)
    run.boundary()
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    growth = run.growth.state_dict()
    model, optimizer = get_state_dict(run.model, run.optimizer, options=whole)
    saved: list[Any] = [pickle.dumps([growth, model, optimizer])]
    dist.broadcast_object_list(saved)
    growth, model, optimizer = pickle.loads(saved[0])  # of the other rank
    assert not any(isinstance(value, DTensor) for value in growth["seeds"][0]["module"].values())
    again = RankRun(rank, make=sharded)
    again.growth.load_state_dict(growth, kernels=run.plane.kernels.get)
    set_state_dict(again.model, again.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=whole)
    again.scheduler.load_state_dict(run.scheduler.state_dict())
    for each in (run, again):
        each.steps(10)
        each.boundary()
    for (name, value), (_, other) in zip(run.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(_local(value), _local(other)), name
    again.told = lambda loss: loss * float("nan")
    again.steps(2)
    assert S.ROLLED_BACK is again.growth.life.stage(again.site())


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def a_rank_that_does_not_come(rank: int) -> None:
    """Nobody waits longer than was said. The last check: the group is of no use afterwards."""
    ranks = Ranks(dist.group.WORLD, timeout_s=1.0)
    if rank == 0:
        try:
            ranks.together(lambda: None)
            raise AssertionError("expected RankLost")
        except RankLost as error:
            assert "expected all to come" in error.public  # noqa: PT017  # nothing is raised on the other rank
    dist.barrier()


def lightning_on_ranks(rank: int) -> None:
    """The callback for Lightning grows under the framework's own DistributedDataParallel."""
    from tests.kasmina.integrations.rank_trainers import a_trainer  # only here, since lightning takes its time to load

    a_trainer(rank, SIZE)


CHECKS = (
    a_whole_life,
    a_life_that_begins_loud,
    decisions_come_from_one_rank,
    every_way_to_reduce,
    a_spike_on_one_rank,
    a_kernel_that_fails_on_one_rank,
    a_kernel_that_one_rank_lacks,
    a_validation_that_fails_on_one_rank,
    dormant_ranks_have_nothing_to_say,
    a_checkpoint_of_one_rank,
    a_compiled_wrapper,
    a_sharded_life,
    a_sharded_ramp_and_rollback,
    a_sharded_checkpoint,
    lightning_on_ranks,
    a_rank_that_does_not_come,
)


def work(rank: int, folder: str) -> None:
    """Run all checks; leaves a file per check and rank, with a traceback where it failed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=60), rank=rank, world_size=SIZE)
    for check in CHECKS:
        try:
            check(rank)
        except BaseException:  # noqa: BLE001  # told to the test, which fails by it
            Path(folder, f"{check.__name__}-{rank}").write_text(traceback.format_exc())
            # The other rank may be waiting for this one: let it know.
            os._exit(1)
        Path(folder, f"{check.__name__}-{rank}").write_text("")
    dist.destroy_process_group()
