"""A whole life in a real training run."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from esper.kasmina import wrap
from esper.kasmina.control import Action, BlendStrategy, Outcome, Stage
from esper.kasmina.growth import Config
from esper.mesh.errors import InvalidInput
from tests.kasmina.hosts import choice, mlp, small_cnn
from tests.kasmina.loops import KERNEL, RAMPS, Run

if TYPE_CHECKING:
    from pathlib import Path

S = Stage


def test_zero_output_to_fossilized() -> None:
    """A silent newborn passes isolation in one boundary, grafts at once, proves its worth, and becomes the host's."""
    run = Run()
    report = run.germinate()
    seed = run.site()
    assert (S.LOADING, True) == (report.applied[0].stage, report.applied[0].done)
    assert [KERNEL] == run.plane.requested
    before = run.growth.last_report
    assert before is not None
    output = run.model(run.held_out[0])
    report = run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING))
    assert S.GRAFTING is report.applied[0].stage
    # Function-preserving birth: at full alpha, and nothing has changed.
    assert 1.0 == float(run.model.get_submodule(f"head.esper_seed_{seed}").alpha)
    assert torch.equal(output, run.model(run.held_out[0]))
    assert S.FOSSILIZED is run.advance(S.FOSSILIZED)
    assert (Outcome.FOSSILIZED, KERNEL) == (run.plane.reports[-1].outcome, run.plane.reports[-1].kernel_id)
    measured = run.plane.reports[-1].counterfactual
    assert measured is not None
    assert measured.lower_bound > 0
    record = run.growth.lineage()[0]
    way = ["GERMINATED", "LOADING", "TRAINING", "GRAFTING", "STABILIZING", "EVALUATING", "FINE_TUNING", "FOSSILIZED"]
    assert way == [entry["stage"] for entry in record["stages"]]
    assert (seed, "fossilized", 96, "TEST") == (
        record["seed"],
        record["outcome"],
        record["parameters"],
        record["decisions"][0]["reason"],
    )
    assert 96 == run.growth.life.parameters_added
    assert "FOSSILIZED" in run.growth.summary()
    loss = run.validate()["loss"]
    run.steps(64)
    # It goes on learning with the host, at a rate that approaches the host's.
    assert run.optimizer.param_groups[-1]["lr"] < 3 * run.optimizer.param_groups[0]["lr"]
    assert run.optimizer.param_groups[-1]["weight_decay"] > 0
    assert sum(run.validate()["loss"]) < sum(loss) + 1.0
    run.growth.close()


@pytest.mark.parametrize("blend", RAMPS)
def test_random_output_trains_in_isolation_and_ramps(blend: BlendStrategy) -> None:
    """A loud newborn learns unseen first, then alpha rises from near 0 to 1 by its strategy, and the graft holds."""
    run = Run(isolation_learning_rate=1e-2)
    run.germinate("random", blend=blend, steps=8)
    bare = copy.deepcopy(run.model)
    run.boundary(run.decide(Action.ADVANCE, to_stage=S.TRAINING))
    assert torch.equal(bare(run.held_out[0]), run.model(run.held_out[0]))
    assert 1 == len(run.optimizer.param_groups)
    blocked = run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0]
    assert (S.TRAINING, ["GRADIENT", "TOO_SOON"]) == (blocked.stage, [r.code for r in blocked.refused])
    assert S.GRAFTING is run.advance(S.GRAFTING)
    seed = run.model.get_submodule(f"head.esper_seed_{run.site()}")
    assert 0 < float(seed.alpha) < 0.2
    assert run.advance(S.STABILIZING) is S.STABILIZING
    assert 1.0 == float(seed.alpha)
    run.growth.close()


@pytest.mark.parametrize("shape", ["number", "vector"])
def test_ramps_take_a_loss_in_any_form(shape: str) -> None:
    """A ramp that looks at the loss rises as well where the loop gives a plain number, or one loss per sample."""
    run = Run(isolation_learning_rate=1e-2)
    run.shape = torch.Tensor.item if shape == "number" else (lambda loss: loss.detach().expand(8))
    run.germinate("random", blend=BlendStrategy.PERFORMANCE, steps=8)
    assert S.GRAFTING is run.advance(S.GRAFTING)
    assert S.STABILIZING is run.advance(S.STABILIZING)
    assert 0 == run.growth.counters["failed_step"]


