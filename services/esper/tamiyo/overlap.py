"""Which sites of a host cover the same modules, as far as their names and depths tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.kasmina.control import SiteDescriptor

__all__ = ["Overlaps"]


@dataclass(frozen=True, slots=True)
class _Cover:
    """Which modules a site covers."""

    index: int
    depth: float
    ends: tuple[str, ...]
    """The module, or first and last of a span."""
    inside: tuple[str, ...]
    """The ends with a dot: what the names of modules inside begin with."""
    low: float
    high: float
    """Depths of the ends of a span; an empty interval for what is none."""


class Overlaps:
    """Answers for one host; each site is compared with all others once, when it is first asked for.

    Args:
        sites: of the host.
    """

    def __init__(self, sites: Sequence[SiteDescriptor]) -> None:
        depths = {site.name: site.depth for site in sites}
        self._covers = {site.index: _cover(site, depths) for site in sites}
        self._known: dict[int, frozenset[int]] = {}

    def around(self, index: int) -> frozenset[int]:
        """Indices of the sites that overlap one, itself included; none for an index that the host does not have."""
        if index not in self._covers:
            return frozenset()
        if index not in self._known:
            mine = self._covers[index]
            self._known[index] = frozenset(other.index for other in self._covers.values() if _overlap(mine, other))
        return self._known[index]


def _cover(site: SiteDescriptor, depths: dict[str, float]) -> _Cover:
    ends = tuple(site.name.split(".."))
    span = len(ends) == 2 and ends[0] in depths and ends[1] in depths
    low, high = (depths[ends[0]], depths[ends[1]]) if span else (2.0, -1.0)
    return _Cover(site.index, site.depth, ends, tuple(f"{end}." for end in ends), low, high)


def _overlap(one: _Cover, other: _Cover) -> bool:
    """By name, one inside the other, or between the ends of a span."""
    if one.low <= other.depth <= one.high or other.low <= one.depth <= other.high:
        return True
    return any(
        a == b or a.startswith(inside_b) or b.startswith(inside_a)
        for a, inside_a in zip(one.ends, one.inside, strict=True)
        for b, inside_b in zip(other.ends, other.inside, strict=True)
    )
