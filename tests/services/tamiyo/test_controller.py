"""Memory, determinism and resuming: equal hello, states and shelf give equal advice, wherever the run goes on."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.blueprints.catalogue import catalogue
from esper.kasmina.control import Action, SiteHealth, Stage
from esper.kasmina.convert import decision_to_proto
from esper.kasmina.signature import Layout
from esper.mesh.errors import InvalidInput
from esper.tamiyo.catalogue import Catalogue, KernelState
from esper.tamiyo.choice import blended, choose
from esper.tamiyo.controller import Conversation
from esper.tamiyo.domain import Judgement, Proposal, Shelf
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.memory import MAX_STATE_BYTES, VERSION, Memory, SiteMark, dump, load, observe
from esper.tamiyo.preparation import BlueprintFacts, PreparationRules, wishes
from esper.tamiyo.rules import Rules
from tests.services.tamiyo.tamiyo_worlds import (
    FLAT,
    NARROW,
    RULES,
    WIDE,
    gain,
    histories,
    kernel_id,
    kernels,
    make_hello,
    make_kernel,
    make_seed,
    make_site,
    make_situation,
    make_state,
    thorough,
    with_state,
)

SHELF = Shelf([make_kernel(1)])


def converse(hello, states, shelf):
    """All advice of one conversation."""
    talk = Conversation(hello, HeuristicPolicy(), RULES)
    return [talk.advise(state, shelf) for state in states]


@thorough
@given(history=histories(), found=kernels())
def test_equal_questions_have_equal_answers(history, found):
    """Two controllers that hear the same say the same, to the byte, in whatever order the library lists its kernels."""
    hello, states = history
    assert converse(hello, states, Shelf(found)) == converse(hello, states, Shelf(list(reversed(found))))


@thorough
@given(history=histories(), found=kernels(), data=st.data())
def test_another_controller_goes_on_where_the_first_stopped(history, found, data):
    """After any boundary, a fresh controller with the last controller_state gives the same advice as the old one."""
    hello, states = history
    shelf = Shelf(found)
    whole = converse(hello, states, shelf)
    at = data.draw(st.integers(1, len(states)))
    resumed = with_state(hello, whole[at - 1].controller_state)
    assert whole[at:] == converse(resumed, states[at:], shelf)


@thorough
@given(history=histories())
def test_every_advice_is_explained_and_bounded(history):
    """Also when nothing is done, there is a sentence with a number; the state stays small and is canonical JSON."""
    hello, states = history
    for state, advice in zip(states, converse(hello, states, SHELF), strict=True):
        assert state.boundary == advice.boundary
        assert advice.explanation.endswith((".", "…"))
        assert any(character.isdigit() for character in advice.explanation)
        assert len(advice.explanation) <= 512
        assert len(advice.controller_state) <= MAX_STATE_BYTES
        assert advice.controller_state == dump(load(advice.controller_state))
        assert all(decision.explanation and decision.reason for decision in advice.decisions)
        assert all(decision_to_proto(decision).ByteSize() < 200 for decision in advice.decisions)
        assert len({decision.decision_id for decision in advice.decisions}) == len(advice.decisions)


@pytest.mark.parametrize("blueprint", catalogue(), ids=lambda blueprint: blueprint.name)
@pytest.mark.parametrize(("saturation", "reason"), [(0.97, "SATURATED"), (0.3, "PLATEAU")])
def test_a_germination_says_why_in_less_than_200_bytes(blueprint, saturation, reason):
    """What settled it is in the decision, what else was weighed in the advice of the same boundary."""
    sites = [make_site(index, narrowest_width=4096, depth=0.5) for index in range(118)]
    sites += [
        make_site(118, name="encoder.layers.9", narrowest_width=4096, depth=0.5),
        make_site(119, name="encoder.layers.9.mlp", narrowest_width=1024, depth=0.5),
    ]
    kernel = make_kernel(2**200 + 1, blueprint_name=blueprint.name, zero_birth=False, parameters=123_456)
    hello = make_hello(sites, total_steps=1_000_000, decay_start=None, parameter_budget=10_000_000)
    states = [
        make_state(
            boundary,
            [make_seed(118, boundaries_in_stage=1)],
            sites=[SiteHealth(index=119, effective_rank=900.0, saturation=saturation)],
            validation_loss=1.2345 + 0.0123 * (boundary % 2) + 0.001234 * (boundary % 5),
        )
        for boundary in range(201, 206)
    ]
    rules = Rules(min_spacing_boundaries=1, warmup_boundaries=205)
    talk = Conversation(hello, HeuristicPolicy(), rules)
    advice = [talk.advise(state, Shelf([kernel])) for state in states][-1]
    (decision,) = (found for found in advice.decisions if found.action is Action.GERMINATE)
    assert reason == decision.reason
    assert decision_to_proto(decision).ByteSize() < 200
    assert "narrowest width 1024 (1 grown)" in decision.explanation
    for weighed in ("narrowest width 1024 (1 grown)", "encoder.layers.9.mlp", "123456 parameters", "boundaries left"):
        assert weighed in advice.explanation


def test_decision_ids_are_boundary_seed_number():
    """A replay gives the same id."""
    (advice,) = converse(make_hello(), [make_state(1)], SHELF)
    assert ["1.0.0"] == [decision.decision_id for decision in advice.decisions]


def test_a_refused_proposal_is_told_and_not_remembered():
    """A policy that wants what is unlawful changes nothing, and the run is told."""

    class Greedy:
        name, version = "greedy", "1"

        def decide(self, situation):
            said = Proposal(seed=0, action=Action.CULL, reason="WHIM", explanation=".", embargo_boundaries=1)
            return Judgement(proposals=(said,), explanation="0 reasons.")

    advice = Conversation(make_hello(), Greedy(), RULES).advise(make_state(1), SHELF)
    assert () == advice.decisions
    assert "shield refused cull of seed 0" in advice.explanation


def test_states_must_ascend_and_be_of_the_run():
    """The order of boundaries is the caller's promise."""
    talk = Conversation(make_hello(), HeuristicPolicy(), RULES)
    talk.advise(make_state(4), SHELF)
    with pytest.raises(InvalidInput, match="expected a boundary after 4, found 4") as caught:
        talk.advise(make_state(4), SHELF)
    assert "BOUNDARY_ORDER" == caught.value.reason
    with pytest.raises(InvalidInput, match="expected run digits-1, found 'other'"):
        talk.advise(make_state(5, run_id="other"), SHELF)


