"""Every type of the control vocabulary survives the wire, and the wire refuses what the vocabulary cannot say."""

import subprocess
import sys
from dataclasses import is_dataclass, replace
from math import isnan

import protovalidate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.kasmina import control, convert
from esper.kasmina.control import (
    Action,
    Advice,
    BlendStrategy,
    BoundaryState,
    Counterfactual,
    Decision,
    FieldReport,
    HealthColumns,
    KernelChoice,
    Outcome,
    RunHello,
    SeedState,
    SiteDescriptor,
    SiteHealth,
    SiteKind,
    Stage,
)
from esper.kasmina.signature import FLOAT_DTYPES, Layout, Signature
from esper.mesh.errors import InvalidInput
from esper.v1 import (
    decision_pb2,
    field_report_pb2,
    health_pb2,
    run_pb2,
    seed_pb2,
    signature_pb2,
    site_pb2,
    tamiyo_service_pb2,
)

digests = st.binary(min_size=32, max_size=32).map(lambda raw: "sha256:" + raw.hex())
names = st.text(st.characters(codec="ascii", min_codepoint=32), max_size=24)
finite32 = st.floats(-1e6, 1e6, width=32)
finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**31)
GATED = {*range(Stage.GERMINATED, Stage.FINE_TUNING + 1), Stage.EMBARGOED, Stage.ROLLED_BACK}

signatures = st.builds(
    Signature,
    st.sampled_from(Layout),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.sampled_from(sorted(FLOAT_DTYPES)),
)
sites = st.builds(
    SiteDescriptor,
    index=st.integers(0, 65535),
    name=names,
    kind=st.sampled_from(SiteKind),
    granularity=st.sampled_from(["layer", "block", "span", ""]),
    module_type=names,
    signature=signatures,
    narrowest_width=st.integers(1, 4096),
    parameters=counts,
    depth=st.floats(0, 1, width=32),
    causal=st.booleans(),
)
site_healths = st.builds(
    SiteHealth,
    index=st.integers(0, 65535),
    effective_rank=st.none() | finite32,
    saturation=st.none() | st.floats(0, 1, width=32),
    dead_fraction=st.none() | st.floats(0, 1, width=32),
    gradient_norm=st.none() | finite32,
    bottleneck=st.none() | st.floats(0, 1, width=32),
)
counterfactuals = st.builds(
    Counterfactual,
    mean_gain=finite32,
    lower_bound=finite32,
    confidence=st.floats(0, 1, width=32),
    batches=st.integers(2, 1000),
)


@st.composite
def seed_states(draw):
    """A seed as the wire can say it: ready and blocked are two views of one fact."""
    stage = draw(st.sampled_from(Stage))
    blocked = draw(st.sampled_from(["", *convert.GATE_BLOCKS]))
    return SeedState(
        index=draw(st.integers(0, 65535)),
        stage=stage,
        boundaries_in_stage=draw(counts),
        steps_in_stage=draw(counts),
        ready=not blocked and stage in GATED,
        blocked_by=blocked,
        alpha=draw(st.floats(0, 1, width=32)),
        kernel_id=draw(st.just("") | digests),
        parameters=draw(counts),
        isolation_gain=draw(st.none() | finite32),
        gradient_norm=draw(st.none() | finite32),
        weight_norm=draw(st.none() | finite32),
        counterfactual=draw(st.none() | counterfactuals),
        failure=draw(st.just("") | names),
    )


hellos = st.builds(
    RunHello,
    run_id=names.filter(bool),
    target=names,
    total_steps=st.none() | counts,
    decay_start=st.none() | st.floats(0, 1),
    host_parameters=counts,
    parameter_budget=counts,
    max_active_seeds=st.integers(1, 64),
    sites=st.lists(sites, max_size=4).map(tuple),
    blueprints=st.lists(names, max_size=3).map(tuple),
    task=names,
    controller_state=st.binary(max_size=64),
)
states = st.builds(
    BoundaryState,
    run_id=names,
    boundary=st.integers(1, 2**40),
    step=counts,
    epoch=st.none() | finite,
    train_loss=st.none() | finite,
    validation_loss=st.none() | finite,
    validation_accuracy=st.none() | finite,
    learning_rate=st.none() | finite,
    gradient_norm=st.none() | finite,
    parameters_added=counts,
    flops_per_sample=st.none() | finite,
    seconds=st.integers(0, 10**9).map(lambda milliseconds: milliseconds / 1000),
    seeds=st.lists(seed_states(), max_size=5).map(tuple),
    sites=st.lists(site_healths, max_size=5).map(tuple),
)
choices = st.builds(
    KernelChoice,
    kernel_id=digests,
    blueprint_name=names,
    blend=st.sampled_from(BlendStrategy),
    blend_steps=st.integers(0, 1_000_000),
    learning_rate_scale=st.floats(0.125, 100, width=32),
)
decisions = st.builds(
    Decision,
    decision_id=st.just("12.3.0"),
    boundary=st.integers(1, 2**40),
    seed=st.integers(0, 65535),
    action=st.sampled_from(Action),
    reason=st.just("PLATEAU"),
    explanation=names,
    to_stage=st.none() | st.sampled_from(Stage),
    kernel=st.none() | choices,
    embargo_boundaries=st.integers(0, 1_000_000),
)
advices = st.builds(
    Advice,
    boundary=st.integers(1, 2**40),
    decisions=st.lists(decisions, max_size=4).map(tuple),
    explanation=names,
    controller_state=st.binary(max_size=64),
    prefetch=st.lists(digests, max_size=4).map(tuple),
)
reports = st.builds(
    FieldReport,
    run_id=names.filter(bool),
    task=names,
    site=sites,
    kernel_id=digests,
    blueprint_name=names,
    outcome=st.sampled_from(Outcome),
    germinated_boundary=counts,
    ended_boundary=counts,
    parameters=counts,
    counterfactual=st.none()
    | st.builds(
        Counterfactual, mean_gain=finite, lower_bound=finite, confidence=st.floats(0, 1), batches=st.integers(2, 99)
    ),
    reason=names,
)


