"""The archives of torch inside a kernel: whatever could run something when torch reads it never reaches torch."""

import contextlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from esper.kasmina.blueprints import Birth, Blueprint, node
from esper.kasmina.kernels import KernelCorrupt, Tier, kernel_id_of, load_candidate, load_kernel, unpack
from esper.kasmina.kernels.archives import UnsoundArchive, sound_archive
from esper.kasmina.kernels.build import build
from esper.kasmina.kernels.bundle import FORWARD, PORTABLE, pack, write_zip
from esper.kasmina.signature import Layout, Signature

GRAPH = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"
SAMPLES = "archive/data/sample_inputs/model.pt"


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def saved(thing):
    """As torch saves: a zip around a pickle."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def entries_of(bundle):
    """The entries of the exported program."""
    with zipfile.ZipFile(io.BytesIO(unpack(bundle).members[PORTABLE])) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def program(bundle, **changes):
    """The exported program with some entries replaced or added."""
    return write_zip(entries_of(bundle) | changes)


def with_program(bundle, data):
    """The bundle with another exported program, digests right again."""
    opened = unpack(bundle)
    return pack(opened.manifest, {**opened.members, PORTABLE: data})


def stored(name, kind, content):
    """A configuration that has torch unpickle an entry."""
    meta = {"dtype": 7, "sizes": [], "requires_grad": False, "device": {"type": "cpu", "index": None}, "strides": []}
    meta |= {"storage_offset": {"as_int": 0}, "layout": 7}
    payload = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": meta}
    folder = f"archive/data/{kind}"
    config = json.dumps({"config": {"extra": payload}}).encode()
    return {f"{folder}/model_{kind}_config.json": config, f"{folder}/{name}": content}


def graph_with(bundle, old, new):
    """The graph with one text replaced."""
    text = entries_of(bundle)[GRAPH].decode()
    assert old in text
    return {GRAPH: text.replace(old, new, 1).encode()}


def size_that_writes(mark):
    """A size whose evaluation leaves a mark."""
    return f"Symbol('s77', positive=True, integer=True) + 0*len(str(open('{mark}', 'w').close()))"


LIVE = {
    "weight": lambda bundle, mark: stored("weight_0", "weights", saved(Payload(mark))),
    "opaque constant": lambda bundle, mark: stored("opaque_obj_0", "constants", pickle.dumps(Payload(mark), 0)),
    "tensor constant": lambda bundle, mark: stored("tensor_0", "constants", saved([Payload(mark)])),
    "sample inputs": lambda bundle, mark: {SAMPLES: saved(Payload(mark))},
    "size": lambda bundle, mark: graph_with(
        bundle, "Symbol('s77', positive=True, integer=True)", size_that_writes(mark)
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_what_runs_in_torch_never_reaches_it(portable_bundle, judge, trust, tmp_path, name):
    """Each of these runs when torch reads the archive; a kernel with it is refused and nothing runs, signed or not."""
    mark = tmp_path / "mark"
    data = program(portable_bundle, **LIVE[name](portable_bundle, mark))
    with contextlib.suppress(Exception):  # whatever comes of it afterwards, the payload has run
        torch.export.load(io.BytesIO(data))
    assert mark.exists()
    mark.unlink()
    hostile = with_program(portable_bundle, data)
    kernel_id = kernel_id_of(hostile)
    with pytest.raises(KernelCorrupt, match=r"portable\.pt2: entry"):
        load_candidate(hostile, kernel_id)
    with pytest.raises(KernelCorrupt, match=r"portable\.pt2: entry"):
        load_kernel(hostile, judge(hostile), trust, kernel_id, None)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("torch.ops.aten.gelu.default", "torch.hub.load", "no target like 'torch.hub.load'"),
        ("torch.ops.aten.gelu.default", "torch.ops.aten.__class__.default", "no target like"),
        ("torch.ops.aten.gelu.default", "torch.ops.higher_order.while_loop", "no target like"),
        ('{"as_int": 37}', '{"as_string": "file"}', "no 'as_string' in hint"),
        ('"name": "gelu"', '"name": "gelu=1;import os"', "no name like"),
        ('"name": "gelu"', '"name": "__import__"', "no name like"),
        ('"guards_code": []', '"guards_code": ["x"]', "expected guards_code to be empty"),
        ('"metadata": {}', '"metadata": {"torch_fn": "a;b"}', "expected metadata to be empty"),
        ("[]}]}]", '{"__enum__": true, "fqn": "os:sep", "name": "a"}}]}]', "no in_spec like"),
        ('"forward_arg_names"', '"forward arg names"', "no 'forward arg names'"),
        ("builtins.tuple", "collections.namedtuple", "no in_spec like"),
    ],
)
def test_graphs_of_another_form_are_refused(portable_bundle, old, new, words):
    """Targets outside arithmetic on tensors, texts as arguments, and names that are no names do not pass."""
    if old == "[]}]}]":
        new = new.replace('"', '\\"')
    text = entries_of(portable_bundle)[GRAPH].decode()
    assert old in text
    with pytest.raises(UnsoundArchive, match=words):
        sound_archive(PORTABLE, program(portable_bundle, **{GRAPH: text.replace(old, new, 1).encode()}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"archive/data/extra.bin": b""}, r"entry 'data/extra\.bin' does not belong there"),
        ({"archive/../../evil": b""}, r"entry '\.\./\.\./evil' does not belong there"),
        ({"version": b"8.20"}, "entry 'version' does not belong there"),
        ({"archive/models/other.json": b"{}"}, "entry 'models/other.json' does not belong there"),
        ({GRAPH: b"\xff\xfe{\x00}\x00"}, "is no JSON"),
        ({GRAPH: b"[" * 100_000}, "is no JSON"),
        ({"archive/byteorder": b"big"}, "holds b'big', which no build writes"),
        ({CONSTANTS: b'{"config": {"a": 1}}'}, "which no build writes"),
    ],
)
def test_entries_of_another_form_are_refused(portable_bundle, changes, words):
    """Only entries that builds write, with what builds write in them."""
    with pytest.raises(UnsoundArchive, match=words):
        sound_archive(PORTABLE, program(portable_bundle, **changes))


def test_missing_entries_are_named(portable_bundle):
    """Without them torch would look for a form of older days."""
    entries = entries_of(portable_bundle)
    del entries[WEIGHTS]
    with pytest.raises(UnsoundArchive, match=r"entry data/weights/model_weights_config\.json is missing"):
        sound_archive(PORTABLE, write_zip(entries))


def zipped(entries, compression=zipfile.ZIP_STORED):
    """A zip with these (name, data) entries, repeats included."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", ["compressed", "twice", "over one another", "noise"])
