"""The documented policy: when, where, which, and what stays."""

import math

import pytest
from hypothesis import given

from esper.kasmina.control import Action, BlendStrategy, SiteHealth, SiteKind, Stage
from esper.kasmina.signature import Layout, Signature
from esper.tamiyo.choice import choose, nature
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.memory import Life, Memory, SiteMark
from esper.tamiyo.overlap import Overlaps
from esper.tamiyo.placement import candidates
from esper.tamiyo.rules import Rules
from esper.tamiyo.shield import review
from esper.tamiyo.signals import trend_of
from tests.services.tamiyo.tamiyo_worlds import (
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
)

POLICY = HeuristicPolicy()


def germination(situation):
    """The proposal to germinate, or None."""
    said = POLICY.decide(situation).proposals
    return next((p for p in said if p.action is Action.GERMINATE), None)


def command(seed, state=None, **keywords):
    """What is proposed for one seed, and the explanation of the whole."""
    judgement = POLICY.decide(make_situation(state or make_state(3, [seed]), **keywords))
    return next((p for p in judgement.proposals if p.seed == seed.index), None), judgement.explanation


# When


def test_a_used_up_width_is_grown_at_the_first_boundary():
    """Early is better: where the width is used up the policy does not wait for a plateau."""
    said = germination(make_situation(make_state(1)))
    assert ("SATURATED", 0) == (said.reason, said.seed)
    assert "saturation 0.9" in said.explanation


def test_warm_up_is_waited_for():
    """Nothing grows before the warm-up is over, and the advice says so."""
    judgement = POLICY.decide(make_situation(make_state(1), rules=Rules(warmup_boundaries=2)))
    assert () == judgement.proposals
    assert "boundary 1 of 2 of warm-up" in judgement.explanation


def test_a_falling_loss_at_an_unsaturated_site_is_left_alone():
    """Without a used-up width growth waits for a plateau; the explanation has slope, noise and threshold."""
    memory = Memory(losses=(1.0, 0.9, 0.8, 0.7))
    judgement = POLICY.decide(make_situation(make_state(5, saturation=0.3, validation_loss=0.6), memory=memory))
    assert () == judgement.proposals
    assert "validation loss falling: -0.1" in judgement.explanation
    assert "below 0.50" in judgement.explanation


def test_a_plateau_is_grown_out_of():
    """The same site grows once the loss stands still."""
    memory = Memory(losses=(0.61, 0.60, 0.61, 0.60))
    said = germination(make_situation(make_state(5, saturation=0.3, validation_loss=0.61), memory=memory))
    assert "PLATEAU" == said.reason
    assert "on a plateau" in said.explanation


def test_a_healthy_host_is_not_grown():
    """On a plateau without deficit grafting is neutral: sites far from saturated are closed."""
    memory = Memory(losses=(0.6, 0.6, 0.6, 0.6))
    judgement = POLICY.decide(make_situation(make_state(5, saturation=0.1, validation_loss=0.6), memory=memory))
    assert () == judgement.proposals
    assert "3 not saturated" in judgement.explanation


def test_missing_statistics_are_missing():
    """A site that was not measured counts neither as saturated nor as healthy: only a plateau opens it."""
    state = make_state(5, sites=(), validation_loss=0.6)
    assert germination(make_situation(state, memory=Memory(losses=(1.0, 0.9, 0.8, 0.7)))) is None
    assert "PLATEAU" == germination(make_situation(state, memory=Memory(losses=(0.6, 0.6, 0.6, 0.6)))).reason


def test_germinations_keep_their_distance():
    """The spacing between germinations is a rule like any other."""
    judgement = POLICY.decide(
        make_situation(make_state(5), memory=Memory(last_germination=4), rules=Rules(min_spacing_boundaries=3))
    )
    assert "1 of 3 boundaries since the last germination" in judgement.explanation