def test_gradients_may_be_cleared_before_growth_is_told() -> None:
    """The host's gradient is measured, and ramps that follow it rise, in either order of the loop, to the same bits."""
    runs = [Run(isolation_learning_rate=1e-2) for _ in range(2)]
    for run, clears_first in zip(runs, (False, True), strict=True):
        run.clears_first = clears_first
        run.germinate("random", blend=BlendStrategy.GRADIENT_NORM, steps=8)
        assert run.growth.observation.gradient_norm is not None
        assert S.GRAFTING is run.advance(S.GRAFTING)
        assert S.STABILIZING is run.advance(S.STABILIZING)
    after, before = runs
    assert after.growth.observation.gradient_norm == before.growth.observation.gradient_norm
    a, b = after.model.state_dict(), before.model.state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    for run in runs:
        run.growth.close()
        assert not run.optimizer._optimizer_step_post_hooks


def test_isolation_does_not_touch_the_host() -> None:
    """The host that trains beside an isolated seed ends with the same bits as one that has none."""
    bare, grown = Run(), Run()
    for run in (bare, grown):
        run.steps()
    grown.germinate("random", to=S.TRAINING)
    bare.boundary(metrics={})
    for run in (bare, grown):
        run.steps(40)
    state = {k: v for k, v in grown.model.state_dict().items() if "esper" not in k}
    assert list(state) == list(bare.model.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in bare.model.state_dict().items())
    run = grown.growth.life.runs[grown.site()]
    assert run.isolation is not None
    assert run.isolation.steps >= 39
    assert all(p.grad is None for p in run.module.parameters())


def test_stabilizing_freezes() -> None:
    """From STABILIZING until FINE_TUNING the seed's parameters do not move; then they learn again."""
    run = Run(make=_norm_host, settle_steps=20, parameter_budget=500)
    run.germinate(to=S.GRAFTING)
    assert S.STABILIZING is run.advance(S.STABILIZING)
    seed = run.growth.life.runs[run.site()].module
    frozen = [p.clone() for p in seed.parameters()]
    run.steps(16)
    blocked = run.boundary(run.decide(Action.ADVANCE, to_stage=S.FINE_TUNING)).applied[0]
    assert ["TOO_SOON"] == [r.code for r in blocked.refused]
    run.steps(16)
    assert all(torch.equal(a, b) for a, b in zip(frozen, seed.parameters(), strict=True))
    assert run.boundary(run.decide(Action.ADVANCE, to_stage=S.FINE_TUNING)).applied[0].done
    run.steps(4)
    assert not all(torch.equal(a, b) for a, b in zip(frozen, seed.parameters(), strict=True))


class _NormHost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.first(x))))


def _norm_host() -> nn.Module:
    torch.manual_seed(0)
    return _NormHost()


