"""Controllers that are slow, wrong or dead, kernels that lie: training goes on, and it is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.kasmina import wrap
from esper.kasmina.control import Action, Advice, BoundaryState, Decision, Outcome, Stage
from esper.kasmina.local import LocalPlane
from esper.mesh.errors import NotFound
from tests.kasmina.hosts import BrokenDelta, TinyDelta, TinyKernel, choice, decide, mlp, vector
from tests.kasmina.loops import KERNEL, OTHER, Run

S = Stage


def _bits(run: Run) -> list[torch.Tensor]:
    return [v.clone() for v in run.model.state_dict().values()]


class _Hostile(LocalPlane):
    """Fails in every call."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"open", "advise", "request_kernel", "kernel", "publish_health", "report", "event", "close"}:
            raise ConnectionError(f"{name} is down")
        return super().__getattribute__(name)


def test_a_plane_that_always_fails() -> None:
    """Every call raises; the run ends with the bits of one without growth, and the failures are counted."""
    bare, run = Run(plane=LocalPlane()), Run(plane=_Hostile())
    for r in (bare, run):
        for _ in range(2):
            r.steps()
            r.boundary()
        r.growth.close()
    assert all(torch.equal(a, b) for a, b in zip(_bits(bare), _bits(run), strict=True))
    assert (1, 2, 1) == tuple(run.growth.counters[f"plane_{name}"] for name in ("open", "advise", "close"))


def _advice(boundary: int, *decisions: Any) -> Advice:
    return Advice(boundary=boundary, decisions=decisions, explanation="", controller_state=b"x")


WRONG: dict[str, Decision] = {
    "unknown seed": decide(1, 999, Action.CULL),
    "negative seed": decide(1, -1, Action.CULL),
    "wrong boundary": decide(7, 0, Action.CULL),
    "cull of a dormant seed": decide(1, 0, Action.CULL),
    "advance of a dormant seed": decide(1, 0, Action.ADVANCE, to_stage=S.FOSSILIZED),
    "germinate without a kernel": decide(1, 0, Action.GERMINATE),
    "germinate without a kernel id": decide(1, 0, Action.GERMINATE, kernel=choice("")),
    "unlock of what is not locked": decide(1, 0, Action.UNLOCK),
    "seed that is no number": decide(1, "zero", Action.CULL),  # type: ignore[arg-type]
    "action that is none": Decision(
        decision_id="x",
        boundary=1,
        seed=0,
        action="explode",
        reason="",
        explanation="",  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_decisions_are_refused_and_told(name: str) -> None:
    """A decision that makes no sense changes nothing, is counted, and leaves an event with the reason."""
    run = Run()
    run.steps()
    before = _bits(run)
    report = run.boundary(WRONG[name])
    assert 1 == run.growth.counters["decisions_refused"]
    assert not report.applied[0].done
    assert "decision_refused" == run.plane.events[-1][0]
    assert not run.growth.life.runs
    assert all(torch.equal(a, b) for a, b in zip(before, _bits(run), strict=True))


def test_wrong_advice() -> None:
    """Advice for another boundary, something that is no advice, and decisions that are none are dropped and counted."""
    run = Run()
    run.steps()
    answers: list[Any] = [_advice(99), {"decisions": []}, _advice(3, "grow!"), _advice(4)]
    run.plane.policy = lambda _state: answers.pop(0)
    assert run.boundary().advice is None
    assert run.boundary().advice is None
    assert b"" == run.growth.controller_state
    assert () == run.boundary().applied
    assert (2, 1) == (run.growth.counters["advice_refused"], run.growth.counters["decisions_refused"])
    assert run.boundary().advice is not None
    assert b"x" == run.growth.controller_state


def test_unlawful_ways() -> None:
    """Commands against the table leave the seed where it stands: backwards, off the way, twice germinated."""
    run = Run()
    run.germinate(to=S.GRAFTING)
    for decision in (
        run.decide(Action.ADVANCE, to_stage=S.LOADING),
        run.decide(Action.ADVANCE, to_stage=S.CULLED),
        run.decide(Action.ADVANCE),
        run.decide(Action.GERMINATE, kernel=choice(KERNEL)),
        run.decide(Action.RELEASE),
    ):
        found = run.boundary(Decision(**{**_fields(decision), "boundary": run.growth.boundaries + 1})).applied[0]
        assert (False, S.GRAFTING) == (found.done, found.stage), decision
    # A cancel is for seeds that have not touched the host yet: nothing is undone half.
    found = run.boundary(run.decide(Action.CANCEL)).applied[0]
    assert not found.done


def _fields(decision: Decision) -> dict[str, Any]:
    return {name: getattr(decision, name) for name in Decision.__dataclass_fields__}


class _LateKernel(LocalPlane):
    """A kernel that takes its time, or is refused."""

    answers: list[Any]

    def kernel(self, kernel_id: str) -> object | None:
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_kernel_that_comes_late() -> None:
    """LOADING waits for the kernel without blocking, and goes on when it is there."""
    run = Run(plane=_LateKernel())
    run.plane.answers = []
    run.germinate()
    for _ in range(2):
        found = run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0]
        assert (S.LOADING, ["KERNEL_PENDING"]) == (found.stage, [r.code for r in found.refused])
    run.plane.answers = [TinyKernel(KERNEL, vector(8, 4))]
    assert S.GRAFTING is run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0].stage