@pytest.mark.parametrize(
    ("losses", "plateau"),
    [
        ((2.0, 1.0, 0.7), False),
        ((0.5, 0.5, 0.5), True),
        ((0.50, 0.52, 0.49, 0.51, 0.50), True),
        ((0.50, 0.499, 0.498, 0.497, 0.496), True),
        ((1.0, 0.9, 0.8, 0.7, 0.6), False),
        ((0.5, 0.6, 0.7), False),
        ((0.50, 0.501, 0.502, 0.503, 0.504), True),
        ((0.50, 0.9, 0.55, 0.8, 0.7), True),
        ((1.0, 0.5), False),
        ((), False),
    ],
)
def test_a_plateau_is_a_slope_within_its_noise(losses, plateau):
    """A change counts only beyond two standard errors, and beyond half a percent of the loss."""
    assert plateau is trend_of(losses, RULES).plateau


def test_a_rising_loss_opens_nothing():
    """A validation loss that rises beyond its noise is told as such, and growth waits unless a width is used up."""
    memory = Memory(losses=(0.5, 0.6, 0.7, 0.8))
    judgement = POLICY.decide(make_situation(make_state(5, saturation=0.3, validation_loss=0.9), memory=memory))
    assert () == judgement.proposals
    assert "validation loss rising: +0.1" in judgement.explanation
    assert trend_of((0.5, 0.6, 0.7), RULES).rising
    used_up = make_situation(make_state(5, saturation=0.9, validation_loss=0.9), memory=memory)
    assert "SATURATED" == germination(used_up).reason


def test_only_the_window_is_fitted():
    """A steep beginning does not hide a plateau."""
    assert trend_of((9.0, 5.0, 0.5, 0.5, 0.5, 0.5, 0.5), RULES).plateau
    assert "known at 2 boundaries" in str(trend_of((1.0, 0.5), RULES))


# Where


def _order(sites, health=(), memory=None, seeds=(), rules=RULES):
    state = make_state(3, seeds, sites=tuple(health))
    found, _ = candidates(make_situation(state, make_hello(sites), memory=memory, rules=rules))
    return [candidate.site.index for candidate in found]


def test_the_narrowest_grows_first():
    """Width decides before anything else."""
    sites = [make_site(0, narrowest_width=8), make_site(1, narrowest_width=4), make_site(2, narrowest_width=16)]
    assert [1, 0, 2] == _order(sites, [SiteHealth(index=0, effective_rank=1.0, saturation=0.9)])


def test_among_equals_the_lowest_effective_rank():
    """Unmeasured ranks come last."""
    sites = [make_site(0), make_site(1), make_site(2)]
    health = [SiteHealth(index=1, effective_rank=6.0), SiteHealth(index=2, effective_rank=3.0)]
    assert [2, 1, 0] == _order(sites, health)


def test_the_bottleneck_score_decides_where_it_is_chosen():
    """Before the width, but not for the output; shared with what has grown; missing comes after measured, by width."""
    sites = [
        make_site(0, narrowest_width=2, name="a"),
        make_site(1, narrowest_width=8, name="b"),
        make_site(2, narrowest_width=4, name="c"),
        make_site(3, narrowest_width=6, name="d"),
        make_site(4, narrowest_width=2, depth=1.0, signature=Signature(Layout.IMAGE, 8, 2), name="e"),
    ]
    health = [SiteHealth(index=i, bottleneck=score) for i, score in ((1, 0.04), (3, 0.05), (4, 0.9))]
    assert [0, 2, 3, 1, 4] == _order(sites, health)
    rules = RULES.model_copy(update={"place_by": "bottleneck"})
    assert [3, 1, 0, 2, 4] == _order(sites, health, rules=rules)
    assert [1, 3, 0, 2, 4] == _order(
        [*sites, make_site(5, name="d.inner")], health, seeds=[make_seed(5, Stage.FOSSILIZED)], rules=rules
    )


def test_a_branch_around_the_narrow_part_comes_before_what_cannot_repair_it():
    """A span that leads around a narrow layer beats that layer itself and any series adapter."""
    sites = [
        make_site(0, kind=SiteKind.SERIES, narrowest_width=4, signature=Signature(Layout.IMAGE, 4, 4)),
        make_site(1, kind=SiteKind.PARALLEL, narrowest_width=4, signature=Signature(Layout.IMAGE, 16, 4)),
        make_site(2, granularity="span", narrowest_width=4, signature=WIDE, name="conv0..conv3"),
    ]
    assert [2, 1, 0] == _order(sites)