def test_cull_leaves_the_host_alone() -> None:
    """After a cull the model has the host's keys, hooks, groups and state alone, computes what the host computes."""
    run = Run()
    keys = list(run.model.state_dict())
    run.germinate(to=S.GRAFTING)
    run.steps()
    bare = mlp()
    bare.load_state_dict({k: v for k, v in run.model.state_dict().items() if "esper" not in k})
    report = run.boundary(run.decide(Action.CULL, embargo_boundaries=2))
    assert (S.EMBARGOED, True) == (report.applied[0].stage, report.applied[0].done)
    assert keys == list(run.model.state_dict())
    assert torch.equal(bare(run.held_out[0]), run.model(run.held_out[0]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules() if m is not run.model)
    assert 1 == len(run.optimizer.param_groups)
    assert {id(p) for p in run.model.parameters()} == {id(p) for p in run.optimizer.state}
    assert not run.optimizer._optimizer_step_pre_hooks
    assert Outcome.CULLED is run.plane.reports[-1].outcome
    # The embargo is kept, then the site is free again.
    assert "TOO_SOON" == run.boundary(run.decide(Action.RELEASE)).applied[0].refused[0].code
    released = run.boundary(run.decide(Action.RELEASE)).applied[0]
    assert (S.DORMANT, True) == (released.stage, released.done)
    assert not run.growth.life.runs
    assert S.GRAFTING is run.germinate(to=S.GRAFTING).applied[0].stage


def test_what_is_left_keeps_a_site_closed() -> None:
    """G5 looks at host and optimizer themselves: a forgotten hook, and moments of nobody's parameter, are found."""
    run = Run()
    run.germinate(to=S.GRAFTING)
    seed = run.growth.life.runs[run.site()]
    assert seed.attachment is not None
    module, parameter = seed.attachment.seed, next(seed.module.parameters())
    run.steps(2)
    run.boundary(run.decide(Action.CULL, embargo_boundaries=1))
    handle = run.model.head.register_forward_hook(module.after, with_kwargs=True)
    run.optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    refused = run.boundary(run.decide(Action.RELEASE)).applied[0].refused
    assert ["expected no optimizer entries left, found 1", "expected no hooks left, found 1"] == [*map(str, refused)]
    assert S.RESETTING is run.growth.life.stage(run.site())
    handle.remove()
    run.optimizer.state.pop(parameter)
    assert [] == run.growth.life.release(run.site())


def test_cancel_before_the_host_is_touched() -> None:
    """A seed in LOADING or TRAINING can be cancelled; it is seen CANCELLED once, and its site is free again after."""
    run = Run()
    run.germinate("random", to=S.TRAINING)
    assert S.CANCELLED is run.boundary(run.decide(Action.CANCEL)).applied[0].stage
    assert Outcome.CANCELLED is run.plane.reports[-1].outcome
    states: list[Stage] = []
    run.plane.policy = lambda state: states.extend(seed.stage for seed in state.seeds)
    run.boundary()
    run.boundary()
    assert [S.CANCELLED] == states
    assert "esper" not in "".join(run.model.state_dict())


def test_spike_rolls_back_to_the_graft() -> None:
    """A graft that destroys its host is noticed within steps; host, moments and keys are those of the graft, locked."""
    run = Run(spike_patience=2, lock_boundaries=2)
    for _ in range(5):
        run.steps()
    run.germinate(to=S.GRAFTING, scale=1.0)
    host = {k: v.clone() for k, v in run.model.state_dict().items() if "esper" not in k}
    with torch.no_grad():
        run.model.get_submodule(f"head.esper_seed_{run.site()}").delta.up.copy_(80 * torch.randn(4, 8))
    run.steps(4)
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())
    assert 1 == run.growth.counters["rollbacks"]
    report = run.plane.reports[-1]
    assert (Outcome.ROLLED_BACK, True) == (report.outcome, "z-score" in report.reason)
    assert list(host) == list(run.model.state_dict())
    assert ("rollback", True) == (run.plane.events[-1][0], run.plane.events[-1][1]["host_restored"])
    loss = sum(run.validate()["loss"])
    run.steps()
    assert sum(run.validate()["loss"]) < loss + 4.0
    assert {run.site(): 2} == run.growth.locks()
    assert "ROLLED_BACK" in run.growth.summary()
    run.boundary()
    states = []
    run.plane.policy = lambda state: states.extend(state.seeds)
    run.boundary()
    assert ("found" in states[0].failure, True) == (True, states[0].ready)
    assert S.DORMANT is run.boundary(run.decide(Action.UNLOCK)).applied[0].stage


def test_rollback_restores_every_bit() -> None:
    """What the host learnt since the graft is undone exactly, moments included."""
    run = Run(spike_patience=1, lock_boundaries=3)
    run.steps(48)
    run.germinate(to=S.GRAFTING)
    at_graft = copy.deepcopy({k: v for k, v in run.model.state_dict().items() if "esper" not in k})
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    run.steps(3)
    run.tell(float("nan"))
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())
    assert all(torch.equal(v, at_graft[k]) for k, v in run.model.state_dict().items())
    now = run.optimizer.state_dict()["state"]
    assert all(torch.equal(now[i]["momentum_buffer"], moments[i]["momentum_buffer"]) for i in now)
    # An operator may open the lock before it expires, nobody else.
    assert not run.boundary(run.decide(Action.UNLOCK)).applied[0].done
    assert run.boundary(run.decide(Action.UNLOCK, reason="OPERATOR_RELEASE")).applied[0].done


