"""Blueprints as data: identity, canonical text, and every way in which they can be malformed."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.blueprints import Birth, Blueprint, catalogue, get, node
from esper.kasmina.signature import Layout
from esper.mesh.errors import InvalidInput, NotFound

NORM = node("norm", "norm", "x")
OUT = node("out", "linear", "norm", features="out", init="zero")


def blueprint_of(*nodes, birth=Birth.ZERO, causal=False, layouts=(Layout.VECTOR,), **fields):
    """A blueprint with these nodes and unimportant texts."""
    fields = {"name": "sample", "title": "A sample", "description": "For tests."} | fields
    return Blueprint(nodes=nodes, birth=birth, causal=causal, layouts=layouts, **fields)


@pytest.mark.parametrize("blueprint", catalogue(), ids=lambda b: b.name)
def test_json_round_trip_keeps_blueprint_and_id(blueprint):
    """The canonical JSON gives the same blueprint, text and id back."""
    again = Blueprint.from_json(blueprint.canonical_json())
    assert blueprint == again
    assert blueprint.id == again.id
    assert blueprint.canonical_json() == again.canonical_json()


def test_id_ignores_formatting_and_notices_content():
    """Spaces and key order do not change the id; a changed size does."""
    blueprint = get("low_rank")
    loose = json.dumps(json.loads(blueprint.canonical_json()), indent=2, sort_keys=False)
    assert blueprint.id == Blueprint.from_json(loose).id
    changed = blueprint.canonical_json().replace("// 4, 4", "// 2, 4")
    assert blueprint.id != Blueprint.from_json(changed).id


def test_id_is_the_digest_of_the_recorded_text():
    """The canonical form is frozen: kernels in the field are named after it."""
    recorded = (
        '{"birth":"zero","causal":false,"description":"For tests.","ir":1,"layouts":["vector"],"name":"sample",'
        '"nodes":[{"attributes":{},"inputs":["x"],"name":"norm","op":"norm"},'
        '{"attributes":{"features":"out","init":"zero"},"inputs":["norm"],"name":"out","op":"linear"}],'
        '"tags":[],"title":"A sample"}'
    )
    blueprint = blueprint_of(NORM, OUT)
    assert recorded == blueprint.canonical_json()
    assert blueprint.id == "sha256:fc25c4ac58a83706542016a29b84f42efab4588b02fae6ef6e369e0a22b8b5c0"


def test_names_and_ids_of_the_catalogue_are_distinct():
    """No two shipped blueprints can be taken for one another."""
    assert len(catalogue()) >= 10
    assert len(catalogue()) == len({b.name for b in catalogue()}) == len({b.id for b in catalogue()})


def test_unknown_template_is_named_with_the_known_ones():
    """Asking for a template that does not ship lists those that do."""
    with pytest.raises(NotFound, match="expected one of low_rank"):
        get("transformer")


def _document(**changes):
    return json.loads(blueprint_of(NORM, OUT).canonical_json()) | changes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected an object, found list"),
        (json.dumps(_document(extra=1)), "extra"),
        (json.dumps(_document(ir=2)), "IR version 1"),
        (json.dumps(_document(name=3)), "expected name to be of type str"),
        (json.dumps(_document(causal=1)), "expected causal to be of type bool"),
        (json.dumps(_document(layouts=["cube"])), "'cube'"),
        (json.dumps(_document(birth="late")), "zero or random"),
        (json.dumps(_document(tags=[1])), "tags: expected strings"),
        (json.dumps(_document(nodes=[1])), "node 0: expected an object"),
        (
            json.dumps(_document(nodes=[{"name": "a", "op": "norm", "inputs": [1], "attributes": {}}])),
            "inputs: expected",
        ),
        (
            json.dumps(_document(nodes=[{"name": "a", "op": "norm", "inputs": ["x"], "attributes": {"affine": 1.5}}])),
            "'affine' to be an integer, a string or a boolean, found float",
        ),
        (" " * 300_000, "at most 262144 bytes"),
    ],
)
def test_malformed_text_is_refused_with_the_place(text, complaint):
    """What cannot be read as a blueprint says where and why, under one reason."""
    with pytest.raises(InvalidInput) as caught:
        Blueprint.from_json(text)
    assert caught.value.reason == "BLUEPRINT_MALFORMED"
    assert complaint in caught.value.public


@pytest.mark.parametrize(
    ("nodes", "where", "complaint"),
    [
        ((node("up", "conv3d", "x"),), "up", "node 'up': op 'conv3d' is not known; expected one of linear, conv"),
        ((node("Up", "norm", "x"), OUT), "Up", "expected a name of the form"),
        ((node("x", "norm", "x"), OUT), "x", "taken by the input"),
        ((NORM, NORM, OUT), "norm", "taken by the input or an earlier node"),
        ((node("train", "norm", "x"), OUT), "train", "belongs to torch.nn.Module"),
        ((node("norm", "norm", "out"), OUT), "norm", "found 'out'"),
        ((node("norm", "norm"), OUT), "norm", "takes 1 to 1 inputs, found 0"),
        ((NORM, node("out", "linear", "norm", init="zero")), "out", "needs attribute features"),
        ((node("norm", "norm", "x", size=3), OUT), "norm", "attribute 'size' is not one of norm"),
        ((node("norm", "norm", "x", affine=1), OUT), "norm", "expected true or false, found 1"),
        (
            (NORM, node("out", "linear", "norm", features="out", init="ones")),
            "out",
            "expected one of ['uniform', 'zero']",
        ),
        ((NORM, node("out", "linear", "norm", features=True, init="zero")), "out", "expected a size, found True"),
        ((NORM, node("out", "linear", "norm", features="depth", init="zero")), "out", "'depth'"),
        ((node("c", "conv", "x", features="out", init="zero"),), "c", "does not exist for layout vector"),
        ((NORM, node("out", "linear", "norm", features="out")), "out", "birth zero expects the last node"),
        (
            (
                node("a", "linear", "x", features=4, init="zero"),
                node("out", "linear", "a", features="out", init="zero"),
            ),
            "a",
            "only the last node may start at zero",
        ),
        ((node("spare", "norm", "x"), NORM, OUT), "spare", "no later node uses it"),
    ],
)
def test_structural_mistakes_point_at_the_node(nodes, where, complaint):
    """A blueprint that could not be right anywhere is refused with the node in the text and in the violations."""
    with pytest.raises(InvalidInput) as caught:
        blueprint_of(*nodes)
    assert caught.value.reason == "BLUEPRINT_INVALID"
    assert complaint in caught.value.public
    assert where in {violation.field for violation in caught.value.violations}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "Bad Name"}, "blueprint name"),
        ({"title": ""}, "title: expected 1 to 128"),
        ({"description": "d" * 600}, "description: expected 1 to 512"),
        ({"tags": ("UPPER",)}, "tags"),
        ({"layouts": ()}, "layouts: expected at least one"),
        ({"layouts": (Layout.IMAGE, Layout.VECTOR)}, "in the order"),
        ({"nodes": ()}, "nodes: expected 1 to 64, found 0"),
        ({"nodes": (node("a", "add", *["x"] * 8), *[node(f"a{i}", "add", *["a"] * 8) for i in range(20)])}, "edges"),
        ({"birth": Birth.RANDOM}, "birth random expects no init 'zero'"),
    ],
)
def test_mistakes_of_the_whole_are_refused(changes, complaint):
    """Names, texts, tags, layouts and sizes of the graph have bounds."""
    with pytest.raises(InvalidInput) as caught:
        replace(blueprint_of(NORM, OUT), **changes)
    assert complaint in caught.value.public


def test_every_problem_is_reported_at_once():
    """An author sees all wrong nodes in one answer."""
    with pytest.raises(InvalidInput) as caught:
        blueprint_of(node("a", "conv3d", "x"), node("b", "linear", "a"), node("c", "gelu", "nowhere"))
    assert ["a", "b", "c"] == [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize("ahead", [node("p", "mean_pool", "x"), node("p", "conv", "x", features="in")])
def test_a_causal_claim_is_checked(ahead):
    """A blueprint cannot call itself causal while one of its nodes sees later positions."""
    gate = node("g", "add", "x", "p")
    out = node("out", "linear", "g", features="out", init="zero")
    with pytest.raises(InvalidInput, match=r"node 'p'.*see later ones"):
        blueprint_of(ahead, gate, out, layouts=(Layout.SEQUENCE,), causal=True)


@pytest.mark.parametrize("blueprint", catalogue(), ids=lambda b: b.name)
def test_random_birth_and_back(blueprint):
    """Every template exists born at random, as another blueprint, and returns to itself."""
    born = blueprint.with_birth(Birth.RANDOM)
    assert born.id != blueprint.id
    assert Birth.RANDOM is born.birth
    assert blueprint == born.with_birth(Birth.ZERO)


def test_layer_scale_can_be_born_either_way():
    """An output that is a learned scale is born at one where a matrix would be born at random."""
    zero = blueprint_of(NORM, node("out", "scale", "norm", init="zero"))
    assert {"init": "one"} == zero.with_birth(Birth.RANDOM).output.settings


def test_blueprints_need_no_torch():
    """Services that only read blueprints, bundles and verdicts stay without torch."""
    code = """