def test_two_sites_of_one_index_are_refused():
    """Indices name seeds: they must be unique."""
    with pytest.raises(InvalidInput, match="different indices"):
        Conversation(make_hello([make_site(0), make_site(0)]), HeuristicPolicy(), RULES)


@pytest.mark.parametrize("garbage", [b"\xff", b"[]", b"{}", b"[1, {}]", b'[1, {"boundary": "x"}]', b"7"])
def test_a_state_of_somebody_else_is_refused(garbage):
    """What this controller did not write is no memory."""
    with pytest.raises(InvalidInput, match="controller state"):
        Conversation(make_hello(controller_state=garbage), HeuristicPolicy(), RULES)


def test_a_state_of_another_version_is_set_aside():
    """A newer controller goes on with an older run, without its memory."""
    old = json.dumps([VERSION + 1, {}]).encode()
    assert converse(make_hello(), [make_state(1)], SHELF) == converse(
        make_hello(controller_state=old), [make_state(1)], SHELF
    )


# Memory


def _lived(*states, memory=None):
    memory = Memory() if memory is None else memory
    for state in states:
        memory = observe(memory, state, embargo=4)
    return memory


@pytest.mark.parametrize(
    ("state", "rests"),
    [
        (make_state(2), True),  # never shown: its germination was refused
        (make_state(2, [make_seed(0, Stage.EMBARGOED, failure="kernel failed: not finite")]), True),
        (make_state(2, [make_seed(0, Stage.CANCELLED, failure="native code says no")]), True),
        (make_state(2, [make_seed(0, Stage.ROLLED_BACK, failure="loss spike")]), False),
        (make_state(2, [make_seed(0, Stage.GRAFTING)]), False),
    ],
)
def test_a_kernel_that_a_runtime_refused_or_found_at_fault_rests(state, rests):
    """It is not tried at other sites, until its rest is over; states of controllers that knew none are read."""
    kernel = make_kernel()
    chosen = Proposal(
        seed=0,
        action=Action.GERMINATE,
        reason="X",
        explanation=".",
        kernel=blended(make_situation(), kernel),
    )
    before = observe(Memory(), make_state(1), embargo=4).noted(1, [chosen], {kernel.kernel_id: kernel}, None)
    memory = observe(before, state, embargo=4, rest=3)
    situation = make_situation(state, kernels=[kernel], memory=memory)
    assert rests == (choose(situation, make_site(1)) is None)
    assert memory == load(dump(memory))
    for boundary in (3, 4, 5):
        memory = observe(memory, make_state(boundary), embargo=4, rest=3)
    assert memory.chosen_again(kernel.kernel_id)
    old = json.loads(dump(Memory()))
    del old[1]["kernels"]
    assert Memory() == load(json.dumps(old).encode())


