"""Checkpoints: a resumed run is the run that was never stopped."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

import pytest
import torch

from esper.kasmina.control import Action, BlendStrategy, Stage
from esper.kasmina.local import LocalPlane
from esper.mesh.errors import InvalidInput, NotFound
from tests.kasmina.hosts import choice, small_cnn
from tests.kasmina.loops import KERNEL, OTHER, Run

S = Stage


def _save(run: Run) -> bytes:
    """As a trainer would: everything in one file."""
    buffer = io.BytesIO()
    growth = run.growth.state_dict()
    torch.save(
        {
            "growth": growth,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
        },
        buffer,
    )
    return buffer.getvalue()


def _resume(data: bytes, kernels: Any = None, plane: Any = None, **options: Any) -> Run:
    """In the documented order, into fresh objects."""
    run = Run(plane=plane, **options)
    state = torch.load(io.BytesIO(data), weights_only=True)
    run.growth.load_state_dict(state["growth"], kernels=kernels)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    return run


def _script(run: Run, birth: str, blend: BlendStrategy, first: int, last: int, pause: int = -1) -> bytes:
    """Boundaries `first` to `last` of a run with fixed decisions; stops in the middle of the one after `pause`."""
    if not run.plane.kernels and run.growth.sites:
        run.kernel(birth)
    for boundary in range(first, last + 1):
        run.steps(10)
        if boundary == pause:
            return _save(run)
        run.steps(6)
        _decide(run, birth, blend, boundary)
    return b""


def _decide(run: Run, birth: str, blend: BlendStrategy, boundary: int) -> None:
    if boundary == 2:
        run.kernel(birth)
        given = choice(KERNEL, blend=blend, steps=24)
        run.boundary(run.decide(Action.GERMINATE, kernel=given))
    elif boundary > 2:
        run.boundary(run.decide(Action.ADVANCE, to_stage=S.FOSSILIZED))
    else:
        run.boundary()


CASES = [("zero", BlendStrategy.IMMEDIATE), ("random", BlendStrategy.PERFORMANCE), ("random", BlendStrategy.DRIFT)]


OPTIONS = {"isolation_learning_rate": 1e-2, "merge_steps": 30}


@cache
def _whole(birth: str, blend: BlendStrategy) -> Run:
    run = Run(**OPTIONS)
    _script(run, birth, blend, 1, 10)
    return run


@pytest.mark.parametrize("pause", [1, 2, 3, 4, 5, 7, 9])
@pytest.mark.parametrize(("birth", "blend"), CASES)
def test_resume_is_exact(birth: str, blend: BlendStrategy, pause: int) -> None:
    """Killed in the middle of any epoch and resumed, a run with the same decisions ends with the same bits."""
    whole, stopped = _whole(birth, blend), Run(**OPTIONS)
    data = _script(stopped, birth, blend, 1, 10, pause)
    resumed = _resume(data, kernels=stopped.plane.kernels, plane=LocalPlane(stopped.plane.kernels), **OPTIONS)
    # The part of the epoch that was done is done; the rest of its batches comes.
    _rest(resumed)
    _decide(resumed, birth, blend, pause)
    _script(resumed, birth, blend, pause + 1, 10)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert list(a) == list(b)
    assert {} == {k: (a[k] - b[k]).abs().max() for k in a if not torch.equal(a[k], b[k])}
    assert whole.growth.life.layout.document() == resumed.growth.life.layout.document()
    assert json.dumps(whole.growth.lineage()) == json.dumps(resumed.growth.lineage())
    left, right = whole.growth.state_dict(), resumed.growth.state_dict()
    assert left["watch"]["detector"] == right["watch"]["detector"]
    assert left["watch"]["windows"] == right["watch"]["windows"]
    assert left["groups"] == right["groups"]
    assert [g["lr"] for g in whole.optimizer.param_groups] == [g["lr"] for g in resumed.optimizer.param_groups]


def _rest(run: Run) -> None:
    # `steps` always begins at the first batch; an epoch that is cut after 10 of them goes on with six from there.
    run.steps(6)


def _late_kernel(run: Run, boundary: int) -> None:
    """Two seeds at one module: the first to germinate is the last to get its kernel."""
    series, spare = run.site("head", "series"), run.site()
    if boundary == 1:
        run.boundary(run.decide(Action.GERMINATE, spare, kernel=choice(KERNEL)))
    elif boundary == 2:
        run.kernel("zero", "head", "series", id=OTHER)
        given = choice(OTHER, scale=1.0)
        run.boundary(run.decide(Action.GERMINATE, series, kernel=given, to_stage=S.GRAFTING))
    else:
        run.kernel("zero")
        run.boundary(run.decide(Action.ADVANCE, spare, to_stage=S.GRAFTING))


def test_resume_keeps_the_order_of_the_hooks() -> None:
    """Seeds at one module run in the order in which they were attached, before and after a resumption."""
    whole, stopped = Run(**OPTIONS), Run(**OPTIONS)
    for run in (whole, stopped):
        for boundary in range(1, 4):
            run.steps()
            _late_kernel(run, boundary)
        run.steps()
    series, spare = whole.site("head", "series"), whole.site()
    assert {S.GRAFTING} == {whole.growth.life.stage(seed) for seed in (series, spare)}
    resumed = _resume(_save(stopped), kernels=stopped.plane.kernels, **OPTIONS)
    assert [series, spare] == list(resumed.growth.life.runs)
    for run in (whole, resumed):
        run.steps()
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert list(a) == list(b)
    assert [] == [k for k in a if not torch.equal(a[k], b[k])]


def test_rollback_after_resume() -> None:
    """The snapshot travels: a spike after the resumption restores the host as of the graft."""
    run = Run(spike_patience=1)
    run.steps(48)
    run.germinate(to=S.GRAFTING)
    at_graft = {k: v.clone() for k, v in run.model.state_dict().items() if "esper" not in k}
    run.steps(4)
    resumed = _resume(_save(run), kernels=run.plane.kernels, spike_patience=1)
    resumed.tell(float("nan"))
    assert S.ROLLED_BACK is resumed.growth.life.stage(resumed.site())
    assert all(torch.equal(v, at_graft[k]) for k, v in resumed.model.state_dict().items())


def test_locks_outlive_the_checkpoint() -> None:
    """Going back to a checkpoint from before the graft does not forget that it was rolled back."""
    run = Run(spike_patience=1)
    run.steps(32)
    data = _save(run)
    run.germinate(to=S.GRAFTING)
    run.tell(float("nan"))
    locks = run.growth.locks()
    assert {run.site(): 10} == locks
    run.growth.load_state_dict(torch.load(io.BytesIO(data), weights_only=True)["growth"])
    assert S.ROLLED_BACK is run.growth.life.stage(run.site())
    fresh = Run()
    fresh.growth.load_state_dict(torch.load(io.BytesIO(data), weights_only=True)["growth"], locks=locks)
    assert (S.ROLLED_BACK, locks) == (fresh.growth.life.stage(run.site()), fresh.growth.locks())
    refused = fresh.boundary(fresh.decide(Action.UNLOCK)).applied[0]
    assert "TOO_SOON" == refused.refused[0].code
    assert S.DORMANT is fresh.boundary(fresh.decide(Action.UNLOCK, reason="OPERATOR")).applied[0].stage


def test_going_back_takes_later_growth_out() -> None:
    """Loading an earlier state into a grown session removes what grew since."""
    run = Run()
    run.steps()
    data = torch.load(io.BytesIO(_save(run)), weights_only=True)
    run.germinate(to=S.GRAFTING)
    run.growth.load_state_dict(data["growth"])
    run.model.load_state_dict(data["model"])
    run.optimizer.load_state_dict(data["optimizer"])
    assert "esper" not in "".join(run.model.state_dict())
    run.steps()
    assert S.GRAFTING is run.germinate(to=S.GRAFTING).applied[0].stage


def test_kernels_from_the_plane_or_not_at_all() -> None:
    """Kernels in use are asked of the plane; without them the resumption is refused, and the model is untouched."""
    run = Run()
    run.germinate(to=S.GRAFTING)
    data = _save(run)
    resumed = _resume(data, plane=LocalPlane(run.plane.kernels))
    assert S.GRAFTING is resumed.growth.life.stage(run.site())
    by_function = _resume(data, kernels=run.plane.kernels.get)
    assert S.GRAFTING is by_function.growth.life.stage(run.site())
    bare = Run(kernel_timeout_s=0.05)
    with pytest.raises(NotFound, match=r"in use at first..head: expected it"):
        bare.growth.load_state_dict(torch.load(io.BytesIO(data), weights_only=True)["growth"])
    assert "esper" not in "".join(bare.model.state_dict())
    bare.steps()


class _Refusing(LocalPlane):
    def kernel(self, kernel_id: str) -> object | None:
        raise NotFound("revoked")


def test_refused_kernel_ends_the_wait() -> None:
    """A kernel that the plane refuses is told at once."""
    run = Run()
    run.germinate(to=S.GRAFTING)
    with pytest.raises(NotFound, match="revoked"):
        _resume(_save(run), plane=_Refusing())


def test_loading_seed_asks_again() -> None:
    """A seed that was waiting for its kernel waits again, and gets it."""
    run = Run()
    run.steps()
    run.plane.kernels.clear()
    run.boundary(run.decide(Action.GERMINATE, kernel=choice(KERNEL)))
    resumed = _resume(_save(run))
    assert [KERNEL] == resumed.plane.requested
    resumed.kernel()
    assert S.GRAFTING is resumed.boundary(resumed.decide(Action.ADVANCE, to_stage=S.GRAFTING)).applied[0].stage


def test_before_the_first_forward_and_of_another_model() -> None:
    """A state without sites resumes to one that still looks; a state of another model or format is refused."""
    run = Run()
    resumed = _resume(_save(run))
    assert () == resumed.growth.sites
    resumed.steps(1)
    assert resumed.growth.sites
    state = resumed.growth.state_dict()
    with pytest.raises(InvalidInput, match="found none of its modules"):
        Run(make=small_cnn).growth.load_state_dict(state)
    with pytest.raises(InvalidInput, match="expected format 2, found 1"):
        run.growth.load_state_dict({**state, "format": 1})