def test_zips_that_readers_could_read_differently_are_refused(portable_bundle, form):
    """Compression, repeated names and overlapping entries are ways to show one reader what another does not see."""
    entries = list(entries_of(portable_bundle).items())
    if form == "compressed":
        data = zipped(entries, zipfile.ZIP_DEFLATED)
    elif form == "twice":
        data = zipped([*entries, entries[0]])
    elif form == "over one another":
        # The directory says that the second entry lies where the first does, under the name of the first.
        whole = zipped([("a/b", b"x" * 1000), ("a/c", b"x" * 1000)])
        second, directory = whole.index(b"PK\3\4", 1), whole.index(b"PK\1\2")
        other = whole.index(b"PK\1\2", directory + 1)
        listing = whole[directory:other] + whole[other:-22][:42] + bytes(4) + whole[other + 46 : -22]
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(listing), second, 0)
        data = whole[:second] + listing + end
    else:
        data = b"\x80\x04noise"
    with pytest.raises(UnsoundArchive, match="it is no archive of torch"):
        sound_archive(PORTABLE, data)


def test_what_passes_is_written_anew(portable_bundle):
    """Bytes around the entries of a zip are gone; a program as builds write it stays as it is."""
    data = unpack(portable_bundle).members[PORTABLE]
    assert data == sound_archive(PORTABLE, data)
    assert data == sound_archive(PORTABLE, b"MZ in front of the zip" + data)


