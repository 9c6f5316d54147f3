"""Which kernels a run should find in the library: the builds to ask for, most useful first, within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from esper.mesh.settings import Section
from esper.tamiyo.choice import nature
from esper.tamiyo.placement import order_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from esper.kasmina.control import RunHello, SiteDescriptor
    from esper.kasmina.signature import Layout, Signature

__all__ = ["BlueprintFacts", "BuildWish", "PreparationRules", "wishes"]

Tier = Literal["portable", "standard", "aggressive"]
Bound = Annotated[int, Field(ge=0, le=256)]


class PreparationRules(Section):
    """Builds that the controller asks the library for when it hears of a run."""

    tiers: tuple[Tier, ...] = ("portable", "standard")
    """Tiers asked for; the earlier ones with higher priority."""

    prepare_tiers: tuple[Tier, ...] = ("portable",)
    """Tiers that PrepareRun counts as pending: a run waits for these and takes the others when they come."""

    prepare_signatures: Annotated[int, Field(ge=1, le=64)] = 3
    """Signatures that a run waits for: those of the sites that would grow first."""

    prepare_blueprints: Annotated[int, Field(ge=1, le=64)] = 4
    """Blueprints that a run waits for at each of them: those with the best prior."""

    portable_builds: Bound = 32
    """Most portable builds asked for in all; beyond those waited for they have low priority."""

    standard_builds: Bound = 4
    """Most standard builds asked for: each takes a compiler some twenty seconds of two cores."""

    aggressive_builds: Bound = 2
    """Most aggressive builds asked for, where `tiers` names the tier: each takes a compiler minutes."""

    wait_s: Annotated[float, Field(ge=0, le=60)] = 5.0
    """Time that PrepareRun gives a library that has no blueprints yet, as in the first moments of a mesh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlueprintFacts:
    """A blueprint that may be built, as the library describes it."""

    blueprint_id: str
    name: str
    layouts: frozenset[Layout]
    causal: bool
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildWish:
    """One build to ask for."""

    blueprint_id: str
    signature: Signature
    tier: Tier
    target: str
    priority: int
    """0 to 100; higher is built first."""
    awaited: bool
    """True: a run that prepares waits for it."""


def wishes(hello: RunHello, blueprints: Iterable[BlueprintFacts], rules: PreparationRules) -> list[BuildWish]:
    """Builds for a run, most urgent first; each (blueprint, signature, tier) once."""
    pairs = _pairs(hello, list(blueprints), rules)
    result: list[BuildWish] = []
    bounds = {
        "portable": rules.portable_builds,
        "standard": rules.standard_builds,
        "aggressive": rules.aggressive_builds,
    }
    for place, tier in enumerate(rules.tiers):
        for pair, (signature, blueprint_id, first) in enumerate(pairs[: bounds[tier]]):
            result.append(
                BuildWish(
                    blueprint_id=blueprint_id,
                    signature=signature,
                    tier=tier,
                    target="" if tier == "portable" else hello.target,
                    priority=max(0, (80 if first else 50) - 60 * place - min(pair, 9)),
                    awaited=first and tier in rules.prepare_tiers,
                )
            )
    return result


def _pairs(
    hello: RunHello, blueprints: Sequence[BlueprintFacts], rules: PreparationRules
) -> list[tuple[Signature, str, bool]]:
    """(signature, blueprint, waited for), in the order in which sites would grow before anything is measured."""
    allowed = [b for b in blueprints if not hello.blueprints or b.name in hello.blueprints]
    first: dict[tuple[Signature, str], None] = {}
    others: dict[tuple[Signature, str], None] = {}
    signatures: dict[Signature, None] = {}
    for site in sorted(hello.sites, key=lambda s: order_of(s, s.narrowest_width, 0, None)):
        new = site.signature not in signatures
        signatures.setdefault(site.signature)
        leading = len(signatures) <= rules.prepare_signatures and new
        for place, blueprint in enumerate(_fitting(site, allowed)):
            wanted = first if leading and place < rules.prepare_blueprints else others
            wanted.setdefault((site.signature, blueprint.blueprint_id))
    return [
        *((*pair, True) for pair in first),
        *((*pair, False) for pair in others if pair not in first),
    ]


def _fitting(site: SiteDescriptor, blueprints: Sequence[BlueprintFacts]) -> list[BlueprintFacts]:
    found = [b for b in blueprints if site.signature.layout in b.layouts and (b.causal or not site.causal)]
    return sorted(found, key=lambda b: (-nature(b.tags, site), b.name, b.blueprint_id))