def _germinated(boundary=2):
    said = next(p for p in HeuristicPolicy().decide(_situation(boundary)).proposals if p.action is Action.GERMINATE)
    return Memory().noted(boundary, [said], SHELF.kernels, 1e6)


def _situation(boundary):
    from tests.services.tamiyo.tamiyo_worlds import make_situation

    return make_situation(make_state(boundary))


def test_a_germination_that_the_runtime_refused_counts_against_site_and_blueprint():
    """A seed that never showed up closes its site for a while: the same attempt would be refused again."""
    memory = _lived(make_state(3), memory=_germinated())
    assert (1, 7) == (memory.marks()[0].failures, memory.marks()[0].closed_until)
    assert (0, 1) == memory.outcomes("blueprint1")
    assert memory.life(0) is None


def test_a_kept_seed_speaks_for_its_blueprint_once():
    """FOSSILIZED is counted when it is first seen."""
    kept = make_seed(0, Stage.FOSSILIZED)
    memory = _lived(make_state(3, [make_seed(0)]), make_state(4, [kept]), make_state(5, [kept]), memory=_germinated())
    assert (1, 0) == memory.outcomes("blueprint1")


def test_a_culled_seed_closes_its_site_for_the_embargo_commanded():
    """The embargo runs from the boundary at which the seed was first seen out."""
    memory = _lived(make_state(3, [make_seed(0)]), memory=_germinated())
    cull = Proposal(seed=0, action=Action.CULL, reason="NO_GAIN", explanation=".", embargo_boundaries=6)
    out = make_seed(0, Stage.EMBARGOED)
    memory = memory.noted(3, [cull], SHELF.kernels, None)
    memory = _lived(make_state(4, [out]), make_state(5, [out]), memory=memory)
    assert (1, 10) == (memory.marks()[0].failures, memory.marks()[0].closed_until)
    assert 0 == memory.last_rollback
    assert (0, 1) == memory.outcomes("blueprint1")
    assert memory.life(0).out_since == 4
    assert _lived(make_state(6), memory=memory).life(0) is None


def test_a_failure_of_the_runtime_is_a_rollback():
    """A seed that the runtime took out by itself starts the cooldown."""
    hurt = make_seed(0, Stage.EMBARGOED, failure="loss spike")
    assert 4 == _lived(make_state(3, [make_seed(0)]), make_state(4, [hurt]), memory=_germinated()).last_rollback


