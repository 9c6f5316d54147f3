"""Whatever a policy proposes, nothing unlawful passes; what is lawful does."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.control import Action, BlendStrategy, KernelChoice, SiteHealth, SiteKind, Stage, living
from esper.kasmina.seeds import FORWARD, LIVING, lawful
from esper.tamiyo.domain import Proposal, Shelf, Situation
from esper.tamiyo.memory import Memory, SiteMark, observe
from esper.tamiyo.pricing import price_of
from esper.tamiyo.rules import Rules
from esper.tamiyo.shield import MAX_DECISIONS, growable, review
from tests.services.tamiyo.tamiyo_worlds import (
    FLAT,
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
)


def choice(number=1, **changes):
    """Kernel 1, blended in at once."""
    values = {
        "kernel_id": kernel_id(number),
        "blueprint_name": f"blueprint{number}",
        "blend": BlendStrategy.IMMEDIATE,
        "blend_steps": 0,
        "learning_rate_scale": 3.0,
    }
    return KernelChoice(**(values | changes))


def germinate(seed=0, number=1, **changes):
    """A proposal to germinate kernel 1 at site 0."""
    return Proposal(
        seed=seed, action=Action.GERMINATE, reason="SATURATED", explanation=".", kernel=choice(number, **changes)
    )


def proposal(action, seed=0, **changes):
    """Any other proposal."""
    return Proposal(**({"seed": seed, "action": action, "reason": "TEST", "explanation": "."} | changes))


@st.composite
def proposals(draw):
    """Anything that a policy, even a mad one, could say."""
    action = draw(st.sampled_from(Action))
    kernel = None
    if draw(st.integers(0, 3)):
        kernel = choice(
            draw(st.integers(1, 7)),
            blend=draw(st.sampled_from(BlendStrategy)),
            learning_rate_scale=draw(st.sampled_from([3.0, 1.0, 0.0, -1.0, float("nan"), 1e9])),
        )
    return Proposal(
        seed=draw(st.integers(-1, 7)),
        action=action,
        reason="TEST",
        explanation=".",
        to_stage=draw(st.none() | st.sampled_from(Stage)),
        kernel=kernel,
        embargo_boundaries=draw(st.integers(-1, 5)),
    )


def _assert_lawful(situation, admitted):
    """The law, written out independently of the shield."""
    seeds = {seed.index: seed for seed in situation.state.seeds}
    assert len({p.seed for p in admitted}) == len(admitted) <= MAX_DECISIONS
    born = [p for p in admitted if p.action is Action.GERMINATE]
    assert len(born) <= 1
    for p in admitted:
        stage = seeds[p.seed].stage if p.seed in seeds else Stage.DORMANT
        if p.action is Action.GERMINATE:
            _assert_may_germinate(situation, p, stage)
        elif p.action is Action.ADVANCE:
            assert stage in LIVING
            assert seeds[p.seed].ready
            assert FORWARD.index(p.to_stage) > FORWARD.index(stage)
            if p.to_stage is Stage.FOSSILIZED:
                assert stage is Stage.FINE_TUNING
                assert seeds[p.seed].boundaries_in_stage >= situation.probation
                assert seeds[p.seed].counterfactual.lower_bound > price_of(situation, seeds[p.seed]).loss >= 0
        elif p.action is Action.CULL:
            assert lawful(stage, Stage.CULLED)
            assert p.embargo_boundaries >= 1
        elif p.action is Action.CANCEL:
            assert lawful(stage, Stage.CANCELLED)
        elif p.action is Action.RELEASE:
            assert stage is Stage.EMBARGOED
        else:
            assert stage is Stage.ROLLED_BACK


def _assert_may_germinate(situation, p, stage):
    hello, state, memory = situation.hello, situation.state, situation.memory
    site = {s.index: s for s in hello.sites}[p.seed]
    kernel = situation.shelf.kernels[p.kernel.kernel_id]
    assert stage is Stage.DORMANT
    assert kernel.signature == site.signature
    assert kernel.portable or kernel.target == hello.target
    assert kernel.causal or not site.causal
    assert not hello.blueprints or kernel.blueprint_name in hello.blueprints
    assert state.parameters_added + kernel.parameters <= hello.parameter_budget
    assert living(state.seeds) < hello.max_active_seeds
    assert kernel.zero_birth or p.kernel.blend is not BlendStrategy.IMMEDIATE
    assert 0 < p.kernel.learning_rate_scale <= 100
    mark = memory.marks().get(p.seed)
    assert mark is None or mark.closed_until <= state.boundary
    if memory.last_rollback:
        assert state.boundary - memory.last_rollback >= situation.rules.rollback_cooldown
    if hello.total_steps is not None:
        left = max(0, hello.total_steps - state.step) / max(1, state.step / state.boundary)
        assert left >= situation.probation + 1
        assert hello.decay_start is None or state.step < hello.decay_start * hello.total_steps


@thorough
@given(history=histories(), shelf=kernels(), said=st.lists(proposals(), max_size=8))
def test_nothing_unlawful_passes(history, shelf, said):
    """Over any run, any catalogue and any proposals, what passes is lawful, and the rest is refused with a reason."""
    hello, states = history
    memory = Memory()
    for state in states:
        memory = observe(memory, state, embargo=RULES.embargo_boundaries)
        situation = Situation(hello=hello, state=state, memory=memory, shelf=Shelf(shelf), rules=RULES)
        ruling = review(situation, said)
        _assert_lawful(situation, ruling.admitted)
        assert len(said) == len(ruling.admitted) + len(ruling.refused)
        assert all(refusal.reason for refusal in ruling.refused)
        memory = memory.noted(state.boundary, ruling.admitted, situation.shelf.kernels, state.flops_per_sample)


def refusals(situation, *said):
    """Reasons of what did not pass."""
    return [refusal.reason for refusal in review(situation, said).refused]


def test_a_lawful_germination_passes():
    """The shield is no wall: a sound proposal on a healthy run passes unchanged."""
    said = germinate()
    assert (said,) == review(make_situation(), [said]).admitted


@pytest.mark.parametrize(
    ("situation", "text"),
    [
        (make_situation(make_state(seeds=[make_seed(1), make_seed(2)])), "2 of at most 2 seeds are alive"),
        (make_situation(make_state(parameters_added=1800)), "300 parameters, 200 of the budget left"),
        (
            make_situation(make_state(parameters_added=1500, seeds=[make_seed(1, Stage.LOADING, parameters=0)])),
            "300 parameters, 200 of the budget left",
        ),
        (make_situation(make_state(parameters_added=2000)), "budget of 2000 parameters is used up"),
        (make_situation(make_state(14)), "last decay, which began at 70%"),
        (make_situation(make_state(4), make_hello(total_steps=800, decay_start=None)), "4.0 boundaries are left"),
        (make_situation(make_state(train_loss=float("nan"))), "train_loss not finite"),
        (make_situation(make_state(validation_loss=float("inf"))), "validation_loss not finite"),
        (make_situation(make_state(seeds=[make_seed(0, Stage.EMBARGOED)])), "the seed is EMBARGOED"),
        (make_situation(kernels=[]), "not among the validated ones"),
        (make_situation(kernels=[make_kernel(1, signature=WIDE)]), "kernel for image:16->16"),
        (make_situation(kernels=[make_kernel(1, portable=False, target="cpu/other")]), "compiled for cpu/other"),
        (make_situation(hello=make_hello([make_site(0, causal=True)])), "site is causal"),
        (make_situation(hello=make_hello(blueprints=("low_rank",))), "not among those allowed"),
        (make_situation(kernels=[make_kernel(1, zero_birth=False)]), "born at random cannot be blended in at once"),
        (make_situation(hello=make_hello([make_site(5)])), "no site 0"),
    ],
)
def test_a_germination_is_refused_with_its_reason(situation, text):
    """Each rule names what it found."""
    (reason,) = refusals(situation, germinate())
    assert text in reason


def test_a_site_under_embargo_stays_closed():
    """An embargo that is remembered holds although the seed is dormant again."""
    memory = Memory(sites=(SiteMark(0, closed_until=9),))
    assert ["the site is under embargo until boundary 9"] == refusals(make_situation(memory=memory), germinate())
    assert [] == refusals(make_situation(make_state(9), memory=memory), germinate())


def test_after_a_rollback_nothing_germinates_for_a_while():
    """The cooldown covers every site, and ends."""
    hurt = make_seed(1, Stage.ROLLED_BACK, failure="loss spike")
    memory = observe(Memory(), make_state(3, [hurt]), embargo=4)
    assert ["cooldown for 1 more boundaries after the rollback at boundary 3"] == refusals(
        make_situation(make_state(4, [hurt]), memory=memory), germinate()
    )
    assert [] == refusals(make_situation(make_state(5, [hurt]), memory=memory), germinate())


def test_one_germination_and_one_command_per_seed():
    """The second of two is refused, whichever it is."""
    assert ["one germination was let pass already at this boundary"] == refusals(
        make_situation(), germinate(0), germinate(1)
    )
    alive = make_situation(make_state(seeds=[make_seed(0, Stage.GRAFTING)]))
    assert ["another command for this seed was let pass already"] == refusals(
        alive,
        proposal(Action.ADVANCE, to_stage=Stage.FINE_TUNING),
        proposal(Action.CULL, embargo_boundaries=1),
    )


def test_a_kernel_and_a_rate_are_needed():
    """A germination without a kernel, or with a rate of zero, is none."""
    assert ["it names no kernel"] == refusals(make_situation(), replace(germinate(), kernel=None))
    assert ["learning rate scale 0 is not within (0, 100]"] == refusals(
        make_situation(), germinate(learning_rate_scale=0.0)
    )


@pytest.mark.parametrize(
    ("seed", "said", "text"),
    [
        (make_seed(0, Stage.FOSSILIZED), proposal(Action.ADVANCE, to_stage=Stage.FOSSILIZED), "expected a living seed"),
        (make_seed(0, Stage.GRAFTING), proposal(Action.ADVANCE), "no stage does not lie ahead"),
        (
            make_seed(0, Stage.GRAFTING),
            proposal(Action.ADVANCE, to_stage=Stage.TRAINING),
            "TRAINING does not lie ahead",
        ),
        (
            make_seed(0, Stage.GRAFTING, ready=False, blocked_by="RAMP"),
            proposal(Action.ADVANCE, to_stage=Stage.FINE_TUNING),
            "not ready (RAMP)",
        ),
        (
            make_seed(0, Stage.GRAFTING),
            proposal(Action.ADVANCE, to_stage=Stage.FOSSILIZED),
            "probation is not served",
        ),
        (
            make_seed(0, boundaries_in_stage=2),
            proposal(Action.ADVANCE, to_stage=Stage.FOSSILIZED),
            "its gain was not measured",
        ),
        (
            make_seed(0, boundaries_in_stage=2, counterfactual=gain(1e-6, 0.1)),
            proposal(Action.ADVANCE, to_stage=Stage.FOSSILIZED),
            "does not exceed its price",
        ),
        (
            make_seed(0, boundaries_in_stage=2, counterfactual=gain(float("nan"), 0.1)),
            proposal(Action.ADVANCE, to_stage=Stage.FOSSILIZED),
            "does not exceed its price",
        ),
        (make_seed(0, Stage.GERMINATED), proposal(Action.CULL, embargo_boundaries=1), "found GERMINATED"),
        (make_seed(0), proposal(Action.CULL), "at least one boundary"),
        (make_seed(0), proposal(Action.CANCEL), "found FINE_TUNING"),
        (make_seed(0), proposal(Action.RELEASE), "found FINE_TUNING"),
        (make_seed(0), proposal(Action.UNLOCK), "found FINE_TUNING"),
        (make_seed(0, Stage.EMBARGOED), proposal(Action.RELEASE), "its embargo lasts until boundary 7"),
        (make_seed(0, Stage.ROLLED_BACK), proposal(Action.UNLOCK), "its lock lasts until boundary 13"),
        (make_seed(1), proposal(Action.CULL, embargo_boundaries=1), "found DORMANT"),
    ],
)
def test_commands_to_seeds_are_refused_with_their_reason(seed, said, text):
    """Every action asks for its own stage and its own conditions."""
    (reason,) = refusals(make_situation(make_state(3, [seed])), said)
    assert text in reason


def test_what_pays_is_kept():
    """After the probation, with a lower bound above the price, a seed may become the host's own."""
    seed = make_seed(0, boundaries_in_stage=2, counterfactual=gain(0.05))
    assert [] == refusals(make_situation(make_state(3, [seed])), proposal(Action.ADVANCE, to_stage=Stage.FOSSILIZED))


