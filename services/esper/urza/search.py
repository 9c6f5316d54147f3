"""Finding kernels: conditions, and the statement that reads no further than it must."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.kasmina.kernels.pace import score
from esper.kasmina.signature import Signature
from esper.mesh.errors import InvalidInput
from esper.urza.builds import Tier
from esper.urza.kernels import Kernel, KernelState
from esper.urza.paging import MAX_PAGE, Page
from esper.urza.schema import kernel_tags, kernels
from esper.urza.shelf import FULL, kernel_from_row

__all__ = ["KernelQuery", "fastest", "list_kernels"]

MAX_BRANCHES = 16
RARE = 1000
"""Kernels of a tag up to which looking them up one by one is cheaper than asking each kernel for the tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelQuery:
    """Conditions on kernels; a kernel must meet every one that is given."""

    states: frozenset[KernelState] = frozenset()
    """One of these; empty for all."""

    signatures: frozenset[Signature] = frozenset()
    """One of these; empty for all."""

    target: str = ""
    """Runs on this machine: built for it, or portable."""

    blueprint_id: str = ""
    """Of this blueprint."""

    tier: Tier | None = None
    """Of this tier."""

    tags: frozenset[str] = frozenset()
    """Each of these."""

    max_parameters: int = 0
    """At most this many; 0 for all."""

    causal_only: bool = False
    """Only causal ones."""

    max_latency_us: float = 0.0
    """Measured median forward latency at most this; 0 for all."""

    max_memory_bytes: int = 0
    """Measured peak memory at most this; 0 for all."""

    fastest_only: bool = False
    """Of one blueprint and signature only the one that trains fastest; one page, no other follows."""


async def list_kernels(
    connection: AsyncConnection, query: KernelQuery, *, limit: int, before: int | None
) -> Page[Kernel]:
    """Kernels that meet every condition, newest first.

    Raises:
        InvalidInput: PAGE_TOKEN_INVALID, a second page is asked for of a query for the fastest.
    """
    if query.fastest_only:
        if before is not None:
            raise InvalidInput(
                "page_token: expected none, the fastest kernels are one page", reason="PAGE_TOKEN_INVALID"
            )
        every = await list_kernels(connection, replace(query, fastest_only=False), limit=MAX_PAGE, before=None)
        return Page(fastest(every.entries)[:limit], more=False)
    states: list[KernelState | None] = [*sorted(query.states)]
    if not states or len(states) == len(KernelState):
        states = [None]
    signatures: list[frozenset[Signature]] = [frozenset({one}) for one in sorted(query.signatures)] or [frozenset()]
    # One index walk per state and signature, merged: a rare combination is found without reading past all the others.
    # With many signatures one branch takes them all, lest the statement grow without bound.
    if len(states) * len(signatures) > MAX_BRANCHES:
        signatures = [query.signatures]
    rare = frozenset([tag for tag in query.tags if await _is_rare(connection, tag)])
    branches = [
        _branch(query, state, some, rare, limit=limit, before=before) for state, some in product(states, signatures)
    ]
    chosen = sa.union_all(*branches).subquery()
    newest = sa.select(chosen.c.sequence).order_by(chosen.c.sequence.desc()).limit(limit + 1)
    statement = FULL.where(kernels.c.sequence.in_(newest)).order_by(kernels.c.sequence.desc())
    rows = (await connection.execute(statement)).all()
    return Page(tuple(kernel_from_row(row) for row in rows[:limit]), more=len(rows) > limit)


def fastest(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Of each blueprint and signature the kernel that trains fastest by its verdict, newest first."""
    best: dict[tuple[str, Signature], Kernel] = {}
    for kernel in sorted(kernels, key=_speed):
        best.setdefault((kernel.blueprint_id, kernel.signature), kernel)
    return tuple(sorted(best.values(), key=lambda kernel: -kernel.sequence))


def _speed(kernel: Kernel) -> tuple[float, bool, int]:
    measured = () if kernel.statement is None else kernel.statement.measurements
    # Measured on another machine than it was built for, it would not be in the library.
    pace = score({figure.name: figure.value for figure in measured}) if kernel.tier.compiled else 1.0
    return pace, kernel.tier.compiled, -kernel.sequence


async def _is_rare(connection: AsyncConnection, tag: str) -> bool:
    some = sa.select(kernel_tags.c.sequence).where(kernel_tags.c.tag == tag).limit(RARE + 1).subquery()
    return int((await connection.execute(sa.select(sa.func.count()).select_from(some))).scalar_one()) <= RARE


def _branch(
    query: KernelQuery,
    state: KernelState | None,
    signatures: frozenset[Signature],
    rare: frozenset[str],
    *,
    limit: int,
    before: int | None,
) -> sa.Select[Any]:
    k = kernels.c
    where = list(_conditions(query, rare))
    if state is not None:
        where.append(k.state == state.value)
    if len(signatures) == 1:
        where.append(k.signature == str(next(iter(signatures))))
    elif signatures:
        where.append(k.signature.in_(sorted(map(str, signatures))))
    if before is not None:
        where.append(k.sequence < before)
    inner = sa.select(k.sequence).where(*where).order_by(k.sequence.desc()).limit(limit + 1)
    return sa.select(inner.subquery().c.sequence)


def _conditions(query: KernelQuery, rare: frozenset[str]) -> Iterator[sa.ColumnElement[bool]]:
    k = kernels.c
    if query.target:
        yield sa.or_(k.tier == Tier.PORTABLE.value, k.target == query.target)
    if query.blueprint_id:
        yield k.blueprint_id == query.blueprint_id
    if query.tier is not None:
        yield k.tier == query.tier.value
    for tag in sorted(query.tags):
        having = sa.select(kernel_tags.c.sequence).where(kernel_tags.c.tag == tag)
        if tag in rare:
            yield k.sequence.in_(having)
        else:
            yield having.where(kernel_tags.c.sequence == k.sequence).exists()
    if query.max_parameters:
        yield k.parameters <= query.max_parameters
    if query.causal_only:
        yield k.causal.is_(True)
    if query.max_latency_us > 0:
        yield k.latency_us <= query.max_latency_us
    if query.max_memory_bytes:
        yield k.memory_bytes <= float(query.max_memory_bytes)