def test_the_output_is_never_a_bottleneck():
    """The width of the last layer is the task's own."""
    sites = [make_site(0, depth=1.0, narrowest_width=2, signature=Signature(Layout.IMAGE, 8, 2)), make_site(1)]
    assert [1, 0] == _order(sites)


def test_what_has_grown_counts_as_width():
    """A narrow place with a seed around it makes room for the next narrowest."""
    sites = [
        make_site(0, narrowest_width=4, name="stem"),
        make_site(1, narrowest_width=4, name="stem.conv"),
        make_site(2, narrowest_width=6, name="head"),
    ]
    assert [2, 1] == _order(sites, seeds=[make_seed(0, Stage.FOSSILIZED)])


def test_sites_that_failed_twice_are_given_up():
    """Failures put a site back, then off."""
    sites = [make_site(0), make_site(1), make_site(2)]
    memory = Memory(sites=(SiteMark(0, failures=1), SiteMark(1, failures=2)))
    assert [2, 0] == _order(sites, memory=memory)


def test_overlap_is_told_by_names_and_depth():
    """Same module, one inside the other, and what lies between the ends of a span."""
    conv1, conv2, conv3 = (make_site(i, name=f"net.conv{i}", depth=i / 10) for i in (1, 2, 3))
    span = make_site(4, name="net.conv1..net.conv3", depth=0.3)
    other = make_site(5, name="net.conv33", depth=0.5)
    whole, strange = make_site(6, name="net", depth=1.0), make_site(7, name="a..b")
    overlaps = Overlaps([conv1, conv2, conv3, span, other, whole, strange])
    assert {1, 4, 6} == overlaps.around(1)
    assert {2, 4, 6} == overlaps.around(2)
    assert {1, 2, 3, 4, 6} == overlaps.around(4)
    assert {5, 6} == overlaps.around(5)
    assert {7} == overlaps.around(7)
    assert frozenset() == overlaps.around(99)


# Which


def test_a_kernel_must_fit_in_every_way():
    """No kernel of another signature, target, causality or size is even considered."""
    situation = make_situation(
        hello=make_hello([make_site(0, causal=True)]),
        kernels=[
            make_kernel(1, signature=WIDE, causal=True),
            make_kernel(2, portable=False, target="cpu/other", causal=True),
            make_kernel(3),
            make_kernel(4, causal=True, parameters=3000),
            make_kernel(5, causal=True),
        ],
    )
    found = choose(situation, situation.sites[0])
    assert (kernel_id(5), 1) == (found.kernel.kernel_id, found.rivals)


def test_size_is_neither_maximal_nor_minimal():
    """The best size lies between the site's own and the seed's share of the budget."""
    sizes = {1: 10, 2: 550, 3: 2000}
    situation = make_situation(kernels=[make_kernel(n, parameters=p) for n, p in sizes.items()])
    assert kernel_id(2) == choose(situation, situation.sites[0]).kernel.kernel_id


def test_measured_latency_breaks_ties():
    """Two builds of one blueprint: the one measured faster runs, and one without a measurement comes last."""
    situation = make_situation(
        kernels=[
            make_kernel(1, latency_us=None),
            make_kernel(2, latency_us=30.0),
            make_kernel(3, latency_us=20.0, portable=False, target="cpu/x86_64/avx2/torch-2.13"),
        ]
    )
    assert kernel_id(3) == choose(situation, situation.sites[0]).kernel.kernel_id
    paced = make_situation(
        kernels=[
            make_kernel(1, latency_us=20.0),
            make_kernel(2, latency_us=30.0, pace=0.8, portable=False, target="cpu/x86_64/avx2/torch-2.13"),
            make_kernel(3, latency_us=30.0, pace=0.7, portable=False, target="cpu/x86_64/avx2/torch-2.13"),
        ]
    )
    assert kernel_id(3) == choose(paced, paced.sites[0]).kernel.kernel_id


