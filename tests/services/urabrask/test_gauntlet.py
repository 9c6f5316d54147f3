"""The gauntlet over real kernels and over hostile ones, in this process."""

import pickle
import re
from dataclasses import replace

import pytest
import torch

from esper.kasmina.blueprints.catalogue import catalogue, get
from esper.kasmina.blueprints.ir import Birth, Blueprint, node
from esper.kasmina.kernels.build import build, limitations
from esper.kasmina.kernels.bundle import BACKWARD, FORWARD, PORTABLE, Tier, kernel_id_of, pack, unpack, write_zip
from esper.kasmina.kernels.rejection import KernelRejected
from esper.kasmina.kernels.target import Target
from esper.kasmina.signature import Layout, Signature
from esper.urabrask.checks import CHECKS
from esper.urabrask.findings import findings_from
from esper.urabrask.gauntlet import bundle, run
from tests.services.urabrask.hostile import SEQUENCE, VECTOR, sound, twisted, with_entry, with_manifest, with_parameters


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the sandbox."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examine(data, told=None, kernel_id=None):
    """Everything that the gauntlet says of a bundle, read as the engine reads it."""
    if told is None:
        told = bundle.facts(unpack(data).manifest)
    heard = []
    job = {"bundle": data, "kernel_id": kernel_id or kernel_id_of(data), "told": told}
    answer = run.evaluate(job, heard.append)
    assert [entry["done"] for entry in heard if "done" in entry] == answer["checks"]
    return findings_from(answer)


def failures(findings):
    """Name -> finding of what failed."""
    return {check.name: check.finding for check in findings.checks if not check.passed}


@pytest.mark.parametrize("blueprint", catalogue(), ids=lambda b: b.name)
def test_catalogue_passes(blueprint):
    """Every blueprint of the catalogue passes every check, in each of its layouts."""
    for layout in blueprint.layouts:
        found = examine(build(blueprint, Signature(layout, 12, 10), Tier.PORTABLE))
        assert {} == failures(found)
        assert found.passed
        assert [spec.name for spec in CHECKS] == [check.name for check in found.checks]


@pytest.mark.parametrize("layout", Layout)
def test_random_birth_passes(layout):
    """A kernel born at random passes, and its tags say so."""
    found = examine(build(get("low_rank").with_birth(Birth.RANDOM), Signature(layout, 5, 9), Tier.PORTABLE))
    assert found.passed
    assert "birth:random" in found.tags


@pytest.mark.parametrize(("width", "dtype"), [(1, "float32"), (2, "float32"), (96, "float64")])
def test_unusual_signatures_pass(width, dtype):
    """Width 1 and float64 are judged like any other."""
    found = examine(build(get("bottleneck_mlp"), Signature(Layout.VECTOR, width, width, dtype), Tier.PORTABLE))
    assert {} == failures(found)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 24), ("float16", 3)])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bottleneck_mlp", Layout.VECTOR),
        ("mini_attention", Layout.SEQUENCE),
        ("squeeze_excitation", Layout.IMAGE),
    ],
)
def test_half_precision_passes(name, layout, dtype, width):
    """Kernels in half precision pass, narrow ones too."""
    assert {} == failures(examine(build(get(name), Signature(layout, width, width, dtype), Tier.PORTABLE)))


def test_figures_and_tags():
    """A passing kernel has the figures that the library queries by, in its units, and tags that follow from them."""
    found = examine(sound("causal_conv", SEQUENCE))
    figures = {figure.name: figure for figure in found.measurements}
    assert "us" == figures["latency.forward.p50"].unit
    assert "bytes" == figures["memory.peak"].unit
    assert 0 < figures["latency.forward.p50"].value < 1e6
    # 16 x 64 tokens of 6 outputs are the least that a forward and backward can hold at once.
    assert figures["memory.peak"].value > 16 * 64 * 6 * 4
    assert 0.5 < figures["memory.ratio"].value < 2
    assert figures["latency.step.p50"].value >= figures["latency.backward.p50"].value
    assert {"causal", "layout:sequence", "tier:portable", "birth:zero", "size:tiny"} < set(found.tags)
    assert 1 == sum(tag.startswith("latency:") for tag in found.tags)
    assert 1 == sum(tag.startswith("memory:") for tag in found.tags)


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "signature"),
    [("bottleneck_mlp", VECTOR), ("low_rank", Signature(Layout.IMAGE, 3, 3, "float16"))],
)
def test_compiled_kernel_passes(name, signature):
    """A kernel of the standard tier passes with its compiled code running, also where that rounds less than eager."""
    if reasons := limitations(Tier.STANDARD):
        pytest.skip("; ".join(reasons))
    found = examine(sound(name, signature, tier=Tier.STANDARD))
    assert {} == failures(found)
    assert "tier:standard" in found.tags