import sys
import esper.kasmina.kernels.bundle, esper.kasmina.kernels.signing, esper.kasmina.kernels.target
from esper.kasmina.blueprints import catalogue
from esper.kasmina.kernels import SignedVerdict, Tier
catalogue()
sys.exit("torch" in sys.modules)
"""
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["name", "op", "inputs", "self", "features", "init", "affine"]) | st.text(max_size=4), ANYTHING
)
CHANGES = st.dictionaries(st.sampled_from(sorted(_document())), ANYTHING, max_size=2)


@given(CHANGES, ATTRIBUTES)
def test_any_json_is_a_blueprint_or_refused(changes, attributes):
    """Whatever JSON comes in: a blueprint that can be written down, or one kind of error that can be sent."""
    document = _document()
    document["nodes"][0]["attributes"] = attributes
    told = ""
    try:
        blueprint = Blueprint.from_json(json.dumps(document | changes))
    except InvalidInput as error:
        told = error.public
    else:
        assert Blueprint.from_json(blueprint.canonical_json()) == blueprint
        told = blueprint.title + blueprint.description
    assert told.encode()


@pytest.mark.parametrize("name", ["name", "op", "inputs"])
def test_attributes_called_after_arguments_are_refused(name):
    """An attribute that a node does not have is refused by its name, whatever the name is."""
    document = _document()
    document["nodes"][0]["attributes"] = {name: "x"}
    with pytest.raises(InvalidInput, match=f"norm.*{name}"):
        Blueprint.from_json(json.dumps(document))


@pytest.mark.parametrize("key", ["title", "description"])
def test_halves_of_characters_are_refused(key):
    """A text that no UTF-8 can hold is refused here, not by the first database that it meets."""
    with pytest.raises(InvalidInput, match=f"blueprint {key}: expected Unicode, found half a surrogate pair"):
        Blueprint.from_json(json.dumps(_document(**{key: "a \ud800 b"})))


def test_deep_nesting_is_refused_in_words():
    """Nesting that JSON still reads is shown shortened, not by a walk as deep again."""
    deep = json.dumps(_document(tags=["deep"])).replace('"deep"', "[" * 900 + "]" * 900)
    with pytest.raises(InvalidInput):
        Blueprint.from_json(deep)
