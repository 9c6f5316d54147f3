"""The seed's transition table and its gates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina import seeds
from esper.kasmina.control import Counterfactual, Stage
from esper.mesh.errors import Conflict

S = Stage
FORWARD = [
    (S.DORMANT, S.GERMINATED),
    (S.GERMINATED, S.LOADING),
    (S.LOADING, S.TRAINING),
    (S.TRAINING, S.GRAFTING),
    (S.GRAFTING, S.STABILIZING),
    (S.STABILIZING, S.EVALUATING),
    (S.EVALUATING, S.FINE_TUNING),
    (S.FINE_TUNING, S.FOSSILIZED),
]
CULLS = [(stage, S.CULLED) for stage in (S.LOADING, S.TRAINING, S.GRAFTING, S.STABILIZING, S.EVALUATING, S.FINE_TUNING)]
CANCELS = [(stage, S.CANCELLED) for stage in (S.GERMINATED, S.LOADING, S.TRAINING)]
RESETS = [
    (S.CULLED, S.EMBARGOED),
    (S.EMBARGOED, S.RESETTING),
    (S.CANCELLED, S.RESETTING),
    (S.RESETTING, S.DORMANT),
    (S.ROLLED_BACK, S.DORMANT),
]
LOCKS = [
    (stage, S.ROLLED_BACK)
    for stage in (
        S.DORMANT,
        S.GERMINATED,
        S.LOADING,
        S.TRAINING,
        S.GRAFTING,
        S.STABILIZING,
        S.EVALUATING,
        S.FINE_TUNING,
    )
]
LAWFUL = {*FORWARD, *CULLS, *CANCELS, *RESETS, *LOCKS}


@pytest.mark.parametrize("before", list(Stage))
@pytest.mark.parametrize("after", list(Stage))
def test_every_pair(before: Stage, after: Stage) -> None:
    """Each of the 196 pairs is lawful exactly where DESIGN says so, and refused with the lawful ways otherwise."""
    assert ((before, after) in LAWFUL) == seeds.lawful(before, after)
    if (before, after) in LAWFUL:
        seeds.check(before, after)
    else:
        with pytest.raises(Conflict, match=f"expected from {before.name} one of .*found {after.name}"):
            seeds.check(before, after)


@given(st.lists(st.sampled_from(list(Stage)), max_size=60))
def test_random_walks(wishes: list[Stage]) -> None:
    """Whatever is wished for, a seed never leaves FOSSILIZED and never blends before it passed TRAINING."""
    stage, trained = Stage.DORMANT, False
    for wish in wishes:
        if not seeds.lawful(stage, wish):
            continue
        assert stage is not Stage.FOSSILIZED
        stage = wish
        trained = (trained or stage is Stage.TRAINING) and stage is not Stage.DORMANT
        if seeds.execution(stage) is seeds.Execution.BLENDED:
            assert trained


@given(st.sampled_from(list(Stage)))
def test_every_stage_but_fossilized_finds_home(stage: Stage) -> None:
    """From each stage there is a lawful way to DORMANT, except from FOSSILIZED, which is for good."""
    reached, fresh = {stage}, {stage}
    while fresh:
        fresh = {after for before in fresh for after in Stage if seeds.lawful(before, after)} - reached
        reached |= fresh
    assert (stage is not Stage.FOSSILIZED) == (Stage.DORMANT in reached)


def test_derived_from_stage() -> None:
    """Execution, trainability and the owner of alpha follow from the stage alone."""
    assert [S.TRAINING] == [s for s in Stage if seeds.execution(s) is seeds.Execution.ISOLATED]
    blended = [s for s in Stage if seeds.execution(s) is seeds.Execution.BLENDED]
    assert [S.GRAFTING, S.STABILIZING, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED] == blended
    assert {S.TRAINING, S.GRAFTING, S.FINE_TUNING, S.FOSSILIZED} == {s for s in Stage if seeds.trainable(s)}
    assert [S.GRAFTING] == [s for s in Stage if seeds.alpha_owner(s) is seeds.AlphaOwner.BLEND]
    assert set(blended) - {S.GRAFTING} == {s for s in Stage if seeds.alpha_owner(s) is seeds.AlphaOwner.ONE}


def test_forward_path() -> None:
    """A path lists the stages to enter; a target behind or off the forward way is refused."""
    assert (S.TRAINING, S.GRAFTING) == seeds.forward_path(S.LOADING, S.GRAFTING)
    for target in (S.LOADING, S.GERMINATED, S.CULLED):
        with pytest.raises(Conflict, match="ahead of LOADING"):
            seeds.forward_path(S.LOADING, target)


def _codes(reasons: list[seeds.Reason]) -> list[str]:
    return [reason.code for reason in reasons]


def _sanity(**change: object) -> seeds.SanityFacts:
    facts = {
        "kernel_named": True,
        "validated": True,
        "unfit": (),
        "parameters_left": 100,
        "kernel_parameters": 50,
        "living": 0,
        "max_living": 1,
    }
    return seeds.SanityFacts(**(facts | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"kernel_parameters": None}, None),
        ({"kernel_named": False}, "no kernel"),
        ({"validated": False}, "VALIDATED"),
        ({"unfit": ("wrong width",)}, "wrong width"),
        ({"kernel_parameters": 101}, "budget"),
        ({"parameters_left": 0, "kernel_parameters": None}, "budget"),
        ({"living": 1}, "fewer than 1 living"),
    ],
)
def test_g0(change: dict[str, object], said: str | None) -> None:
    """G0 opens for a known, fitting, affordable kernel and names what is missing otherwise."""
    reasons = seeds.g0_sanity(_sanity(**change))
    assert (said is None) == (not reasons)
    if said:
        assert said in str(reasons[0])


def _learning(**change: object) -> seeds.LearningFacts:
    facts = {
        "finite": True,
        "gradient_norm": 1.0,
        "gradient_limit": 10.0,
        "needs_isolation": True,
        "isolation_gain": 0.1,
        "held_out": 3,
        "min_held_out": 3,
    }
    return seeds.LearningFacts(**(facts | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, []),
        ({"finite": False}, ["NOT_FINITE"]),
        ({"gradient_norm": 0.0}, ["GRADIENT"]),
        ({"gradient_norm": None}, ["GRADIENT"]),
        ({"gradient_norm": math.nan}, ["GRADIENT"]),
        ({"gradient_norm": 11.0}, ["GRADIENT"]),
        ({"held_out": 2}, ["TOO_SOON"]),
        ({"isolation_gain": None}, ["TOO_SOON"]),
        ({"isolation_gain": 0.0}, ["NOT_LEARNING"]),
        ({"isolation_gain": math.nan}, ["NOT_LEARNING"]),
        ({"needs_isolation": False, "isolation_gain": None, "held_out": 0}, []),
    ],
)
def test_g1(change: dict[str, object], codes: list[str]) -> None:
    """G1 wants finite values, a living bounded gradient and a gain on held-out activations, where isolation is due."""
    assert codes == _codes(seeds.g1_learning(_learning(**change)))


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, []),
        ({"ramp_complete": False}, ["RAMP"]),
        ({"high": 1}, ["SPIKE"]),
        ({"losses": 0}, ["NOT_MEASURED"]),
        ({"drift": None}, ["NOT_MEASURED"]),
        ({"drift": 2.5}, ["DRIFT"]),
        ({"drift": math.nan}, ["DRIFT"]),
        ({"steps": 4}, ["TOO_SOON"]),
    ],
)
def test_g2(change: dict[str, object], codes: list[str]) -> None:
    """G2 wants a complete ramp, losses that were seen and are not high, a measured drift inside the limit."""
    facts = {
        "ramp_complete": True,
        "steps": 5,
        "min_steps": 5,
        "losses": 5,
        "high": 0,
        "drift": 0.5,
        "drift_limit": 2.0,
    } | change
    assert codes == _codes(seeds.g2_stability(seeds.GraftFacts(**facts)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, []),
        ({"groups_per_parameter": (1, 0)}, ["INTERFACE"]),
        ({"groups_per_parameter": (2, 1)}, ["INTERFACE"]),
        ({"changed": ("weight",)}, ["INTERFACE"]),
        ({"steps": 1}, ["TOO_SOON"]),
    ],
)
def test_g3(change: dict[str, object], codes: list[str]) -> None:
    """G3 wants each parameter in exactly one group, unchanged forms and settled statistics."""
    facts = {"groups_per_parameter": (1, 1), "changed": (), "steps": 2, "settle_steps": 2} | change
    assert codes == _codes(seeds.g3_interface(seeds.InterfaceFacts(**facts)))  # type: ignore[arg-type]


def _measured(bound: float) -> Counterfactual:
    return Counterfactual(mean_gain=bound + 0.1, lower_bound=bound, confidence=0.95, batches=8)


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, []),
        ({"boundaries": 1}, ["PROBATION"]),
        ({"steps": 9}, ["PROBATION"]),
        ({"counterfactual": None}, ["NOT_MEASURED"]),
        ({"counterfactual": _measured(0.01)}, ["NO_GAIN"]),
        ({"counterfactual": _measured(math.nan)}, ["NO_GAIN"]),
    ],
)
def test_g4(change: dict[str, object], codes: list[str]) -> None:
    """G4 wants a full probation and a lower bound above the price; what was not measured does not count as a gain."""
    facts = {
        "counterfactual": _measured(0.02),
        "price": 0.01,
        "boundaries": 2,
        "min_boundaries": 2,
        "steps": 10,
        "min_steps": 10,
    } | change
    assert codes == _codes(seeds.g4_impact(seeds.ImpactFacts(**facts)))  # type: ignore[arg-type]


def test_g5() -> None:
    """G5 names everything that is left of a seed."""
    assert [] == seeds.g5_reset(seeds.ResetFacts(parameters=0, optimizer_entries=0, hooks=0, cache_entries=0))
    reasons = seeds.g5_reset(seeds.ResetFacts(parameters=1, optimizer_entries=2, hooks=3, cache_entries=4))
    assert ["parameters", "optimizer entries", "hooks", "cache entries"] == [
        str(reason).removeprefix("expected no ").partition(" left")[0] for reason in reasons
    ]