def test_what_failed_in_this_run_is_chosen_less():
    """The record of a blueprint moves the choice."""
    shelf = [make_kernel(1), make_kernel(2, parameters=301)]
    fresh = make_situation(kernels=shelf)
    before = choose(fresh, fresh.sites[0]).kernel.blueprint_name
    burnt = make_situation(kernels=shelf, memory=Memory(kept=((before, 0, 1),)))
    assert before != choose(burnt, burnt.sites[0]).kernel.blueprint_name
    proud = make_situation(kernels=shelf, memory=Memory(kept=(("blueprint1", 1, 0),)))
    assert "blueprint1" == choose(proud, proud.sites[0]).kernel.blueprint_name


def test_thin_and_pointwise_modules_have_a_lower_prior():
    """Adapters, and on images modules without a neighbourhood, promise less; around a narrow part even less."""
    layer, around = make_site(0), make_site(1, signature=WIDE)
    vector = make_site(2, signature=Signature(Layout.VECTOR, 8, 8))
    assert nature(("conv",), layer) > nature(("mlp",), layer) > nature(("adapter", "mlp"), layer)
    assert nature(("adapter", "mlp"), layer) > nature(("adapter", "mlp"), around)
    assert nature(("mlp",), vector) > nature(("mlp",), layer)


def test_zero_births_are_blended_at_once_with_three_times_the_rate():
    """IMMEDIATE with x3 for a zero birth; a ramp over one boundary at the host's rate for a random one."""
    zero = germination(make_situation()).kernel
    assert (BlendStrategy.IMMEDIATE, 0, 3.0) == (zero.blend, zero.blend_steps, zero.learning_rate_scale)
    random = germination(make_situation(kernels=[make_kernel(1, zero_birth=False)])).kernel
    assert (BlendStrategy.FIXED_RAMP, 100, 1.0) == (random.blend, random.blend_steps, random.learning_rate_scale)


def test_likely_kernels_are_named_ahead():
    """Kernels of the best sites are prefetched, also while nothing germinates yet."""
    judgement = POLICY.decide(make_situation(make_state(1), rules=Rules(warmup_boundaries=5)))
    assert (kernel_id(1),) == judgement.prefetch


def test_a_site_without_a_kernel_gives_way_to_one_with():
    """The best site for which the library has something grows."""
    hello = make_hello([make_site(0, narrowest_width=2, signature=WIDE), make_site(1)])
    assert 1 == germination(make_situation(hello=hello)).seed
    judgement = POLICY.decide(make_situation(hello=hello, kernels=[]))
    assert "no validated kernel fits an open site" in judgement.explanation


# What stays


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.LOADING, Stage.TRAINING])
def test_a_zero_birth_goes_straight_to_fine_tuning(stage):
    """Isolation and ramp are passed through; the gates on the way are the runtime's."""
    said, _ = command(make_seed(0, stage))
    assert (Action.ADVANCE, Stage.FINE_TUNING) == (said.action, said.to_stage)


@pytest.mark.parametrize(("stage", "to_stage"), [(Stage.LOADING, Stage.TRAINING), (Stage.TRAINING, Stage.GRAFTING)])
def test_a_random_birth_takes_every_step(stage, to_stage):
    """It trains in isolation, then it is grafted."""
    said, _ = command(make_seed(0, stage, isolation_gain=0.2), kernels=[make_kernel(1, zero_birth=False)])
    assert to_stage is said.to_stage


def test_the_birth_is_remembered_when_the_kernel_has_left_the_library():
    """An archived kernel's seed goes on as it began."""
    memory = Memory(lives=(Life(0, kernel_id(1), "b", zero_birth=False, born=2, flops_before=None),))
    said, _ = command(make_seed(0, Stage.LOADING), kernels=[], memory=memory)
    assert Stage.TRAINING is said.to_stage


@pytest.mark.parametrize(
    ("seed", "reason"),
    [
        (make_seed(0, Stage.LOADING, boundaries_in_stage=3, ready=False, blocked_by="KERNEL_PENDING"), "KERNEL_LATE"),
        (make_seed(0, Stage.TRAINING, boundaries_in_stage=3, ready=False, blocked_by="NOT_LEARNING"), "NOT_LEARNING"),
        (make_seed(0, Stage.TRAINING, ready=False, blocked_by="NOT_FINITE"), "NOT_FINITE"),
    ],
)
def test_what_has_not_touched_the_host_is_cancelled(seed, reason):
    """No embargo is needed for a seed that did nothing."""
    said, _ = command(seed)
    assert (Action.CANCEL, reason) == (said.action, said.reason)