def test_spike_without_a_snapshot() -> None:
    """A host too large for a snapshot loses the newborn and keeps what it learnt: CULLED, not ROLLED_BACK."""
    run = Run(snapshot_max_bytes=0)
    run.germinate(to=S.GRAFTING)
    run.tell(float("inf"))
    assert S.EMBARGOED is run.growth.life.stage(run.site())
    assert Outcome.CULLED is run.plane.reports[-1].outcome
    assert "esper" not in "".join(run.model.state_dict())


def test_watch_ends() -> None:
    """After its steps the watch is over, the snapshot let go, and a bad loss is the host's own affair."""
    run = Run(watch_steps=10)
    run.germinate(to=S.GRAFTING)
    assert run.growth.life.watch.snapshot is not None
    run.steps(12)
    assert run.growth.life.watch.snapshot is None
    run.tell(float("nan"))
    assert S.GRAFTING is run.growth.life.stage(run.site())


def test_no_gain_is_not_kept() -> None:
    """A seed whose counterfactual does not pay its price stays in FINE_TUNING however often it is advanced."""
    run = Run(price_per_million_parameters=1e6)
    run.germinate()
    assert S.FINE_TUNING is run.advance(S.FOSSILIZED, limit=5)
    refused = run.growth.last_report
    assert refused is not None
    assert ["NO_GAIN"] == [r.code for r in refused.applied[0].refused]


def test_missing_is_missing() -> None:
    """With finished numbers alone nothing is measured: the seed stays in FINE_TUNING, until there is a validation."""
    run = Run()
    run.steps()
    kernel = run.kernel()
    numbers = {"loss": 1.0, "accuracy": 0.5}
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(kernel.id)), metrics=numbers)
    for _ in range(5):
        run.steps()
        report = run.boundary(run.decide(Action.ADVANCE, to_stage=S.FOSSILIZED), metrics=numbers)
    assert (S.FINE_TUNING, ["NOT_MEASURED"]) == (report.applied[0].stage, [r.code for r in report.applied[0].refused])
    assert 0 == run.validations
    assert run.boundary(run.decide(Action.ADVANCE, to_stage=S.FOSSILIZED)).applied[0].done


def test_a_validation_that_fails_while_a_seed_is_measured_does_not_cost_the_seed() -> None:
    """It is EVALUATING without a measurement, which is made at the next boundary; the defect is counted."""
    run = Run()
    run.germinate(to=S.GRAFTING)
    run.advance(S.STABILIZING)
    run.steps()
    calls = []

    def validate() -> object:
        calls.append(len(calls))
        if len(calls) == 2:
            raise ZeroDivisionError("the user's own")
        return run.validate()

    report = run.boundary(run.decide(Action.ADVANCE, to_stage=S.EVALUATING), metrics=validate)
    assert (True, S.EVALUATING) == (report.applied[0].done, report.applied[0].stage)
    assert 1 == run.growth.counters["failed_measure"]
    assert run.growth.life.runs[run.site()].counterfactual is None
    run.boundary()
    assert run.growth.life.runs[run.site()].counterfactual is not None


def test_a_failed_measurement_leaves_nothing_behind() -> None:
    """A seed whose measuring fails is not judged by what was measured before; the others are measured all the same."""
    run = Run()
    run.germinate(to=S.GRAFTING)
    run.kernel("zero", "head", "series", id="sha256:" + "b" * 64)
    second = run.site("head", "series")
    run.steps()
    run.boundary(run.decide(Action.GERMINATE, second, kernel=choice("sha256:" + "b" * 64), to_stage=S.GRAFTING))
    run.steps()
    run.boundary(
        *(run.decide(Action.ADVANCE, seed, to_stage=S.FINE_TUNING) for seed in (run.site(), second)),
    )
    runs = run.growth.life.runs
    assert None not in {runs[run.site()].counterfactual, runs[second].counterfactual}
    first = runs[run.site()].attachment
    assert first is not None

    def fragile() -> dict[str, object]:
        if not first.seed.enabled:
            raise RuntimeError("out of memory")
        return run.validate()

    run.boundary(metrics=fragile)
    assert None is runs[run.site()].counterfactual
    assert None is not runs[second].counterfactual
    assert 1 == run.growth.counters["failed_measure"]