def test_a_kernel_refused_on_the_way() -> None:
    """An advance that finds the kernel refused says why, not that a cancelled seed can not advance."""
    run = Run(plane=_LateKernel())
    run.plane.answers = []
    run.germinate()
    run.steps(1)
    # One look at the beginning of the boundary, one when the decision is carried out.
    run.plane.answers = [None, NotFound("revoked")]
    found = run.boundary(run.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0]
    assert (S.CANCELLED, ["revoked"]) == (found.stage, [str(r) for r in found.refused])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (NotFound("no kernel here"), "no kernel here"),
        (ZeroDivisionError("loader"), "ZeroDivisionError: loader"),
        (TinyKernel(KERNEL, vector(8, 5)), "expected signature vector:8->4:float32, found vector:8->5:float32"),
        ("a text", "expected a kernel, found str"),
    ],
)
def test_kernel_that_can_not_be_had(answer: Any, said: str) -> None:
    """A refused, failing or unfit kernel cancels the seed with the reason; the host was never touched."""
    run = Run(plane=_LateKernel())
    run.plane.answers = []
    run.steps()
    run.plane.answers = [answer]
    found = run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL))).applied[0]
    assert S.CANCELLED is run.growth.life.stage(run.site())
    assert said in str(found.refused[0])
    assert said in run.plane.reports[-1].reason
    assert Outcome.CANCELLED is run.plane.reports[-1].outcome
    assert "esper" not in "".join(run.model.state_dict())


class _Loud(TinyKernel):
    """Says that it is born silent, and is not."""

    def instantiate(self, device: torch.device | str = "cpu") -> TinyDelta:
        return TinyDelta(self.signature, "random")


class _Unbuildable(TinyKernel):
    def instantiate(self, device: torch.device | str = "cpu") -> TinyDelta:
        raise MemoryError("no room")


@pytest.mark.parametrize(("kind", "said"), [(_Loud, "zero output at birth"), (_Unbuildable, "no room")])
def test_kernel_that_lies(kind: type[TinyKernel], said: str) -> None:
    """A kernel that is not born as it says, or cannot be built, is taken out before it is attached."""
    run = Run()
    run.steps()
    run.plane.kernels[KERNEL] = kind(KERNEL, vector(8, 4))
    found = run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL), to_stage=S.GRAFTING)).applied[0]
    assert (S.CANCELLED, True) == (found.stage, said in str(found.refused[0]))
    assert "esper" not in "".join(run.model.state_dict())
    assert 1 == len(run.optimizer.param_groups)


def test_kernel_that_fails_in_the_forward() -> None:
    """The user's forward goes on with the host alone; the seed is culled at the next step and reported."""
    run = Run()
    run.steps()
    run.kernel(delta=BrokenDelta)
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL), to_stage=S.GRAFTING))
    BrokenDelta.broken = True
    try:
        run.steps(2)
    finally:
        BrokenDelta.broken = False
    assert S.EMBARGOED is run.growth.life.stage(run.site())
    assert "native code says no" in run.plane.reports[-1].reason
    assert 1 == run.growth.counters["kernel_failures"]


def test_causal_sites_want_causal_kernels() -> None:
    """A kernel whose positions see later ones is refused where they must not."""
    from dataclasses import replace

    run = Run()
    run.steps()
    site = run.growth.life.sites[run.site()]
    causal = replace(site, descriptor=replace(site.descriptor, causal=True))
    run.growth.life.sites = tuple(causal if s is site else s for s in run.growth.life.sites)
    run.kernel()
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL)))
    assert "causal" in run.plane.reports[-1].reason
    run.boundary()
    run.plane.kernels[OTHER] = TinyKernel(OTHER, vector(8, 4), causal=True)
    assert S.LOADING is run.boundary(run.decide(Action.GERMINATE, kernel=choice(OTHER))).applied[0].stage


def test_own_defects_do_not_stop_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception inside growth itself is counted, not raised."""
    run = Run()
    run.steps(2)
    monkeypatch.setattr(run.growth.life.layout, "tick", lambda: 1 / 0)
    run.steps(3)
    assert 3 == run.growth.counters["failed_step"]


def test_lbfgs_is_refused_at_g0() -> None:
    """An optimizer that takes no second group stays dormant with the reason."""
    run = Run(optimizer=torch.optim.LBFGS)
    model, x = run.model, run.train[0]
    model(x).sum().backward()
    run.growth.step(1.0)
    run.kernel()
    assert "LBFGS" in str(run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL))).applied[0].refused[0])


def test_a_model_whose_hooks_do_not_run() -> None:
    """Sampling ends after some misses, leaving no hook; without any forward no site is known, and nothing fails."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = wrap(model, optimizer, example_inputs=(torch.randn(4, 8),), sample_every=1)
    for _ in range(8):
        model.forward(torch.randn(4, 8)).sum().backward()
        growth.step(1.0)
    assert not model._forward_pre_hooks
    assert None is growth.observation.gradient_norm
    growth.close()
    blind = wrap(mlp(), optimizer)
    blind.step(1.0)
    assert () == blind.boundary({"loss": 1.0}).applied
    blind.close()


def test_slow_policy_state_is_plain() -> None:
    """What a policy is given can be kept: later boundaries do not change it."""
    run, kept = Run(), []
    run.plane.policy = lambda state: kept.append((state, repr(state)))
    for _ in range(3):
        run.steps()
        run.boundary()
    assert all(isinstance(state, BoundaryState) and text == repr(state) for state, text in kept)
