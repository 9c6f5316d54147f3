"""What a blueprint is: a small graph of known operations, as plain data without torch.

A blueprint describes ``delta(x)``, the module that a seed adds to its host. Sizes are expressions over the widths
``in`` and ``out`` of the site, so one blueprint serves every width::

    low_rank = Blueprint(
        name="low_rank",
        title="Low-rank adapter",
        description="...",
        layouts=(Layout.VECTOR, Layout.SEQUENCE, Layout.IMAGE),
        nodes=(
            node("norm", "norm", "x"),
            node("down", "linear", "norm", features="max(min(in, out) // 4, 4)", bias=False),
            node("up", "linear", "down", features="out", bias=False, init="zero"),
        ),
        birth=Birth.ZERO,
        causal=True,
    )
    low_rank.check(Signature(Layout.VECTOR, 64, 64)).parameters   # what it would cost there

The id is the SHA-256 of the canonical JSON, so equal blueprints have equal ids in every process.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from esper.kasmina.signature import Layout
from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.kasmina.blueprints.plan import Limits, Plan
    from esper.kasmina.signature import Signature

__all__ = ["INPUT", "IR_VERSION", "MAX_JSON_BYTES", "Birth", "Blueprint", "Node", "Value", "node"]

IR_VERSION = 1
INPUT = "x"
"""Name under which nodes refer to the input of the module."""
MAX_JSON_BYTES = 256 * 1024
Value = int | str | bool
"""An attribute of a node; sizes may be given as integers or as expressions."""


class Birth(StrEnum):
    """What the module computes at the instant at which it is born."""

    ZERO = "zero"
    """Exactly zero, with a living gradient: it may be added to the host at once."""
    RANDOM = "random"
    """A random function: it is trained in isolation first, or faded in."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a blueprint."""

    name: str
    """Unique in the blueprint; the prefix of its parameters' names."""
    op: str
    """One of `esper.kasmina.blueprints.ops.OPS`."""
    inputs: tuple[str, ...]
    """Names of earlier nodes, or ``x``."""
    attributes: tuple[tuple[str, Value], ...] = ()
    """Sorted by name; an attribute that is absent has the default of the operation."""

    @property
    def settings(self) -> dict[str, Value]:
        """The attributes as a dictionary."""
        return dict(self.attributes)