def test_validate_given_to_wrap() -> None:
    """A validation given to wrap serves the measurement where boundaries get finished numbers."""
    run = Run()
    run.growth.measurer._validate = run.validate
    run.steps()
    kernel = run.kernel()
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(kernel.id)), metrics={"loss": 1.0})
    for _ in range(6):
        run.steps()
        report = run.boundary(run.decide(Action.ADVANCE, to_stage=S.FOSSILIZED), metrics={"loss": 1.0})
        if report.applied[0].done:
            break
    assert S.FOSSILIZED is report.applied[0].stage
    assert run.growth.measurer.passes >= 2


def test_validation_leaves_no_trace() -> None:
    """The measured passes take no random number, keep training flags, and leave batch norms as they were."""
    run = Run(make=_norm_host, parameter_budget=500)
    run.germinate()
    run.advance(S.FINE_TUNING)
    state = copy.deepcopy(run.model.state_dict())
    run.model.head.eval()
    random = torch.get_rng_state()

    def validate() -> dict[str, object]:
        run.model.train()
        torch.rand(3)
        return run.validate()

    before = run.validations
    run.boundary(metrics=validate)
    assert 2 == run.validations - before
    assert run.growth.life.runs[run.site()].counterfactual is not None
    assert torch.equal(random, torch.get_rng_state())
    assert (True, False) == (run.model.norm.training, run.model.head.training)
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())


def test_state_at_a_boundary() -> None:
    """The controller sees sites, health, losses, seeds and gates as measured, and nothing that was not."""
    run, states = Run(total_steps=100, decay_start=0.7, task="blobs", flops_per_sample=1000.0), []
    run.plane.policy = states.append
    run.steps()
    run.boundary(metrics={"loss": 0.7, "accuracy": 0.5, "epoch": 1})
    hello = run.plane.hello
    assert (100, 0.7, "blobs", 9) == (hello.total_steps, hello.decay_start, hello.task, len(hello.sites))
    assert hello.host_parameters == hello.parameter_budget == sum(p.numel() for p in run.model.parameters())
    state = states[0]
    assert (1, 16, 0.7, 0.5, 1.0) == (
        state.boundary,
        state.step,
        state.validation_loss,
        state.validation_accuracy,
        state.epoch,
    )
    assert {h.index for h in state.sites} == set(range(9))
    assert state.gradient_norm is not None
    assert state.train_loss is not None
    assert pytest.approx(0.1 * 0.999**16) == state.learning_rate
    run.germinate()
    run.boundary()
    assert (S.LOADING, True, "", KERNEL) == (
        states[-1].seeds[0].stage,
        states[-1].seeds[0].ready,
        states[-1].seeds[0].blocked_by,
        states[-1].seeds[0].kernel_id,
    )
    run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING))
    run.boundary()
    assert (False, "NOT_MEASURED", 96, 1.0) == (
        states[-1].seeds[0].ready,
        states[-1].seeds[0].blocked_by,
        states[-1].parameters_added,
        states[-1].seeds[0].alpha,
    )
    assert states[-1].seeds[0].weight_norm is not None
    assert 1100.0 == states[-1].flops_per_sample
    run.steps()
    run.boundary(metrics={"loss": float("nan")})
    assert (str(states[-1].validation_loss), states[-1].epoch) == ("nan", None)
    run.growth.observation.worker.drain(5.0)
    columns = run.plane.health[-1]
    assert ((run.site(),), (int(S.GRAFTING),), (1.0,)) == (columns.seed, columns.stage, columns.alpha)
    assert columns.output_ratio[0] > 0