def _leak(delta, x, parameters):
    return delta + x.mean(1, keepdim=True)[..., :6] * parameters["out.weight"].sum()


def garbled():
    """A bundle whose graph is noise."""
    opened = unpack(sound())
    return pack(opened.manifest, {**opened.members, PORTABLE: b"\x80\x04noise"})


def _leaky_gradient(delta, x, parameters):
    later = x.mean(1, keepdim=True)[..., :6] * parameters["out.weight"].sum()
    return delta + later - later.detach()


HOSTILE = {
    "NaN output": (
        lambda: twisted(lambda d, x, p: d / (d - d)),
        "numerics.outputs",
        "expected finite outputs, found NaN",
    ),
    "wrong shape": (
        lambda: twisted(lambda d, x, p: torch.cat([d, d], 1)),
        "contract.shape",
        r"input \(1, 8\): expected \(1, 6\) of torch.float32, found \(1, 12\)",
    ),
    "wrong dtype": (lambda: twisted(lambda d, x, p: d.double()), "contract.shape", "found .* of torch.float64"),
    "fixed batch": (
        lambda: twisted(lambda d, x, p: d, "mini_attention", SEQUENCE, dynamic=False),
        "contract.shape",
        "expected no exception, found RuntimeError",
    ),
    "loud at birth": (lambda: twisted(lambda d, x, p: d + 1e-6), "birth.output", r"exactly zero at birth, found 1e-06"),
    "dead gradient": (
        lambda: twisted(lambda d, x, p: d.detach()),
        "birth.gradient",
        r"found one without \(dead gradient\)",
    ),
    "half dead": (
        lambda: twisted(lambda d, x, p: d.detach() + p["out.bias"] * 0),
        "birth.gradient",
        r"at least one parameter, found none \(dead gradient\)",
    ),
    "wrong scale": (
        lambda: twisted(lambda d, x, p: d * 1.01),
        "numerics.outputs",
        "deviation of at most 0.0001, found 0.0",
    ),
    "wrong gradient": (
        lambda: twisted(lambda d, x, p: d * 1.1 - (d * 0.1).detach()),
        "numerics.gradients",
        "deviation of at most 0.0005, found 0.",
    ),
    "sees the future": (
        lambda: twisted(_leak, "causal_conv", SEQUENCE),
        "behaviour.causality",
        "outputs before position 1 to ignore what comes later",
    ),
    "mixes samples": (
        lambda: twisted(lambda d, x, p: d * (1 + 0 * x.sum())),
        "behaviour.extremes",
        "NaN in a sample: expected the other samples' outputs untouched",
    ),
    "NaN gradient at zero": (
        lambda: twisted(lambda d, x, p: d + x.square().sum(-1, keepdim=True).sqrt() * 0),
        "behaviour.extremes",
        "zeros: expected numbers in x where eager has them, found a difference in",
    ),
    "mixes gradients": (
        lambda: twisted(lambda d, x, p: d + (y := (x * (~x.isfinite()).any()).sum(-1, keepdim=True)) - y.detach()),
        "behaviour.extremes",
        "NaN in a sample: expected the other samples' gradients untouched",
    ),
    "hides NaN": (
        lambda: twisted(lambda d, x, p: torch.where(d.isnan(), 0.0, d)),
        "behaviour.extremes",
        "NaN in a sample: expected it to show",
    ),
    "changes its input": (
        lambda: twisted(lambda d, x, p: x.detach().add_(1.0)[:, :1] * 0 + d),
        "behaviour.purity",
        "expected a forward to change nothing, found changes in input",
    ),
    "throws dice": (
        lambda: twisted(lambda d, x, p: d + torch.rand_like(d) * 1e-6 * p["out.weight"].sum()),
        "behaviour.determinism",
        "expected the same bits again, found others in the output",
    ),
    "loud parameters": (
        lambda: with_parameters(lambda n, v: v + 1 if n == "out.weight" else v),
        "birth.parameters",
        "out.weight: expected what the rules draw from seed 0, from 0 to 0, found other values, from 1 to 1",
    ),
    "constant parameters": (
        lambda: with_parameters(lambda n, v: torch.full_like(v, 0.01) if n == "down.weight" else v),
        "birth.parameters",
        "down.weight: expected what the rules draw from seed 0, from .* found other values, from 0.01 to 0.01",
    ),
    "NaN parameters": (
        lambda: with_parameters(lambda n, v: v * float("nan") if n == "down.weight" else v),
        "birth.parameters",
        "down.weight: expected finite numbers",
    ),
    "NaN gradient": (
        lambda: twisted(lambda d, x, p: d + (p["out.weight"].sum() * 0).sqrt() * 0),
        "birth.gradient",
        "gradient of out.weight: expected finite numbers, found NaN or infinity",
    ),
    "silent although random": (
        lambda: twisted(lambda d, x, p: d * 0, birth=Birth.RANDOM),
        "birth.output",
        "expected an output other than zero from a random birth, found zero",
    ),
    "gradient from the future": (
        lambda: twisted(_leaky_gradient, "causal_conv", SEQUENCE),
        "behaviour.causality",
        "expected no gradient from outputs before position 1 to later inputs",
    ),
    "pickle inside": (
        lambda: with_entry(sound(), "archive/data/extra.bin", pickle.dumps({"a": 1})),
        "bundle.integrity",
        "portable.pt2: entry 'data/extra.bin' does not belong there",
    ),
    "pickle for weights": (
        lambda: with_entry(
            sound(), "archive/data/weights/model_weights_config.json", b'{"config": {"w": {"use_pickle": true}}}'
        ),
        "bundle.integrity",
        r"portable.pt2: entry data/weights/model_weights_config\.json holds .*, which no build writes",
    ),
    "pickle for inputs": (
        lambda: with_entry(sound(), "archive/data/sample_inputs/model.pt", pickle.dumps((1,), 0)),
        "bundle.integrity",
        r"portable.pt2: entry data/sample_inputs/model\.pt holds .*, which no build writes",
    ),
    "path outside": (
        lambda: with_entry(sound(), "../extra", b"x"),
        "bundle.integrity",
        "portable.pt2: entry '../extra' does not belong there",
    ),
    "no kernel": (lambda: b"PK" + b"\0" * 64, "bundle.integrity", "it is no kernel bundle"),
    "graph is no archive": (
        garbled,
        "bundle.integrity",
        "portable.pt2: it is no archive of torch",
    ),
    "other blueprint": (
        lambda: with_manifest(sound(), blueprint_id="sha256:" + "0" * 64),
        "bundle.load",
        "its blueprint is sha256:.*, and the manifest says sha256:0000",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_kernel_is_refused(name):
    """A kernel that breaks one rule fails the check of that rule, with what was expected and found."""
    make, check, words = HOSTILE[name]
    data = make()
    try:
        told = bundle.facts(unpack(data).manifest)
    except KernelRejected:
        told = {}
    found = examine(data, told)
    assert not found.passed
    refuted = failures(found)
    assert check in refuted
    assert re.search(words, refuted[check]), refuted[check]


def test_tampered_byte_is_refused():
    """One byte of the graph changed: the members no longer are what the bundle lists."""
    data = bytearray(sound())
    at = bytes(data).index(b"graph_module") + 20
    data[at] ^= 1
    found = examine(bytes(data), {})
    assert ["bundle.integrity"] == list(failures(found))
    assert "portable.pt2" in failures(found)["bundle.integrity"]
    assert 1 == len(found.checks)


def test_other_digest_is_refused():
    """Bytes that are not the kernel asked for are refused before anything of them is read."""
    found = examine(sound(), kernel_id="sha256:" + "1" * 64)
    assert "expected bytes with the digest sha256:1111" in failures(found)["bundle.integrity"]


@pytest.mark.parametrize(
    ("key", "value"), [("causal", False), ("parameters", 3), ("signature", "vector:8->7:float32"), ("birth", "random")]
)
def test_library_told_otherwise_is_refused(key, value):
    """A kernel whose manifest contradicts what the library was told is refused, naming the difference."""
    data = sound()
    told = bundle.facts(unpack(data).manifest) | {key: value}
    found = examine(data, told)
    assert failures(found)["bundle.manifest"].startswith(f"{key}: the library was told {value}, the manifest says ")


def test_compiled_for_another_machine_is_not_judged():
    """A kernel for another target is neither validated nor refused: it belongs to another engine."""
    data = sound()
    opened = unpack(data)
    package = {"kernel/archive_format": b"pt2", "kernel/data/aotinductor/model/c.wrapper.so": b"\x7fELF"}
    members = {**opened.members, FORWARD: write_zip(package), BACKWARD: write_zip(package)}
    moved = pack(replace(opened.manifest, tier=Tier.STANDARD, target="cpu/vax/default/torch-2.13"), members)
    told = bundle.facts(unpack(moved).manifest)
    answer = run.evaluate({"bundle": moved, "kernel_id": kernel_id_of(moved), "told": told}, lambda _: None)
    assert f"compiled for cpu/vax/default/torch-2.13, and this machine is {Target.here()}" in answer["elsewhere"]


def test_parameter_that_never_learns_is_refused():
    """The bias of an attention key cancels in the softmax: the parameter is named."""
    attention = Blueprint(
        name="with_key_bias",
        title="Attention with a key bias",
        description="The bias of the keys shifts all scores of a query alike.",
        layouts=(Layout.SEQUENCE,),
        nodes=(
            node("norm", "norm", "x"),
            node("query", "linear", "norm", features=4),
            node("key", "linear", "norm", features=4),
            node("value", "linear", "norm", features=4),
            node("mixed", "attention", "query", "key", "value", heads=2),
            node("out", "linear", "mixed", features="out", init="zero"),
        ),
        birth=Birth.ZERO,
        causal=False,
    )
    found = examine(build(attention, SEQUENCE, Tier.PORTABLE))
    assert "after one step, found none for key.bias" in failures(found)["birth.gradient"]


def test_slow_and_greedy_kernels_are_refused():
    """A kernel that does its work a hundred times over is right, and refused for what it costs."""

    def wasteful(delta, x, parameters):
        waste = x.unsqueeze(0).expand(600, *x.shape) * parameters["out.weight"].sum()
        for _ in range(6):
            waste = torch.tanh(waste)
        return delta + 0 * waste.mean(0)[:, :6]

    refuted = failures(examine(twisted(wasteful)))
    assert {"cost.memory", "cost.latency"} <= set(refuted) or "behaviour.extremes" in refuted
    assert "times eager's" in refuted["cost.memory"]
    assert "times eager's time" in refuted["cost.latency"]


def test_without_a_bundle_the_machine_is_told():
    """The engine asks the sandbox, not itself, for the target: only the sandbox has torch."""
    assert {"target": str(Target.here())} == run.evaluate({}, lambda _: None)


def test_memory_hunger_is_no_finding_of_a_check(monkeypatch):
    """Memory that runs out ends the run: the engine decides what that means."""

    def hungry(subject):
        raise MemoryError

    def hungrier(subject):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    data = sound()
    for check, kind in ((hungry, MemoryError), (hungrier, RuntimeError)):
        monkeypatch.setattr(run, "EXAMINATIONS", {"contract.shape": check})
        with pytest.raises(kind):
            examine(data)


def test_warming_up_keeps_to_one_thread():
    """Measurements must not depend on how many cores happen to be free."""
    run.cost.warm_profiler()
    assert 1 == torch.get_num_threads()
