"""What torch's own archives inside a bundle may hold: data that torch reads without running any of it. Torch-free.

torch reads its archives as files of a friend. It unpickles weights, constants and sample inputs where the archive says
so, evaluates sizes as Python, imports the modules that a tree of arguments names, and pastes names into source code. So
an archive reaches torch only when every entry of it, and every text in its graph, has the form that builds write::

    data = sound_archive("portable.pt2", opened.members["portable.pt2"])   # or UnsoundArchive, with every reason

What comes back is written anew from the entries that were looked at: another reader of zips finds nothing else in it.
Compiled packages hold native code besides, which nobody can look through; for them the form says that no other way
leads to running something.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import TYPE_CHECKING

from esper.kasmina.kernels.bundle import PORTABLE, write_zip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["UnsoundArchive", "sound_archive"]


class UnsoundArchive(ValueError):
    """An archive holds more, or something else, than builds write; the text lists the reasons."""

    def __init__(self, name: str, reasons: list[str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for reason in reasons[:_MAX_REASONS]))


_MAX_REASONS = 8
_GRAPH = "models/model.json"
_EVERYWHERE: Mapping[str, bytes] = {
    "archive_format": rb"pt2",
    "archive_version": rb"0",
    "byteorder": rb"little",
    ".data/version": rb"\d{1,4}\n?",
    ".data/serialization_id": rb"\d{1,64}",
}
# A kernel's parameters are arguments of its graph, so nothing is stored beside the graph: each of these three could
# otherwise hold pickles, or ask for them.
_PROGRAM: Mapping[str, bytes] = {
    **_EVERYWHERE,
    "data/weights/model_weights_config.json": rb'\{"config": \{\}\}',
    "data/constants/model_constants_config.json": rb'\{"config": \{\}\}',
    "data/sample_inputs/model.pt": rb"",
}
_COMPILED = re.compile(r"data/aotinductor/model/\w{1,128}(\.\w{1,32})?\.(cpp|json|so|cubin)")


def sound_archive(name: str, content: bytes) -> bytes:
    """The archive written anew, if it holds what a build writes and nothing else.

    Args:
        name: of the member: says whether it is the exported program or a compiled package.
        content: its bytes.

    Raises:
        UnsoundArchive: with every reason found.
    """
    try:
        entries = _entries(content)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        raise UnsoundArchive(name, [f"it is no archive of torch: {error!s:.120}"]) from error
    root = next(iter(entries), "").partition("/")[0]
    inner = {path.removeprefix(f"{root}/"): data for path, data in entries.items()}
    if reasons := list(_program(inner) if name == PORTABLE else _package(inner)):
        raise UnsoundArchive(name, reasons)
    return write_zip(entries)


def _entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        listed = archive.infolist()
        names = [entry.filename for entry in listed]
        if len(set(names)) != len(names) or any(entry.compress_type != zipfile.ZIP_STORED for entry in listed):
            raise ValueError("expected stored entries with distinct names")
        # Entries may lie over one another, so that few bytes are many when each is read.
        if sum(entry.file_size for entry in listed) > len(content):
            raise ValueError("expected entries of together at most its own size")
        return {name: archive.read(name) for name in names}


def _program(entries: Mapping[str, bytes]) -> Iterator[str]:
    for name in sorted({*_PROGRAM, _GRAPH} - set(entries)):
        yield f"entry {name} is missing"
    for name, data in entries.items():
        if name != _GRAPH:
            yield from _expected(name, data, _PROGRAM)
        else:
            yield from _graph(data)


def _package(entries: Mapping[str, bytes]) -> Iterator[str]:
    # Without a library torch would have a compiler make one, with options from the package.
    if sum(name.endswith(".so") for name in entries) != 1:
        yield "expected exactly one library, found none or several"
    for name, data in entries.items():
        if not _COMPILED.fullmatch(name):
            yield from _expected(name, data, _EVERYWHERE)
        elif name.endswith(".json") and not _flat(data):
            yield f"entry {name:.80} is not a JSON object of texts"


def _expected(name: str, data: bytes, contents: Mapping[str, bytes]) -> Iterator[str]:
    if name not in contents:
        yield f"entry {name!r:.80} does not belong there"
    elif not re.fullmatch(contents[name], data):
        yield f"entry {name} holds {data[:40]!r}, which no build writes"


def _flat(data: bytes) -> bool:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and all(isinstance(value, str) for value in document.values())


# Names become source code. Two underscores in front are for Python's own.
_WORD = re.compile(r"(?!__)[A-Za-z0-9_]{0,128}", re.ASCII)
_TEXTS: Mapping[str, re.Pattern[str]] = {
    # Looked up in torch and called. `aten` is arithmetic on tensors, once no argument can be a text (a file's name).
    "target": re.compile(
        r"torch\.ops\.aten\.(?!__)\w{1,80}\.(?!__)\w{1,80}|_operator\.(add|sub|mul|floordiv|mod|neg)", re.ASCII
    ),
    # Evaluated as Python.
    "expr_str": re.compile(
        r"((Symbol\('s\d{1,9}'|Integer\(-?\d{1,18}|(Add|Mul|Pow|Mod|FloorDiv|Max|Min)\(|positive=True|integer=True)"
        r"|[)]|, ){1,256}",
        re.ASCII,
    ),
    # JSON again, whose objects may name classes to import.
    "in_spec": (
        tree := re.compile(r'([]\[{}:, 1]|null|"(type|context|children_spec|null|\[\]|builtins\.(tuple|list|dict))")*')
    ),
    "out_spec": tree,
    "torch_version": re.compile(r"[\w.+-]{1,64}", re.ASCII),
}
_ARGUMENTS = frozenset(
    f"as_{kind}"
    for kind in (
        *("tensor", "tensors", "none", "int", "ints", "float", "floats", "bool", "bools", "name", "expr"),
        *("sym_int", "sym_ints", "scalar_type", "memory_format", "layout", "device"),
    )
)
"""Kinds of arguments; texts, graphs, operators and objects are none of them."""
_EMPTY = frozenset({"custom_obj_values", "guards_code", "metadata", "treespec_namedtuple_fields"})


def _graph(data: bytes) -> Iterator[str]:
    """What is wrong with an exported graph."""
    try:
        document = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        yield f"entry {_GRAPH} is no JSON: {error!s:.80}"
        return
    pending: list[tuple[str, object]] = [("graph", document)]
    while pending:
        key, value = pending.pop()
        if key in _EMPTY and value:
            yield f"entry {_GRAPH}: expected {key} to be empty, found {value!r:.60}"
        elif isinstance(value, dict):
            for inner, held in value.items():
                if not _WORD.fullmatch(inner) or (inner.startswith("as_") and inner not in _ARGUMENTS):
                    yield f"entry {_GRAPH}: expected no {inner!r:.60} in {key:.40}"
                pending.append((inner, held))
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, str) and not _TEXTS.get(key, _WORD).fullmatch(value):
            yield f"entry {_GRAPH}: expected no {key:.40} like {value!r:.80}"