def node(name: str, op: str, *inputs: str, **attributes: Value) -> Node:
    """Write a node as one line: name, operation, inputs, attributes."""
    return Node(name, op, inputs, tuple(sorted(attributes.items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A graph of operations that maps the input of a site to what a seed adds there; the last node is its output.

    Raises:
        InvalidInput: a name, tag, reference or attribute is malformed; the message points at the node.
    """

    name: str
    """Short name, lower case with underscores; not unique, the id is."""
    title: str
    """A few words for people."""
    description: str
    """What it is good for and what it costs; a sentence or two."""
    tags: tuple[str, ...] = ()
    """Kinds, for queries: ``adapter``, ``mlp``, ``conv``, ``attention`` ..."""
    layouts: tuple[Layout, ...]
    """Layouts that it supports, in the order of `Layout`."""
    nodes: tuple[Node, ...]
    birth: Birth
    causal: bool
    """True where no position of a sequence can see a later one: the only blueprints that a language model may take."""

    def __post_init__(self) -> None:
        # Late: plan and ops read Node and Blueprint of this module.
        from esper.kasmina.blueprints.structure import check_structure

        check_structure(self)

    @property
    def id(self) -> str:
        """``sha256:`` and 64 hexadecimal digits of the canonical JSON."""
        return "sha256:" + hashlib.sha256(self.canonical_json().encode()).hexdigest()

    @property
    def output(self) -> Node:
        """The last node: its value is what the module returns."""
        return self.nodes[-1]

    def canonical_json(self) -> str:
        """The one text form: sorted keys, no spaces, ASCII only."""
        document = {
            "ir": IR_VERSION,
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "tags": list(self.tags),
            "layouts": [layout.value for layout in self.layouts],
            "birth": self.birth.value,
            "causal": self.causal,
            "nodes": [
                {"name": n.name, "op": n.op, "inputs": list(n.inputs), "attributes": n.settings} for n in self.nodes
            ],
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Blueprint:
        """Read a blueprint; key order and spaces are free, unknown keys are refused.

        Raises:
            InvalidInput: BLUEPRINT_MALFORMED when the text is no JSON, too long or of another form,
                BLUEPRINT_INVALID when a node is wrong; the message names the place.
        """
        if len(text) > MAX_JSON_BYTES:
            raise _malformed(f"blueprint: expected at most {MAX_JSON_BYTES} bytes of JSON, found {len(text)}")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(f"blueprint: expected JSON, found {error}") from error
        return _blueprint(document)

    def check(self, signature: Signature, limits: Limits | None = None) -> Plan:
        """Everything that can be known of this blueprint at a site without building it.

        Raises:
            InvalidInput: it cannot serve the signature, or a limit is exceeded; the message points at the node.
        """
        from esper.kasmina.blueprints.plan import Limits, plan

        return plan(self, signature, limits or Limits())

    def with_birth(self, birth: Birth) -> Blueprint:
        """The same graph born otherwise: its output matrix starts at zero, or at random."""
        last = self.output
        alive = "one" if last.op == "scale" else "uniform"
        settings = last.settings | {"init": "zero" if birth is Birth.ZERO else alive}
        return replace(self, birth=birth, nodes=(*self.nodes[:-1], node(last.name, last.op, *last.inputs, **settings)))


def _malformed(message: str) -> InvalidInput:
    return InvalidInput(message, reason="BLUEPRINT_MALFORMED")


_KEYS: Mapping[str, type] = {
    "ir": int,
    "name": str,
    "title": str,
    "description": str,
    "tags": list,
    "layouts": list,
    "birth": str,
    "causal": bool,
    "nodes": list,
}
_NODE_KEYS: Mapping[str, type] = {"name": str, "op": str, "inputs": list, "attributes": dict}


def _fields(where: str, document: object, keys: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise _malformed(f"{where}: expected an object, found {type(document).__name__}")
    if wrong := set(document) ^ set(keys):
        raise _malformed(f"{where}: expected exactly the keys {sorted(keys)}, found a difference in {sorted(wrong)}")
    for key, kind in keys.items():
        # bool is an int in Python; a contract tells them apart.
        if type(document[key]) is not kind:
            raise _malformed(
                f"{where}: expected {key} to be of type {kind.__name__}, found {type(document[key]).__name__}"
            )
    return document


def _strings(where: str, values: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise _malformed(f"{where}: expected strings, found {reprlib.repr(values):.80}")
    return tuple(values)


def _node(position: int, document: object) -> Node:
    fields = _fields(f"blueprint: node {position}", document, _NODE_KEYS)
    where = f"node {fields['name']!r:.60}"
    for key, value in fields["attributes"].items():
        if type(value) not in {int, str, bool}:
            raise _malformed(
                f"{where}: expected attribute {key!r} to be an integer, a string or a boolean, "
                f"found {type(value).__name__}"
            )
    # Not by `node`, whose own arguments an attribute might be called after.
    inputs = _strings(f"{where}: inputs", fields["inputs"])
    return Node(fields["name"], fields["op"], inputs, tuple(sorted(fields["attributes"].items())))


def _blueprint(document: object) -> Blueprint:
    fields = _fields("blueprint", document, _KEYS)
    if fields["ir"] != IR_VERSION:
        raise _malformed(f"blueprint: expected IR version {IR_VERSION}, found {fields['ir']}")
    layouts = _strings("blueprint: layouts", fields["layouts"])
    if unknown := [layout for layout in layouts if layout not in set(Layout)]:
        raise _malformed(f"blueprint: expected layouts among {[x.value for x in Layout]}, found {unknown[0]!r:.40}")
    if fields["birth"] not in set(Birth):
        raise _malformed(f"blueprint: expected birth zero or random, found {fields['birth']!r:.40}")
    return Blueprint(
        name=fields["name"],
        title=fields["title"],
        description=fields["description"],
        tags=_strings("blueprint: tags", fields["tags"]),
        layouts=tuple(Layout(layout) for layout in layouts),
        nodes=tuple(_node(position, entry) for position, entry in enumerate(fields["nodes"])),
        birth=Birth(fields["birth"]),
        causal=fields["causal"],
    )
