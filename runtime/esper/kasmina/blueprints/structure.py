"""What can be said of a blueprint wherever it may grow: names, references, attributes, birth, causality."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina.blueprints.expressions import evaluate
from esper.kasmina.blueprints.ops import OPS
from esper.kasmina.signature import Layout
from esper.mesh.errors import FieldViolation, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.kasmina.blueprints.ir import Blueprint, Node
    from esper.kasmina.blueprints.ops import Attribute, Op

__all__ = ["MAX_EDGES", "MAX_NODES", "Problem", "check_structure", "refuse", "settings_of"]

MAX_NODES = 64
MAX_EDGES = 128
_INPUT = "x"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TAG = re.compile(r"[a-z][a-z0-9_-]{0,31}")
# Node names become attributes of a torch module, where these mean something else; a test keeps the list complete.
_RESERVED_NAMES = """
T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches eager
eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu kernel load_state_dict
modules mtia named_buffers named_children named_modules named_parameters parameters plan register_backward_hook
register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
set_submodule share_memory state_dict to to_empty train training type xpu zero_grad
"""
_RESERVED = frozenset(_RESERVED_NAMES.split())
_TEXT_LIMITS = {"title": 128, "description": 512}
# Valid in a Python string and in JSON, but in no UTF-8: contracts and databases refuse it.
_HALF = re.compile("[\ud800-\udfff]")
# Any width serves to see whether an expression can be read.
_PROBE = {"in": 64, "out": 64}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a blueprint."""

    node: str
    """Name of the node; empty when it is about the whole."""
    message: str
    """The thing, the expectation and the finding."""


def refuse(problems: Sequence[Problem]) -> None:
    """Raise all problems as one error, or return when there is none.

    Raises:
        InvalidInput: reason BLUEPRINT_INVALID, the first problem as its text, every problem as a violation.
    """
    if problems:
        raise InvalidInput(
            problems[0].message,
            reason="BLUEPRINT_INVALID",
            violations=[FieldViolation(problem.node, problem.message) for problem in problems],
        )


def check_structure(blueprint: Blueprint) -> None:
    """Refuse what could not be right at any site.

    Raises:
        InvalidInput: see `refuse`.
    """
    refuse(list(_about_the_whole(blueprint)))
    refuse([problem for n, earlier in _with_earlier(blueprint) for problem in _about_node(blueprint, n, earlier)])
    refuse([*_about_use(blueprint), *_about_birth(blueprint), *_about_causality(blueprint)])


def settings_of(n: Node) -> dict[str, int | str | bool]:
    """The attributes of a checked node, defaults filled in; sizes may still be expressions."""
    defaults = {name: a.default for name, a in OPS[n.op].attributes.items() if a.default is not None}
    return defaults | n.settings


def _about_the_whole(blueprint: Blueprint) -> Iterator[Problem]:
    if not _NAME.fullmatch(blueprint.name):
        yield Problem("", f"blueprint name: expected {_NAME.pattern}, found {blueprint.name!r:.80}")
    for key, limit in _TEXT_LIMITS.items():
        text = getattr(blueprint, key)
        if not 1 <= len(text) <= limit:
            yield Problem("", f"blueprint {key}: expected 1 to {limit} characters, found {len(text)}")
        if half := _HALF.search(text):
            yield Problem("", f"blueprint {key}: expected Unicode, found half a surrogate pair, {half.group()!r}")
    if len(blueprint.tags) > 16 or not all(_TAG.fullmatch(tag) for tag in blueprint.tags):
        yield Problem("", f"blueprint tags: expected at most 16 of {_TAG.pattern}, found {blueprint.tags!r:.80}")
    if not blueprint.layouts or list(blueprint.layouts) != [x for x in Layout if x in blueprint.layouts]:
        order = ", ".join(Layout)
        found = [x.value for x in blueprint.layouts]
        yield Problem("", f"blueprint layouts: expected at least one, each once, in the order {order}, found {found}")
    if not 1 <= len(blueprint.nodes) <= MAX_NODES:
        yield Problem("", f"blueprint nodes: expected 1 to {MAX_NODES}, found {len(blueprint.nodes)}")
    if (edges := sum(len(n.inputs) for n in blueprint.nodes)) > MAX_EDGES:
        yield Problem("", f"blueprint edges: expected at most {MAX_EDGES}, found {edges}")