@pytest.mark.parametrize(
    ("seed", "reason"),
    [
        (make_seed(0, Stage.GRAFTING, boundaries_in_stage=4, ready=False, blocked_by="SPIKE"), "NOT_STABLE"),
        (make_seed(0, Stage.STABILIZING, ready=False, blocked_by="NOT_FINITE"), "NOT_FINITE"),
        (make_seed(0, Stage.GRAFTING, boundaries_in_stage=4, ready=False, blocked_by="DRIFT"), "NOT_STABLE"),
        (make_seed(0, ready=False, blocked_by="NOT_FINITE"), "NOT_FINITE"),
        (make_seed(0, boundaries_in_stage=3), "NOT_MEASURED"),
        (make_seed(0, boundaries_in_stage=2, counterfactual=gain(-0.1)), "NO_GAIN"),
        (make_seed(0, boundaries_in_stage=3, counterfactual=gain(-0.1, 0.1)), "NO_GAIN"),
        (
            make_seed(0, boundaries_in_stage=4, counterfactual=gain(0.1), ready=False, blocked_by="NO_GAIN"),
            "GATE_CLOSED",
        ),
    ],
)
def test_what_harms_or_does_not_pay_is_culled(seed, reason):
    """A cull closes its site, and its explanation has the numbers."""
    said, _ = command(seed)
    assert (Action.CULL, reason, RULES.embargo_boundaries) == (said.action, said.reason, said.embargo_boundaries)


def test_a_high_loss_is_waited_for():
    """Too few high losses for a spike hold a seed where it is: the runtime itself takes out one that spikes."""
    said, explanation = command(make_seed(0, Stage.GRAFTING, ready=False, blocked_by="SPIKE"))
    assert None is said
    assert "waits in GRAFTING (SPIKE), 1 of 4 boundaries" in explanation


def test_what_pays_is_kept_with_its_numbers():
    """Lower bound above price after the probation: FOSSILIZED, with gain, bound, batches and price in the reason."""
    said, _ = command(make_seed(0, boundaries_in_stage=2, counterfactual=gain(0.04, 0.05)))
    assert (Action.ADVANCE, Stage.FOSSILIZED, "PROBATION_PASSED") == (said.action, said.to_stage, said.reason)
    assert "gain 0.05 (lower bound 0.04, 16 batches), price 0.000133 (20.0% parameters" in said.explanation


@pytest.mark.parametrize(
    ("seed", "text"),
    [
        (make_seed(0), "on probation, 1 of 2 boundaries"),
        (make_seed(0, boundaries_in_stage=2), "waits to be measured"),
        (make_seed(0, boundaries_in_stage=2, counterfactual=gain(-0.01, 0.05)), "is given 1 more boundaries"),
        (
            make_seed(0, boundaries_in_stage=2, counterfactual=gain(0.1), ready=False, blocked_by="TOO_SOON"),
            "its gate is closed (TOO_SOON)",
        ),
        (make_seed(0, Stage.LOADING, ready=False, blocked_by="KERNEL_PENDING"), "waits in LOADING (KERNEL_PENDING)"),
        (make_seed(0, Stage.GRAFTING, ready=False, blocked_by="RAMP"), "waits in GRAFTING (RAMP)"),
        (make_seed(0, Stage.EMBARGOED), "under embargo until boundary 7"),
        (make_seed(0, Stage.STABILIZING, ready=False, blocked_by="TOO_SOON"), "waits in STABILIZING (TOO_SOON)"),
        (make_seed(0, Stage.ROLLED_BACK), "locked after a rollback until boundary 13"),
    ],
)
def test_waiting_is_explained(seed, text):
    """An advice without a command for a seed says why, with the numbers."""
    said, explanation = command(seed)
    assert said is None
    assert text in explanation