def test_a_kernel_that_could_not_be_had_is_no_rollback():
    """A seed that was cancelled before it touched the host counts as a failure, without a cooldown."""
    gone = make_seed(0, Stage.CANCELLED, failure="kernel refused")
    memory = _lived(make_state(3, [make_seed(0)]), make_state(4, [gone]), memory=_germinated())
    assert (0, 1) == (memory.last_rollback, memory.marks()[0].failures)


def test_a_seed_of_unknown_origin_is_followed():
    """A run that was grown by somebody else, or whose memory was lost, is taken as it is."""
    memory = _lived(make_state(3, [make_seed(1)]))
    assert memory.life(1).seen
    assert memory.life(1).flops_before is None


def test_statistics_are_kept_until_measured_again():
    """Each boundary measures some sites; the others keep what was known. What is not finite is not known."""
    memory = _lived(make_state(2, sites=()), memory=Memory(sites=(SiteMark(1, effective_rank=3.0, saturation=0.5),)))
    assert 3.0 == memory.marks()[1].effective_rank
    assert () == _lived(make_state(2, validation_loss=float("nan"))).losses


def test_history_is_bounded():
    """A run of a thousand boundaries carries 64 losses."""
    assert 64 == len(_lived(*(make_state(b) for b in range(1, 1001))).losses)


def test_the_largest_run_fits_the_contract():
    """4,096 sites with statistics stay within the 1 MiB of controller_state."""
    sites = tuple(SiteMark(i, 12.34, 0.7712, 2, 100_000, 0.003456) for i in range(4096))
    assert len(dump(Memory(sites=sites))) < MAX_STATE_BYTES // 4


def test_a_state_from_before_there_were_scores_is_read():
    """A run that is resumed under a newer controller goes on; the score is missing until it is measured."""
    memory = load(dump(Memory(sites=(SiteMark(1, 3.0, 0.5, 1, 7),))).replace(b",7,null]", b",7]"))
    assert (SiteMark(1, 3.0, 0.5, 1, 7),) == memory.sites
    seen = _lived(make_state(2, sites=(SiteHealth(index=1, bottleneck=0.25),)), memory=memory)
    assert 0.25 == seen.marks()[1].bottleneck
    assert seen == load(dump(seen))


# Catalogue and preparation


def _blueprint(number, name, layouts=(Layout.IMAGE,), tags=("conv",), *, causal=False):
    return BlueprintFacts(
        blueprint_id=kernel_id(1000 + number), name=name, layouts=frozenset(layouts), causal=causal, tags=tags
    )


def test_the_catalogue_gives_only_validated_kernels_with_the_tags_of_their_blueprints():
    """Staged and closed kernels are known and never chosen."""
    catalogue = Catalogue(limit=10)
    catalogue.put_blueprint(_blueprint(1, "one", tags=("adapter",)), active=True)
    catalogue.put_kernel(make_kernel(1), KernelState.VALIDATED)
    catalogue.put_kernel(make_kernel(2), KernelState.STAGED)
    catalogue.put_kernel(make_kernel(3, signature=WIDE), KernelState.VALIDATED)
    assert {kernel_id(1)} == set(catalogue.shelf([NARROW]).kernels)
    assert ("adapter",) == catalogue.shelf([NARROW]).kernels[kernel_id(1)].tags
    catalogue.put_kernel(make_kernel(1), KernelState.CLOSED)
    assert {} == catalogue.shelf([NARROW]).kernels
    assert KernelState.CLOSED is catalogue.state_of(kernel_id(1))


