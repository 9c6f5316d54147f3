"""Blueprints as the library keeps them: the canonical IR, what can be read from it, and whether it is in use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType

from esper.kasmina.blueprints import ir
from esper.kasmina.blueprints.ir import Birth
from esper.kasmina.signature import Layout
from esper.mesh.errors import InvalidInput
from esper.mesh.identity import Role

__all__ = ["LAWFUL", "Birth", "Blueprint", "BlueprintState", "read_ir"]


class BlueprintState(StrEnum):
    """Whether a blueprint may be built."""

    ACTIVE = "active"
    """May be built. Entered on submission, and from ARCHIVED when an operator submits it again."""

    ARCHIVED = "archived"
    """Kept for lineage, no longer built or chosen. Entered from ACTIVE by an operator."""


LAWFUL: Mapping[tuple[BlueprintState | None, BlueprintState], frozenset[Role]] = MappingProxyType(
    {
        (None, BlueprintState.ACTIVE): frozenset(Role) - {Role.ANONYMOUS},
        (BlueprintState.ACTIVE, BlueprintState.ARCHIVED): frozenset({Role.OPERATOR}),
        (BlueprintState.ARCHIVED, BlueprintState.ACTIVE): frozenset({Role.OPERATOR}),
    }
)
"""(from, to) -> roles entitled to it; every pair that is missing is unlawful. None stands for "not stored yet"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """One blueprint of the library."""

    sequence: int
    """Number of the change that stored it: newer blueprints have larger ones."""

    id: str
    """Digest of the IR."""

    name: str
    """Short name for people; not unique."""

    description: str
    """One or two sentences for people."""

    layouts: tuple[Layout, ...]
    """Layouts that it supports."""

    birth: Birth
    """What the module computes when it is born."""

    causal: bool
    """True when no position of a sequence sees a later one."""

    tags: tuple[str, ...]
    """Labels from the IR."""

    parent_ids: tuple[str, ...]
    """Blueprints that it was derived from."""

    author: str
    """Identity that submitted it first."""

    state: BlueprintState
    """Whether it may be built."""

    create_time: datetime
    """When it was first submitted."""

    ir: bytes = field(default=b"", repr=False)
    """Canonical JSON; empty where a listing leaves it out."""


def read_ir(data: bytes) -> ir.Blueprint:
    """Read an IR that must be in canonical form: its digest names the blueprint, so there is one spelling only.

    Raises:
        InvalidInput: BLUEPRINT_MALFORMED when it is not canonical JSON of the documented form, BLUEPRINT_INVALID when a
            node can be right at no site.
    """
    blueprint = ir.Blueprint.from_json(data)
    canonical = blueprint.canonical_json().encode()
    if canonical != data:
        raise InvalidInput(
            f"blueprint {blueprint.name}: expected canonical JSON (sorted keys, no spaces, ASCII; "
            f"{len(canonical)} bytes), found another spelling of it ({len(data)} bytes)",
            reason="BLUEPRINT_MALFORMED",
        )
    return blueprint
