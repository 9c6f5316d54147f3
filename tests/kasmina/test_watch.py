"""Which graft a spike is blamed on, for how long, and what the host goes back to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from esper.kasmina._losses import LossReader
from esper.kasmina.control import Action, BlendStrategy, Stage
from tests.kasmina.hosts import choice
from tests.kasmina.loops import OTHER, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

S = Stage


def _second(run: Run) -> int:
    """Graft another seed at the head; returns its index."""
    kernel = run.kernel("zero", "head", "series", id=OTHER)
    seed = run.site("head", "series")
    decision = run.decide(Action.GERMINATE, seed, kernel=choice(OTHER, scale=1.0), to_stage=S.GRAFTING)
    assert run.boundary(decision).applied[0].done, kernel
    return seed


def _without(run: Run, seed: int) -> dict[str, Any]:
    """Parameters of everything but one seed, and their moments."""
    kept = {n: p for n, p in run.model.named_parameters() if f"esper_seed_{seed}." not in n}
    moments = {n: copy.deepcopy(dict(run.optimizer.state.get(p, {}))) for n, p in kept.items()}
    return {"values": {n: p.detach().clone() for n, p in kept.items()}, "moments": moments}


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before["values"]) == list(after["values"])
    assert all(torch.equal(v, after["values"][n]) for n, v in before["values"].items())
    for name, moments in before["moments"].items():
        assert moments.keys() == after["moments"][name].keys(), name
        assert all(torch.equal(v, after["moments"][name][k]) for k, v in moments.items()), name


def test_a_rollback_spares_what_was_kept_since() -> None:
    """A seed that fossilized inside the window of another keeps what it learnt when that other is rolled back."""
    run = Run(spike_patience=1, watch_steps=1000)
    run.germinate(to=S.GRAFTING)
    first = run.site()
    run.steps()
    second = _second(run)
    assert S.FOSSILIZED is run.advance(S.FOSSILIZED)
    assert (second,) == run.growth.life.watch.seeds
    kept = _without(run, second)
    assert any("esper_seed" in name and moments for name, moments in kept["moments"].items())
    run.steps(4)
    run.tell(float("nan"))
    assert (S.FOSSILIZED, S.ROLLED_BACK) == (run.growth.life.stage(first), run.growth.life.stage(second))
    _assert_same(kept, _without(run, second))


def test_blame_ends_with_the_window() -> None:
    """A later graft has a window and a snapshot of its own: a spike in it leaves the seed before it where it was."""
    run = Run(spike_patience=1, watch_steps=20)
    run.germinate(to=S.GRAFTING)
    first = run.site()
    run.steps(16)
    second = _second(run)
    at_graft = _without(run, second)
    assert (first, second) == run.growth.life.watch.seeds
    run.steps(8)
    assert (second,) == run.growth.life.watch.seeds
    run.tell(float("inf"))
    assert (S.GRAFTING, S.ROLLED_BACK) == (run.growth.life.stage(first), run.growth.life.stage(second))
    _assert_same(at_graft, _without(run, second))


def test_open_windows_share_the_blame() -> None:
    """Two grafts inside their windows both go, and the host is that of before the first."""
    run = Run(spike_patience=1)
    run.germinate()
    run.steps(4)
    host = _without(run, run.site())
    run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING))
    run.steps(4)
    second = _second(run)
    run.steps(4)
    run.tell(float("nan"))
    assert {S.ROLLED_BACK} == {run.growth.life.stage(seed) for seed in (run.site(), second)}
    _assert_same(host, _without(run, second))


def test_the_watch_outlasts_the_ramp() -> None:
    """While alpha rises the window stays whole; its steps count once the ramp was seen complete."""
    run = Run(watch_steps=10, isolation_learning_rate=1e-2)
    run.germinate("random", blend=BlendStrategy.FIXED_RAMP, steps=40)
    assert S.GRAFTING is run.advance(S.GRAFTING)
    for _ in range(2):
        run.steps(16)
        run.boundary(metrics={})
        assert run.growth.life.watch.snapshot is not None
    run.steps(16)
    run.boundary(metrics={})
    run.steps(9)
    assert (run.site(),) == run.growth.life.watch.seeds
    run.steps(1)
    assert () == run.growth.life.watch.seeds


def test_an_older_window_knows_who_settled_meanwhile() -> None:
    """A seed whose window ended inside that of an older graft stays when the older one spikes, with what it learnt."""
    run = Run(spike_patience=1, watch_steps=10, isolation_learning_rate=1e-2)
    run.germinate("random", blend=BlendStrategy.FIXED_RAMP, steps=1000)
    first = run.site()
    assert S.GRAFTING is run.advance(S.GRAFTING)
    second = _second(run)
    run.steps(10)
    assert (first,) == run.growth.life.watch.seeds
    settled = _without(run, first)
    run.steps(4)
    run.tell(float("nan"))
    assert (S.ROLLED_BACK, S.GRAFTING) == (run.growth.life.stage(first), run.growth.life.stage(second))
    _assert_same(settled, _without(run, first))


def test_windows_are_counted_in_steps() -> None:
    """A loop that gives no loss has its watch ended all the same, and its seed is not called stable."""
    run = Run(watch_steps=10)
    run.germinate(to=S.GRAFTING)
    step = run.growth.step
    run.growth.step = lambda _loss=None: step()  # type: ignore[method-assign]  # a loop without losses
    run.steps(12)
    assert None is run.growth.life.watch.snapshot
    found = run.boundary(run.decide(Action.ADVANCE, to_stage=S.FINE_TUNING)).applied[0]
    assert (S.GRAFTING, ["NOT_MEASURED"]) == (found.stage, [r.code for r in found.refused])
    assert "growth.step() got none" in str(found.refused[0])


def test_a_high_loss_keeps_the_gate_and_the_window() -> None:
    """While high losses may still become a spike the seed does not advance and its window does not close."""
    run = Run(watch_steps=10, spike_patience=3)
    for _ in range(3):
        run.steps()
    run.germinate(to=S.GRAFTING)
    run.steps(9)
    run.tell(1e3)
    run.tell(1e3)
    found = run.boundary(run.decide(Action.ADVANCE, to_stage=S.FINE_TUNING)).applied[0]
    assert (S.GRAFTING, ["SPIKE"]) == (found.stage, [r.code for r in found.refused])
    run.tell(1e3)
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())


def test_snapshots_share_one_limit() -> None:
    """A graft for which there is no room has no snapshot of its own, until the one before it is let go."""
    run = Run(watch_steps=20, snapshot_max_bytes=4000)
    run.germinate(to=S.GRAFTING)
    run.steps(16)
    second = _second(run)
    watch = run.growth.life.watch
    assert [True, False] == [window.snapshot is not None for window in watch._open.values()]
    run.steps(8)
    assert (second,) == watch.seeds
    assert watch.snapshot is not None


class _Late(LossReader):
    """A device whose losses have never arrived until they are waited for."""

    def read(self, *, wait: bool = False) -> Iterator[float]:
        return super().read(wait=True) if wait else iter(())


def test_late_losses_are_judged_before_the_validation() -> None:
    """A spike that shows only at the boundary is rolled back first: what is validated is the network that goes on."""
    run = Run(spike_patience=1)
    run.germinate(to=S.GRAFTING)
    run.growth.losses = _Late()
    run.steps(8)
    run.tell(float("nan"))
    assert S.GRAFTING is run.growth.life.stage(run.site())
    report = run.boundary(metrics=run.validate)
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())
    losses = run.validate()["loss"]
    assert pytest.approx(sum(losses) / len(losses), abs=0.0) == report.loss


def test_late_losses_are_judged_before_a_checkpoint() -> None:
    """A checkpoint does not swallow a spike whose loss was still on its way."""
    run = Run(spike_patience=1)
    run.germinate(to=S.GRAFTING)
    run.growth.losses = _Late()
    run.tell(float("nan"))
    state = run.growth.state_dict()
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())
    assert [int(S.ROLLED_BACK)] == [stage for stage in state["layout"]["stage"] if stage != S.DORMANT]
