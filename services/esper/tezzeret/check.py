"""Judges an IR without building it: every problem that can be known beforehand, each with its node."""

from dataclasses import dataclass

from esper.kasmina.blueprints import Blueprint
from esper.kasmina.signature import Signature
from esper.mesh.errors import FieldViolation, InvalidInput

__all__ = ["Report", "judge"]

TYPICAL_WIDTHS = ((64, 64), (16, 32), (1, 1))
"""Input and output widths for which an IR is tried when no signature is given."""
_MAX_PROBLEMS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is known of an IR."""

    problems: tuple[FieldViolation, ...] = ()
    """Field: the node, empty for the whole. Description: the thing, the expectation, the finding."""
    blueprint_id: str = ""
    """Id in canonical form; empty when the IR is no sound blueprint anywhere."""
    parameters: int = 0
    """For the signature given; 0 otherwise."""
    flops_per_position: int = 0
    """For the signature given; 0 otherwise."""


def judge(ir: bytes, signature: Signature | None) -> Report:
    """Check an IR for a signature, or for typical ones of each of its layouts.

    Raises:
        InvalidInput: BLUEPRINT_MALFORMED, it cannot be read at all.
    """
    try:
        blueprint = Blueprint.from_json(ir)
    except InvalidInput as error:
        if error.reason == "BLUEPRINT_MALFORMED":
            raise
        return Report(problems=_problems(error))
    problems: list[FieldViolation] = []
    for place in (signature,) if signature is not None else _typical(blueprint):
        try:
            plan = blueprint.check(place)
        except InvalidInput as error:
            problems += [problem for problem in _problems(error) if problem not in problems]
    if problems or signature is None:
        return Report(problems=tuple(problems[:_MAX_PROBLEMS]), blueprint_id=blueprint.id)
    return Report(blueprint_id=blueprint.id, parameters=plan.parameters, flops_per_position=round(plan.flops))


def _typical(blueprint: Blueprint) -> list[Signature]:
    return [Signature(layout, *widths) for layout in blueprint.layouts for widths in TYPICAL_WIDTHS]


def _problems(error: InvalidInput) -> tuple[FieldViolation, ...]:
    return error.violations or (FieldViolation("", error.public),)
