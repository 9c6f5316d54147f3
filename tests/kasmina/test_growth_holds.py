"""The control plane is told which kernels seeds use, for as long as they do."""

from __future__ import annotations

from esper.kasmina.control import Action, Stage
from tests.kasmina.hosts import TinyKernel, vector
from tests.kasmina.loops import KERNEL, Run
from tests.kasmina.test_growth_faults import _LateKernel


def test_a_kernel_is_held_from_its_request_to_the_end_of_the_life() -> None:
    """While it is waited for, while it trains, and not after the cull."""
    run = Run(plane=_LateKernel())
    run.plane.answers = []
    run.germinate()
    assert (KERNEL,) == run.plane.held
    run.plane.answers = [TinyKernel(KERNEL, vector(8, 4))]
    run.boundary(run.decide(Action.ADVANCE, to_stage=Stage.GRAFTING))
    assert (KERNEL,) == run.plane.held
    run.boundary(run.decide(Action.CULL, embargo_boundaries=1))
    assert () == run.plane.held


def test_a_cancelled_life_lets_go() -> None:
    """Also when its kernel never came."""
    run = Run(plane=_LateKernel())
    run.plane.answers = []
    run.germinate()
    run.boundary(run.decide(Action.CANCEL))
    assert () == run.plane.held


def test_a_fossil_is_held_and_so_it_is_after_a_restart() -> None:
    """It is the host's own from now on and runs in every forward; a resumed run holds it before its first boundary."""
    run = Run(probation_boundaries=1, probation_steps=1)
    run.germinate(to=Stage.GRAFTING)
    assert Stage.FOSSILIZED is run.advance(Stage.FOSSILIZED)
    assert (KERNEL,) == run.plane.held
    again = Run()
    again.growth.load_state_dict(run.growth.state_dict(), kernels=run.plane.kernels)
    assert (KERNEL,) == again.plane.held