def test_several_seeds_and_limits() -> None:
    """Seeds at one module blend one after the other; the limits on living seeds and parameters hold."""
    run = Run(max_active_seeds=2, parameter_budget=400)
    run.steps()
    run.germinate(to=S.GRAFTING)
    series = run.kernel("zero", "head", "series", id="sha256:" + "b" * 64)
    second = run.decide(Action.GERMINATE, run.site("head", "series"), kernel=choice(series.id), to_stage=S.GRAFTING)
    assert run.boundary(second).applied[0].done
    run.steps()
    assert 3 == len(run.optimizer.param_groups)
    third = run.decide(Action.GERMINATE, run.site("first", "series"), kernel=choice(series.id))
    assert "living" in str(run.boundary(third).applied[0].refused[0])
    run.boundary(run.decide(Action.CULL, embargo_boundaries=1))
    assert 2 == len(run.optimizer.param_groups)
    run.growth.life.budget = 100
    big = run.kernel("zero", "first", "series", id="sha256:" + "c" * 64)
    found = run.boundary(run.decide(Action.GERMINATE, run.site("first", "series"), kernel=choice(big.id))).applied[0]
    assert (S.CANCELLED, True) == (found.stage, "budget" in str(found.refused[0]))
    assert "budget" in run.plane.reports[-1].reason


def test_loaded_kernels_reserve_their_parameters() -> None:
    """Two kernels that fit the budget alone, but not together, do not both grow, whenever they come."""
    run = Run(parameter_budget=250, max_active_seeds=3)
    run.germinate()
    second = run.kernel("zero", "first", "series", id="sha256:" + "b" * 64)
    assert 256 == second.manifest.parameter_count
    found = run.boundary(
        run.decide(Action.GERMINATE, run.site("first", "series"), kernel=choice(second.id), to_stage=S.GRAFTING)
    ).applied[0]
    assert (S.CANCELLED, True) == (found.stage, "found 256 for 154 left" in str(found.refused[0]))
    # What was reserved is asked again at the door.
    run.growth.life.budget = 90
    found = run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0]
    assert (S.LOADING, True) == (found.stage, "found 96 for 90 left" in str(found.refused[0]))


def test_dormant_without_a_mesh() -> None:
    """With mesh=None nothing grows unless decisions are given."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = wrap(model, optimizer)
    x = torch.randn(4, 8)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
        growth.step(1.0)
        assert growth.boundary([1.0, 2.0]).advice is None
    assert growth.sites
    assert "0 seeds not dormant" in growth.summary()
    growth.close()
    growth.close()


def test_wrap_refuses_what_it_can_not_do() -> None:
    """Unknown options, two sources of options, and distributed wrappers are refused in words."""
    model = small_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="found colour"):
        wrap(model, optimizer, colour=3)
    with pytest.raises(InvalidInput, match="found both"):
        wrap(model, optimizer, config=Config(), task="x")
    with pytest.raises(InvalidInput, match="DataParallel"):
        wrap(nn.DataParallel(model), optimizer)
    for wrong in ({"confidence": 1.0}, {"watch_steps": -1}, {"clip_norm": 0.0}, {"granularities": ("pixel",)}):
        with pytest.raises(InvalidInput, match="growth option"):
            wrap(model, optimizer, **wrong)
    growth = wrap(model, optimizer, sites=["0.1"], example_inputs=(torch.randn(2, 3, 8, 8),))
    assert {"0.1"} == {site.descriptor.name for site in growth.sites}
    for wrong_metrics in ("0.5", {"loss": "low"}, 3.0 + 2j, [object()]):
        with pytest.raises(InvalidInput, match="validation: expected a mapping"):
            growth.boundary(wrong_metrics)
    assert growth.boundary(None).loss is None
    assert 2.0 == growth.boundary({"loss": torch.tensor([1.0, 3.0])}).loss
    growth.close()


def test_mesh_that_is_not_there(tmp_path: Path) -> None:
    """A mesh address where nobody listens costs nothing: the run goes on, dormant."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = wrap(model, optimizer, mesh="127.0.0.1:9", cache_dir=tmp_path)
    for _ in range(2):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        growth.step(1.0)
        assert growth.boundary({"loss": 1.0}).advice is None
    growth.close(timeout_s=0.5)