PACKAGE = {
    "kernel/archive_format": b"pt2",
    "kernel/archive_version": b"0",
    "kernel/byteorder": b"little",
    "kernel/.data/version": b"6\n",
    "kernel/.data/serialization_id": b"150",
    "kernel/data/aotinductor/model/cabc.wrapper.so": b"\x7fELF",
    "kernel/data/aotinductor/model/cabc.wrapper.cpp": b"int main;",
    "kernel/data/aotinductor/model/cabc.wrapper_metadata.json": b'{"AOTI_DEVICE_KEY": "cpu"}',
}


def test_a_package_of_compiled_code_passes():
    """The form that AOTInductor writes."""
    data = write_zip(PACKAGE)
    assert data == sound_archive(FORWARD, data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel/models/model.json": b"{}"}, r"entry 'models/model\.json' does not belong there"),
        ({"kernel/data/constants/opaque_obj_0": b"\x80\x04"}, "does not belong there"),
        ({"kernel/data/aotinductor/other/c.wrapper.so": b"\x7fELF"}, "expected exactly one library"),
        ({"kernel/data/aotinductor/model/c.wrapper.so": None}, None),
        ({"kernel/data/aotinductor/model/cabc.wrapper_metadata.json": b'{"a": {}}'}, "not a JSON object of texts"),
        ({"kernel/data/aotinductor/model/cabc.wrapper_metadata.json": b"[" * 100_000}, "not a JSON object of texts"),
        ({"kernel/data/aotinductor/model/../../up.so": b""}, "expected exactly one library"),
    ],
)
def test_packages_of_another_form_are_refused(changes, words):
    """A compiled package has one library and no other way to have something run."""
    if words is None:
        entries = {name: data for name, data in PACKAGE.items() if not name.endswith(".so")}
        words = "expected exactly one library, found none"
    else:
        entries = PACKAGE | changes
    with pytest.raises(UnsoundArchive, match=words):
        sound_archive(FORWARD, write_zip(entries))


@pytest.mark.parametrize("layout", Layout)
def test_every_operation_passes(layout):
    """Whatever operation a blueprint may use, in its least usual setting, gives a graph that passes."""
    sequence = layout is Layout.SEQUENCE
    nodes = [
        node("norm", "norm", "x", affine=False),
        node("wide", "linear", "norm", features="2 * in", bias=False),
        node("a", "gelu", "wide"),
        node("b", "silu", "a"),
        node("c", "relu", "b"),
        node("d", "tanh", "c"),
        node("e", "sigmoid", "d"),
        node("f", "add", "e", "wide", "a"),
        node("g", "mul", "f", "b"),
        node("h", "scale", "g"),
    ]
    last = "h"
    if layout is not Layout.VECTOR:
        nodes += [
            node("conv", "conv", last, features="2 * in", kernel=5, dilation=3, depthwise=True, causal=sequence),
            node("pool", "mean_pool", "conv"),
            node("gated", "mul", "conv", "pool"),
            node("mixed", "attention", "gated", "conv", "gated", heads=2, causal=sequence),
        ]
        last = "mixed"
    blueprint = Blueprint(
        name="everything",
        title="Everything",
        description="Every operation once.",
        layouts=(layout,),
        nodes=(*nodes, node("out", "linear", last, features="out", init="zero")),
        birth=Birth.ZERO,
        causal=layout is Layout.VECTOR,
    )
    for signature in (Signature(layout, 6, 4), Signature(layout, 2, 2, "bfloat16")):
        bundle = build(blueprint, signature, Tier.PORTABLE)
        load_candidate(bundle, kernel_id_of(bundle))
