"""A session as a table for a terminal, in the manner of the model summaries that people know.

One row is one site; where there are more rows than fit, dormant sites that differ in the numbers of their names alone
(the layers of a stack) share a row, and then the middle is left out. Sites with a seed that is not dormant are always
shown.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina.control import SiteKind, Stage

if TYPE_CHECKING:
    from esper.kasmina.growth import Growth
    from esper.kasmina.sites import Site

__all__ = ["summary"]

_HEAD = (
    "site",
    "kind",
    "type",
    "input",
    "output",
    "parameters",
    "stage",
    "blueprint",
    "alpha",
    "added",
    "gain",
    "bound",
)
_RIGHT = frozenset({"parameters", "alpha", "added", "gain", "bound"})
_REASONS = 3


@dataclass(frozen=True, slots=True)
class _Row:
    cells: tuple[str, ...]
    dormant: bool


def summary(growth: Growth, max_rows: int = 40) -> str:
    """Sites with types, shapes and host parameters; seeds with stage, blueprint, alpha, parameters and worth; totals.

    Args:
        growth: the session.
        max_rows: dormant rows shown at most.
    """
    rows = [_row(growth, site) for site in growth.sites]
    if len(rows) > max_rows:
        rows = _merged(rows)
    return "\n".join([*_table(_shortened(rows, max_rows)), *_totals(growth)])


def _row(growth: Growth, site: Site) -> _Row:
    life, descriptor = growth.life, site.descriptor
    run = life.runs.get(site.index)
    stage = life.stage(site.index)
    # A series site adapts what its module gives; what goes into that module is not part of it.
    shown = "" if descriptor.kind is SiteKind.SERIES else _shape(site.x_shape)
    seed = ("", "", "", "", "")
    if run is not None:
        measured = run.counterfactual
        alpha = 0.0 if run.attachment is None else float(run.attachment.seed.alpha)
        seed = (
            run.choice.blueprint_name,
            f"{alpha:.2f}",
            f"{run.parameters:,}",
            "-" if measured is None else f"{measured.mean_gain:+.4f}",
            "-" if measured is None else f"{measured.lower_bound:+.4f}",
        )
    host = (descriptor.name, descriptor.kind.value, descriptor.module_type, shown, _shape(site.y_shape))
    return _Row((*host, f"{descriptor.parameters:,}", stage.name, *seed), run is None)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _merged(rows: list[_Row]) -> list[_Row]:
    """Dormant rows that are equal up to the numbers in their names become one, where the first of them stood."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if row.dormant:
            groups.setdefault((re.sub(r"\d+", "*", row.cells[0]), *row.cells[1:]), []).append(i)
    first = {members[0]: (key, len(members)) for key, members in groups.items()}
    merged = []
    for i, row in enumerate(rows):
        if not row.dormant:
            merged.append(row)
        elif i in first:
            key, count = first[i]
            merged.append(row if count == 1 else _Row((f"{key[0]} ({count})", *key[1:]), dormant=True))
    return merged


def _shortened(rows: list[_Row], limit: int) -> list[_Row | int]:
    """At most `limit` dormant rows, from both ends; a number stands for as many rows left out there."""
    dormant = [i for i, row in enumerate(rows) if row.dormant]
    out = set(dormant[(limit + 1) // 2 : len(dormant) - limit // 2]) if len(dormant) > limit else set()
    shown: list[_Row | int] = []
    for i, row in enumerate(rows):
        if i not in out:
            shown.append(row)
        elif shown and isinstance(shown[-1], int):
            shown[-1] += 1
        else:
            shown.append(1)
    return shown


def _table(rows: list[_Row | int]) -> list[str]:
    """Aligned columns; those that are empty everywhere are left away."""
    cells = [row.cells for row in rows if isinstance(row, _Row)]
    if not cells:
        return []
    used = [i for i in range(len(_HEAD)) if any(row[i] for row in cells)]
    widths = {i: max(len(_HEAD[i]), *(len(row[i]) for row in cells)) for i in used}

    def line(row: tuple[str, ...]) -> str:
        parts = (row[i].rjust(widths[i]) if _HEAD[i] in _RIGHT else row[i].ljust(widths[i]) for i in used)
        return "  ".join(parts).rstrip()

    rule = "-" * (sum(widths.values()) + 2 * (len(used) - 1))
    body = [line(row.cells) if isinstance(row, _Row) else f"... {row} more dormant rows" for row in rows]
    return [line(_HEAD), rule, *body, rule]


def _totals(growth: Growth) -> list[str]:
    life = growth.life
    stages = Counter(life.stage(seed).name for seed in life.runs)
    seeds = ", ".join(f"{stages[stage.name]} {stage.name}" for stage in Stage if stages[stage.name])
    grown, host = life.parameters_added, life.host_parameters
    more = f" (+{100 * grown / host:.2f} %)" if host else ""
    living = f"{len(life.runs)} seeds not dormant{f': {seeds}' if seeds else ''}"
    lines = [
        f"{growth.run_id}: {type(growth.model).__name__}, {len(growth.sites)} sites, {living}",
        f"parameters: host {host:,}, grown {grown:,}{more}, together {host + grown:,}",
    ]
    if not growth.sites and not growth.refusals:
        lines.append("no site is known before the first training forward, or example_inputs")
    reasons = Counter(refusal.reason for refusal in growth.refusals)
    if reasons:
        lines.append(f"modules that can not grow: {len(growth.refusals)}")
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common(_REASONS)]
    return lines