def _with_earlier(blueprint: Blueprint) -> Iterator[tuple[Node, set[str]]]:
    earlier = {_INPUT}
    for n in blueprint.nodes:
        yield n, set(earlier)
        earlier.add(n.name)


def _about_node(blueprint: Blueprint, n: Node, earlier: set[str]) -> Iterator[Problem]:
    def problem(message: str) -> Problem:
        return Problem(n.name[:64], f"node {n.name!r:.80}: {message}")

    if not _NAME.fullmatch(n.name):
        yield problem(f"expected a name of the form {_NAME.pattern}")
    if n.name in _RESERVED:
        yield problem("the name belongs to torch.nn.Module; choose another")
    if n.name in earlier:
        yield problem("its name is taken by the input or an earlier node")
    op = OPS.get(n.op)
    if op is None:
        yield problem(f"op {n.op!r:.40} is not known; expected one of {', '.join(OPS)}")
        return
    if not op.arity[0] <= len(n.inputs) <= op.arity[1]:
        yield problem(f"op {n.op} takes {op.arity[0]} to {op.arity[1]} inputs, found {len(n.inputs)}")
    if missing := [name for name in n.inputs if name not in earlier]:
        yield problem(f"expected inputs among x and the nodes before it, found {missing[0]!r:.80}")
    if absent := [layout.value for layout in blueprint.layouts if layout not in op.layouts]:
        yield problem(f"op {n.op} does not exist for layout {absent[0]}, which the blueprint promises")
    for message in _about_attributes(n, op):
        yield problem(message)


def _about_attributes(n: Node, op: Op) -> Iterator[str]:
    for key, count in Counter(key for key, _ in n.attributes).items():
        if key not in op.attributes or count > 1:
            known = ", ".join(op.attributes) or "none"
            yield f"attribute {key!r:.40} is not one of {n.op}, or is given twice; it has {known}"
    for key, attribute in op.attributes.items():
        value = n.settings.get(key, attribute.default)
        if value is None:
            yield f"op {n.op} needs attribute {key}"
        elif wrong := _about_value(attribute, value):
            yield f"attribute {key}: {wrong}"


def _about_value(attribute: Attribute, value: int | str | bool) -> str:
    if attribute.kind == "flag":
        return "" if isinstance(value, bool) else f"expected true or false, found {value!r:.40}"
    if attribute.kind == "choice":
        return "" if value in attribute.choices else f"expected one of {list(attribute.choices)}, found {value!r:.40}"
    if isinstance(value, bool):
        return f"expected a size, found {value!r}"
    try:
        evaluate(str(value), _PROBE)
    except InvalidInput as error:
        return error.public
    return ""


def _about_use(blueprint: Blueprint) -> Iterator[Problem]:
    used = {name for n in blueprint.nodes for name in n.inputs}
    for n in blueprint.nodes[:-1]:
        if n.name not in used:
            yield Problem(n.name, f"node {n.name!r}: no later node uses it; its parameters could never learn")


def _about_birth(blueprint: Blueprint) -> Iterator[Problem]:
    last = blueprint.output
    zero = [n for n in blueprint.nodes if settings_of(n).get("init") == "zero"]
    if blueprint.birth == "zero":
        if last not in zero:
            yield Problem(last.name, f"node {last.name!r}: birth zero expects the last node to have init 'zero'")
        for n in zero:
            if n is not last:
                text = f"node {n.name!r}: only the last node may start at zero, else the gradient at birth is dead"
                yield Problem(n.name, text)
    elif zero:
        yield Problem(zero[0].name, f"node {zero[0].name!r}: birth random expects no init 'zero'")


def _about_causality(blueprint: Blueprint) -> Iterator[Problem]:
    if not blueprint.causal:
        return
    for n in blueprint.nodes:
        if OPS[n.op].looks_ahead(settings_of(n)):
            text = f"node {n.name!r}: op {n.op} lets a position see later ones, but the blueprint says it is causal"
            yield Problem(n.name, text)