@st.composite
def healths(draw):
    """Telemetry of a few seeds, everything measured."""
    size = draw(st.integers(0, 5))

    def column(values):
        return tuple(draw(st.lists(values, min_size=size, max_size=size)))

    return HealthColumns(
        run_id=draw(names),
        step=draw(counts),
        seed=column(st.integers(0, 65535)),
        stage=column(st.sampled_from(Stage).map(int)),
        alpha=column(st.floats(0, 1, width=32)),
        gradient_norm=column(finite32),
        weight_norm=column(finite32),
        output_ratio=column(finite32),
        bottleneck=column(st.floats(0, 1, width=32)),
    )


PAIRS = {
    "signature": (signatures, convert.signature_to_proto, convert.signature_from_proto, signature_pb2.Signature),
    "site": (sites, convert.site_to_proto, convert.site_from_proto, site_pb2.Site),
    "site_health": (
        st.lists(site_healths, max_size=5).map(tuple),
        convert.site_health_to_proto,
        convert.site_health_from_proto,
        site_pb2.SiteColumns,
    ),
    "counterfactual": (
        counterfactuals,
        convert.counterfactual_to_proto,
        convert.counterfactual_from_proto,
        field_report_pb2.Counterfactual,
    ),
    "seeds": (
        st.lists(seed_states(), max_size=5).map(tuple),
        convert.seeds_to_proto,
        convert.seeds_from_proto,
        seed_pb2.SeedColumns,
    ),
    "hello": (hellos, convert.run_hello_to_proto, convert.run_hello_from_proto, run_pb2.RunHello),
    "state": (states, convert.boundary_state_to_proto, convert.boundary_state_from_proto, run_pb2.TrainingState),
    "choice": (choices, convert.kernel_choice_to_proto, convert.kernel_choice_from_proto, decision_pb2.KernelChoice),
    "decision": (decisions, convert.decision_to_proto, convert.decision_from_proto, decision_pb2.Decision),
    "advice": (advices, convert.advice_to_proto, convert.advice_from_proto, tamiyo_service_pb2.Advice),
    "report": (reports, convert.field_report_to_proto, convert.field_report_from_proto, field_report_pb2.FieldReport),
    "health": (healths(), convert.health_to_proto, convert.health_from_proto, health_pb2.HealthBatch),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(deadline=None)
@given(data=st.data())
def test_what_is_sent_is_what_arrives(name, data):
    """Every value of the vocabulary comes back equal after encoding, decoding and conversion."""
    values, to_proto, from_proto, kind = PAIRS[name]
    value = data.draw(values)
    assert value == from_proto(kind.FromString(to_proto(value).SerializeToString()))


@pytest.mark.parametrize("name", PAIRS)
@settings(deadline=None)
@given(data=st.data())
def test_what_is_sent_is_within_the_bounds_of_the_contract(name, data):
    """The server's validation refuses nothing that the conversion of a lawful value made."""
    values, to_proto, _, _ = PAIRS[name]
    protovalidate.validate(to_proto(data.draw(values)))


def test_every_type_of_the_vocabulary_has_a_pair():
    """A dataclass added to control.py without a conversion is noticed here."""
    converted = {
        *(Advice, BoundaryState, Counterfactual, Decision, FieldReport, HealthColumns),
        *(KernelChoice, RunHello, SeedState, SiteDescriptor, SiteHealth),
    }
    known = [getattr(control, name) for name in control.__all__]
    assert converted == {kind for kind in known if is_dataclass(kind)}


def _seed(**changes):
    base = SeedState(index=0, stage=Stage.GRAFTING, boundaries_in_stage=1, steps_in_stage=2, ready=True)
    return replace(base, **changes)


def _after_wire(seed):
    return convert.seeds_from_proto(convert.seeds_to_proto((seed,)))[0]


def test_an_unnamed_block_travels_as_other():
    """A gate's reason that the contract does not name is still a reason on the other side."""
    assert _after_wire(_seed(ready=False, blocked_by="MOON_PHASE")).blocked_by == "OTHER"
    assert not _after_wire(_seed(ready=False, blocked_by="MOON_PHASE")).ready


def test_not_ready_without_a_reason_does_not_become_ready():
    """A living seed that says neither ready nor why must not arrive as ready."""
    arrived = _after_wire(_seed(ready=False))
    assert (False, "OTHER") == (arrived.ready, arrived.blocked_by)


def test_a_reason_in_lower_case_is_understood():
    """Reasons are matched without regard to case."""
    assert _after_wire(_seed(ready=False, blocked_by="no_gain")).blocked_by == "NO_GAIN"


def test_a_block_from_a_newer_runtime_is_a_block():
    """A number that this reader does not know still blocks."""
    message = seed_pb2.SeedColumns(seed=[1], stage=[5])
    message.blocked_by.append(99)
    arrived = convert.seeds_from_proto(message)[0]
    assert (False, "OTHER") == (arrived.ready, arrived.blocked_by)


def test_long_texts_are_cut_to_the_bound():
    """A traceback in a failure must not make the whole state unlawful."""
    message = convert.seeds_to_proto((_seed(failure="x" * 5000),))
    protovalidate.validate(message)
    assert 256 == len(message.failure[0])


def test_optional_columns_are_absent_when_nothing_was_measured():
    """Dormant statistics cost no bytes."""
    message = convert.seeds_to_proto((_seed(),))
    assert not message.gain_mean
    assert not message.gain_batches
    assert not message.gradient_norm
    assert not message.failure


def test_a_sparse_column_of_the_wire_is_missing_not_zero():
    """A counterfactual whose figures the sender left out arrives as NaN, never as a gain of zero."""
    message = seed_pb2.SeedColumns(seed=[1], stage=[8], gain_batches=[4])
    measured = convert.seeds_from_proto(message)[0].counterfactual
    assert measured is not None
    assert isnan(measured.mean_gain)
    assert isnan(measured.lower_bound)


@pytest.mark.parametrize(
    ("call", "message", "text"),
    [
        (convert.seeds_from_proto, seed_pb2.SeedColumns(seed=[1, 2], stage=[4]), "column stage: expected 2 entries"),
        (convert.seeds_from_proto, seed_pb2.SeedColumns(seed=[1]), "column stage"),
        (convert.seeds_from_proto, seed_pb2.SeedColumns(seed=[1], stage=[0]), "seed stage: expected 1 to 14, found 0"),
        (convert.seeds_from_proto, seed_pb2.SeedColumns(seed=[1], stage=[4], kernel=[b"ab"]), "32 bytes"),
        (convert.site_health_from_proto, site_pb2.SiteColumns(site=[1], saturation=[0.5, 0.5]), "column saturation"),
        (convert.health_from_proto, health_pb2.HealthBatch(seed=[1], alpha=[0.5, 0.5]), "column alpha"),
        (convert.site_from_proto, site_pb2.Site(), "site_kind: expected one of series, parallel"),
        (
            convert.signature_from_proto,
            signature_pb2.Signature(in_features=1, out_features=1),
            "layout: expected one of",
        ),
        (convert.signature_from_proto, signature_pb2.Signature(layout=1, in_features=1, out_features=1), "dtype"),
        (convert.decision_from_proto, decision_pb2.Decision(id="1.1.0"), "decision_action: expected one of germinate"),
        (convert.kernel_choice_from_proto, decision_pb2.KernelChoice(kernel=b"\0" * 32), "blend_strategy"),
        (convert.field_report_from_proto, field_report_pb2.FieldReport(site=site_pb2.Site(kind=1)), "layout"),
    ],
)
def test_what_the_vocabulary_cannot_say_is_refused(call, message, text):
    """A message that is not lawful is refused in one sentence that names thing, expectation and finding."""
    with pytest.raises(InvalidInput, match=text):
        call(message)


def test_unmeasured_telemetry_is_nan():
    """A column that was left out arrives as NaN for every seed."""
    arrived = convert.health_from_proto(health_pb2.HealthBatch(seed=[1, 2], stage=[4, 4]))
    assert all(isnan(value) for value in (*arrived.alpha, *arrived.output_ratio))


def test_conversion_needs_no_torch():
    """The controller converts without torch in its process."""
    code = "import sys, esper.kasmina.convert; sys.exit('torch' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
