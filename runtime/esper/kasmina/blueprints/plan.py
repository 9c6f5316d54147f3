"""A blueprint at a site, worked out without torch: the width of every value, every parameter, the cost.

The torch module and the compiled kernel are built from a `Plan` and from nothing else, so what this module refuses
never reaches a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina.blueprints.expressions import evaluate
from esper.kasmina.blueprints.ir import INPUT
from esper.kasmina.blueprints.ops import OPS, Flow, RuleError, Situation
from esper.kasmina.blueprints.structure import Problem, refuse, settings_of
from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from esper.kasmina.blueprints.ir import Blueprint, Node
    from esper.kasmina.blueprints.ops import Outcome, ParameterSpec
    from esper.kasmina.signature import Signature

__all__ = ["Limits", "Plan", "PlannedNode", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large a module may be."""

    depth: int = 32
    """Longest chain of nodes."""
    parameters: int = 64 << 20
    """Trainable scalars."""
    flops: float = 1e9
    """Floating-point operations of the forward per position."""


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """A node with every size known."""

    name: str
    op: str
    inputs: tuple[str, ...]
    settings: Mapping[str, int | str | bool]
    """All attributes of the operation; sizes are integers."""
    inputs_flow: tuple[Flow, ...]
    flow: Flow


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a blueprint is at one signature."""

    blueprint: Blueprint
    signature: Signature
    nodes: tuple[PlannedNode, ...]
    parameter_specs: tuple[ParameterSpec, ...]
    """In the order in which the compiled functions take them."""
    parameters: int
    """Trainable scalars."""
    flops: float
    """Of the forward, per position; what depends on the number of positions is counted at `NOMINAL_EXTENT`."""
    depth: int
    """Longest chain of nodes."""


def plan(blueprint: Blueprint, signature: Signature, limits: Limits) -> Plan:
    """Work a blueprint out for a signature.

    Raises:
        InvalidInput: reason BLUEPRINT_INVALID; every problem found is a violation that names its node.
    """
    if signature.layout not in blueprint.layouts:
        known = [layout.value for layout in blueprint.layouts]
        refuse(
            [Problem("", f"blueprint {blueprint.name}: expected a layout in {known}, found {signature.layout.value}")]
        )
    flows: dict[str, Flow] = {INPUT: Flow(signature.in_features)}
    outcomes: dict[str, Outcome] = {}
    planned: list[PlannedNode] = []
    problems: list[Problem] = []
    for n in blueprint.nodes:
        if not all(name in flows for name in n.inputs):
            continue  # its input is wrong; to say so again helps nobody
        inputs = tuple(flows[name] for name in n.inputs)
        try:
            settings = _sizes(n, signature)
            outcome = OPS[n.op].rule(Situation(n.name, signature.layout, inputs, settings))
        except (RuleError, InvalidInput) as error:
            problems.append(Problem(n.name, f"node {n.name!r} at {signature}: {error}"))
            continue
        flows[n.name], outcomes[n.name] = outcome.flow, outcome
        planned.append(PlannedNode(n.name, n.op, n.inputs, settings, inputs, outcome.flow))
    refuse(problems)
    specs = tuple(spec for outcome in outcomes.values() for spec in outcome.parameters)
    result = Plan(
        blueprint=blueprint,
        signature=signature,
        nodes=tuple(planned),
        parameter_specs=specs,
        parameters=sum(spec.elements for spec in specs),
        flops=sum(outcome.flops for outcome in outcomes.values()),
        depth=_depth(blueprint),
    )
    refuse(list(_about_output(result)) + list(_about_limits(result, limits)))
    return result


def _sizes(n: Node, signature: Signature) -> dict[str, int | str | bool]:
    settings = settings_of(n)
    symbols = {"in": signature.in_features, "out": signature.out_features}
    for key, attribute in OPS[n.op].attributes.items():
        if attribute.kind == "size":
            value = evaluate(str(settings[key]), symbols)
            if not attribute.low <= value <= attribute.high:
                bounds = f"{attribute.low} to {attribute.high}"
                raise RuleError(f"attribute {key} = {settings[key]}: expected {bounds}, found {value}")
            settings[key] = value
    return settings


def _depth(blueprint: Blueprint) -> int:
    depth = {INPUT: 0}
    for n in blueprint.nodes:
        depth[n.name] = 1 + max(depth[name] for name in n.inputs)
    return depth[blueprint.output.name]


def _about_output(result: Plan) -> Iterator[Problem]:
    last, wanted = result.nodes[-1], result.signature.out_features
    if last.flow.pooled:
        yield Problem(
            last.name, f"node {last.name!r}: the output must have one vector per position, found a pooled value"
        )
    if last.flow.features != wanted:
        text = (
            f"node {last.name!r} at {result.signature}: expected {wanted} output features, found {last.flow.features}"
        )
        yield Problem(last.name, text)


def _about_limits(result: Plan, limits: Limits) -> Iterator[Problem]:
    name = result.blueprint.name
    for what, found, most in (
        ("depth", result.depth, limits.depth),
        ("parameters", result.parameters, limits.parameters),
        ("FLOPs per position", result.flops, limits.flops),
    ):
        if found > most:
            yield Problem(
                "", f"blueprint {name} at {result.signature}: expected at most {most:,} {what}, found {found:,}"
            )