def test_a_grafted_seed_goes_on_when_its_gate_is_open():
    """GRAFTING to FINE_TUNING in one command."""
    said, _ = command(make_seed(0, Stage.GRAFTING, alpha=1.0))
    assert (Action.ADVANCE, Stage.FINE_TUNING) == (said.action, said.to_stage)


def test_embargo_and_lock_end():
    """RELEASE and UNLOCK come when they are due."""
    closed = make_seed(0, Stage.EMBARGOED)
    life = Life(0, kernel_id(1), "b", zero_birth=True, born=1, flops_before=None, seen=True, ended=True, out_since=3)
    memory = Memory(lives=(life,), sites=(SiteMark(0, closed_until=7),))
    said, _ = command(closed, make_state(7, [closed]), memory=memory)
    assert Action.RELEASE is said.action
    locked = make_seed(0, Stage.ROLLED_BACK)
    said, _ = command(locked, make_state(13, [locked]), memory=memory)
    assert Action.UNLOCK is said.action
    for stage in (Stage.EMBARGOED, Stage.ROLLED_BACK):
        held = make_seed(0, stage, ready=False, blocked_by="TOO_SOON")
        said, explanation = command(held, make_state(13, [held]), memory=memory)
        assert said is None
        assert "by the runtime (TOO_SOON)" in explanation


@pytest.mark.parametrize(
    ("seed", "action", "reason"),
    [
        (make_seed(0, boundaries_in_stage=2, counterfactual=gain(0.1)), Action.ADVANCE, "PROBATION_PASSED"),
        (make_seed(0, boundaries_in_stage=2, counterfactual=gain(-0.1, 0.5)), Action.CULL, "NO_GAIN"),
        (make_seed(0, boundaries_in_stage=1, counterfactual=gain(0.5)), Action.CULL, "SCHEDULE_END"),
        (make_seed(0, boundaries_in_stage=2), Action.CULL, "NOT_MEASURED"),
        (make_seed(0, Stage.GRAFTING), Action.CULL, "SCHEDULE_END"),
        (make_seed(0, Stage.TRAINING), Action.CANCEL, "SCHEDULE_END"),
    ],
)
def test_at_the_end_every_seed_is_judged(seed, action, reason):
    """No seed is left undecided when the schedule is over: what has not proved itself goes."""
    said, _ = command(seed, make_state(20, [seed]))
    assert (action, reason) == (said.action, said.reason)


def test_fossilized_and_spent_seeds_are_left_to_the_runtime():
    """Nothing is commanded where nothing can be."""
    for stage in (Stage.FOSSILIZED, Stage.CULLED, Stage.RESETTING, Stage.CANCELLED):
        said, _ = command(make_seed(0, stage), kernels=[])
        assert said is None


def test_the_probation_is_counted_in_epochs_where_they_are_known():
    """Two epochs are two boundaries, or four where a run validates twice an epoch."""
    assert 2 == make_situation(make_state(4)).probation
    assert 4 == make_situation(make_state(4, epoch=2.0)).probation
    assert 1 == make_situation(make_state(4, epoch=16.0)).probation
    assert 2 == make_situation(make_state(4, epoch=None)).probation
    assert 2 == make_situation(make_state(4, epoch=0.0)).probation
    assert 2 == make_situation(make_state(4, epoch=math.inf)).probation


@thorough
@given(history=histories(), shelf=kernels())
def test_the_shield_has_nothing_to_refuse_of_this_policy(history, shelf):
    """The policy knows the law: over any run, all that it proposes passes."""
    hello, states = history
    memory = Memory()
    for state in states:
        situation = make_situation(state, hello, shelf, memory)
        ruling = review(situation, POLICY.decide(situation).proposals)
        assert () == ruling.refused
        memory = situation.memory.noted(
            state.boundary, ruling.admitted, situation.shelf.kernels, state.flops_per_sample
        )


def test_narrow_sites_exist_in_other_layouts_too():
    """Nothing is particular to images."""
    site = make_site(0, signature=Signature(Layout.SEQUENCE, 32, 32), narrowest_width=32)
    kernel = make_kernel(1, signature=site.signature, tags=("mlp", "gated"))
    assert 0 == germination(make_situation(hello=make_hello([site]), kernels=[kernel])).seed
    assert NARROW != site.signature