def test_the_catalogue_is_bounded_and_can_be_cleared():
    """The oldest is forgotten first; every change has a number."""
    catalogue = Catalogue(limit=2)
    for number in (1, 2, 3):
        catalogue.put_kernel(make_kernel(number), KernelState.VALIDATED)
    assert {kernel_id(2), kernel_id(3)} == set(catalogue.shelf([NARROW]).kernels)
    assert catalogue.state_of(kernel_id(1)) is None
    before = catalogue.revision
    catalogue.put_blueprint(_blueprint(1, "one"), active=True)
    catalogue.put_blueprint(_blueprint(1, "one"), active=False)
    assert () == catalogue.blueprints
    catalogue.clear()
    assert catalogue.revision > before
    assert catalogue.state_of(kernel_id(2)) is None


BLUEPRINTS = [
    _blueprint(1, "wide_residual"),
    _blueprint(2, "bottleneck_mlp", (Layout.IMAGE, Layout.VECTOR), ("adapter", "mlp"), causal=True),
    _blueprint(3, "sequence_conv", (Layout.SEQUENCE,), ("conv", "separable")),
]


def test_builds_are_asked_for_the_narrowest_first():
    """Awaited portable builds first, then the others, then standard ones for the run's own machine."""
    hello = make_hello(
        [
            make_site(0, signature=WIDE, narrowest_width=16),
            make_site(1),
            make_site(2, signature=FLAT, narrowest_width=10),
        ]
    )
    rules = PreparationRules(prepare_signatures=1, prepare_blueprints=1, standard_builds=1)
    found = wishes(hello, BLUEPRINTS, rules)
    assert [("portable", NARROW, True), ("portable", NARROW, False)] == [
        (wish.tier, wish.signature, wish.awaited) for wish in found[:2]
    ]
    assert 5 == sum(wish.tier == "portable" for wish in found)
    (standard,) = [wish for wish in found if wish.tier == "standard"]
    assert (NARROW, hello.target, False) == (standard.signature, standard.target, standard.awaited)
    assert found[0].priority > found[1].priority > standard.priority


def test_only_what_may_grow_is_built():
    """Allowed blueprints, the site's layout, and causal ones at causal sites; within the bounds."""
    causal = make_hello([make_site(0, causal=True)])
    assert {kernel_id(1002)} == {wish.blueprint_id for wish in wishes(causal, BLUEPRINTS, PreparationRules())}
    picky = make_hello(blueprints=("wide_residual",))
    assert {kernel_id(1001)} == {wish.blueprint_id for wish in wishes(picky, BLUEPRINTS, PreparationRules())}
    few = PreparationRules(tiers=("portable",), portable_builds=1)
    assert 1 == len(wishes(make_hello(), BLUEPRINTS, few))


def test_builds_are_asked_for_once():
    """Sites of one signature share their kernels."""
    found = wishes(make_hello(), BLUEPRINTS, PreparationRules())
    keys = [(wish.blueprint_id, wish.signature, wish.tier) for wish in found]
    assert len(set(keys)) == len(keys)


def test_a_whole_life_is_decided_in_order():
    """Germination, advance, probation, kept: one conversation, four decisions, each with its own id."""
    kept = gain(0.05)
    states = [
        make_state(1),
        make_state(2, [make_seed(0, Stage.LOADING)]),
        make_state(3, [make_seed(0, Stage.GRAFTING)]),
        make_state(4, [make_seed(0, boundaries_in_stage=1)]),
        make_state(5, [make_seed(0, boundaries_in_stage=2, counterfactual=kept)]),
        make_state(6, [make_seed(0, Stage.FOSSILIZED)]),
    ]
    hello = make_hello(max_active_seeds=1)
    advice = converse(hello, states, SHELF)
    first = [[(d.action, d.to_stage) for d in a.decisions if d.seed == 0] for a in advice]
    assert [
        [(Action.GERMINATE, None)],
        [(Action.ADVANCE, Stage.FINE_TUNING)],
        [(Action.ADVANCE, Stage.FINE_TUNING)],
        [],
        [(Action.ADVANCE, Stage.FOSSILIZED)],
        [],
    ] == first
    assert 1 in {d.seed for d in advice[5].decisions}
    assert replace(hello, controller_state=b"") == hello
