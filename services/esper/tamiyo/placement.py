"""Where: sites in the order in which they should grow.

Narrowest first, which nobody has beaten by much (regret 0.8 points; random 6.5), then lowest effective rank (1.7).
Width counts what has grown already: a width of 4 with one seed around it ranks like 8. Among equals a branch around
the narrow part comes first, because an adapter of fixed width cannot repair a width bottleneck.

Where the rules say so, the bottleneck score that the runtime measures decides before the width; what has grown around a
site divides it. Sites without a score come after those that have one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina.control import SiteKind, Stage
from esper.tamiyo.memory import SiteMark

if TYPE_CHECKING:
    from esper.kasmina.control import SiteDescriptor
    from esper.tamiyo.domain import Situation

__all__ = ["Candidate", "candidates", "order_of", "repairs"]

_GRANULARITY = {"span": 0, "block": 1, "layer": 2}
_OUTPUT_DEPTH = 0.999


@dataclass(frozen=True, slots=True)
class Candidate:
    """A site that may grow, and why it ranks where it does."""

    site: SiteDescriptor
    mark: SiteMark
    grown: int
    """Seeds that live, or were kept, at sites that overlap this one."""

    @property
    def width(self) -> int:
        """Narrowest width, times one more than the seeds grown around it."""
        return self.site.narrowest_width * (1 + self.grown)

    @property
    def score(self) -> float | None:
        """Bottleneck score, shared with the seeds grown around it: they may have repaired it since it was measured."""
        return None if self.mark.bottleneck is None else self.mark.bottleneck / (1 + self.grown)

    @property
    def narrowest(self) -> str:
        """Narrowest width and the seeds that grew around it, in words."""
        grown = f" ({self.grown} grown)" if self.grown else ""
        return f"narrowest width {self.site.narrowest_width}{grown}"

    def __str__(self) -> str:
        rank = "not measured" if self.mark.effective_rank is None else f"{self.mark.effective_rank:.3g}"
        full = "not measured" if self.mark.saturation is None else f"{self.mark.saturation:.2f}"
        score = "not measured" if self.mark.bottleneck is None else f"{self.mark.bottleneck:.3g}"
        return (
            f"site {self.site.name} ({self.site.kind.value}): {self.narrowest}, "
            f"effective rank {rank}, saturation {full}, bottleneck {score}"
        )


def order_of(
    site: SiteDescriptor, width: int, failures: int, rank: float | None, score: float | None = None
) -> tuple[float, ...]:
    """Sort key: smaller grows sooner. Known before anything is measured, too, with `rank` and `score` None."""
    # The width of the model's output is the task's own: there is nothing to widen.
    output = site.depth >= _OUTPUT_DEPTH and site.narrowest_width >= site.signature.out_features
    return (
        output,
        float("inf") if score is None else -score,
        width,
        not repairs(site),
        failures,
        float("inf") if rank is None else rank,
        site.kind is SiteKind.SERIES,
        _GRANULARITY.get(site.granularity, len(_GRANULARITY)),
        site.parameters,
        site.index,
    )


def repairs(site: SiteDescriptor) -> bool:
    """Whether a seed here would lead around a part that is narrower than what comes out."""
    return site.kind is SiteKind.PARALLEL and site.narrowest_width < site.signature.out_features


def candidates(situation: Situation) -> tuple[list[Candidate], dict[str, int]]:
    """Sites that may grow now, best first, and how many may not, by reason."""
    marks = situation.marks
    rules, boundary = situation.rules, situation.state.boundary
    held = [seed.index for seed in situation.state.seeds if Stage.GERMINATED <= seed.stage <= Stage.FOSSILIZED]
    grown = Counter(index for seed in held for index in situation.around(seed))
    found: list[Candidate] = []
    closed = dict.fromkeys(("occupied", "embargoed", "given up", "not saturated"), 0)
    for site in situation.hello.sites:
        mark = marks.get(site.index, SiteMark(site.index))
        if site.index in situation.seeds:
            closed["occupied"] += 1
        elif mark.closed_until > boundary:
            closed["embargoed"] += 1
        elif mark.failures >= rules.site_attempts:
            closed["given up"] += 1
        elif mark.saturation is not None and mark.saturation < rules.saturation_floor:
            closed["not saturated"] += 1
        else:
            found.append(Candidate(site, mark, grown[site.index]))
    scored = rules.place_by == "bottleneck"
    found.sort(
        key=lambda c: order_of(c.site, c.width, c.mark.failures, c.mark.effective_rank, c.score if scored else None)
    )
    return found, {reason: count for reason, count in closed.items() if count}