def test_the_list_of_commands_is_bounded():
    """An advice never exceeds the contract."""
    sites = [make_site(i) for i in range(300)]
    seeds = [make_seed(i, Stage.GRAFTING) for i in range(300)]
    situation = make_situation(make_state(3, seeds), make_hello(sites, max_active_seeds=300))
    ruling = review(situation, [proposal(Action.CULL, i, embargo_boundaries=1) for i in range(300)])
    assert (256, 44) == (len(ruling.admitted), len(ruling.refused))


def test_a_refusal_reads_as_a_sentence():
    """What the run is told names action, seed and reason."""
    (refusal,) = review(make_situation(kernels=[]), [germinate()]).refused
    assert str(refusal).startswith("shield refused germinate of seed 0: kernel sha256:000000000000 is not among")


def test_kernels_that_could_grow_somewhere():
    """Only what fits a site, the target, the task's blueprints and the budget counts."""
    shelf = Shelf([make_kernel(1), make_kernel(2, signature=FLAT), make_kernel(3, parameters=5000)])
    assert [kernel_id(1)] == growable(make_hello(), shelf)


def test_the_price_counts_what_was_measured():
    """Parameters by share of the host, FLOPs by share of what was there before, both in parts of the loss."""
    rules = Rules(price_parameters=0.01, price_flops=0.1)
    first = make_state(3, [], flops_per_sample=1e6)
    memory = observe(Memory(), first, embargo=4)
    situation = make_situation(first, memory=Memory(), rules=rules)
    memory = memory.noted(3, [germinate(0), germinate(1)], situation.shelf.kernels, 1e6)
    seeds = [make_seed(0, parameters=300), make_seed(1, parameters=100)]
    later = make_situation(make_state(4, seeds, flops_per_sample=1.2e6), memory=memory, rules=rules)
    price = price_of(later, seeds[0])
    assert pytest.approx(0.25 * (0.01 * 0.2 + 0.1 * 0.2 * 0.75)) == price.loss
    assert "15.0% FLOPs" in str(price)
    unmeasured = make_situation(make_state(4, seeds, flops_per_sample=None), memory=memory, rules=rules)
    assert pytest.approx(0.25 * 0.01 * 0.2) == price_of(unmeasured, seeds[0]).loss
    assert "FLOPs not measured" in str(price_of(unmeasured, seeds[0]))
    assert 0.0 == price_of(make_situation(make_state(4, seeds, validation_loss=None)), seeds[0]).loss


def test_a_series_site_is_as_lawful_as_a_parallel_one():
    """The shield has no taste: where to grow is the policy's business."""
    hello = make_hello([make_site(0, kind=SiteKind.SERIES)])
    state = make_state(sites=(SiteHealth(index=0),))
    assert [] == refusals(make_situation(state, hello), germinate())
