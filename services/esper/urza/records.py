"""Statements about blueprints and builds."""

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.kasmina.blueprints import ir
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import InvalidInput, NotFound
from esper.mesh.identity import Identity
from esper.urza.blueprints import LAWFUL, Birth, Blueprint, BlueprintState
from esper.urza.builds import Build, BuildOrder, BuildState, Tier, canonical_target
from esper.urza.changes import Subject
from esper.urza.clock import from_micros
from esper.urza.kernels import signed_name
from esper.urza.law import check_step
from esper.urza.paging import Page
from esper.urza.schema import blueprint_labels, blueprints, builds
from esper.urza.store import Transaction

__all__ = [
    "MIN_PREFIX",
    "ancestors",
    "blueprint_rows",
    "build_rows",
    "get_blueprint",
    "get_build",
    "insert_blueprint",
    "insert_build",
    "list_blueprints",
    "list_builds",
    "queued_builds_of",
    "resolve_blueprint",
    "resolve_prefix",
    "set_blueprint_state",
    "set_build",
]

MIN_PREFIX = len("sha256:") + 8
MAX_ANCESTORS = 64
_DIGEST = len("sha256:") + 64
_WITHOUT_IR = [column for column in blueprints.c if column.name != "ir"]


def _blueprint(row: sa.Row[Any]) -> Blueprint:
    return Blueprint(
        sequence=row.sequence,
        id=row.id,
        name=row.name,
        description=row.description,
        layouts=tuple(Layout(layout) for layout in row.layouts),
        birth=Birth(row.birth),
        causal=row.causal,
        tags=tuple(row.tags),
        parent_ids=tuple(row.parent_ids),
        author=row.author,
        state=BlueprintState(row.state),
        create_time=from_micros(row.create_time),
        ir=row._mapping.get("ir", b""),  # noqa: SLF001  # a Row's public, underscored name
    )


def _build(row: sa.Row[Any]) -> Build:
    return Build(
        sequence=row.sequence,
        id=row.id,
        blueprint_id=row.blueprint_id,
        signature=Signature.parse(row.signature),
        target=row.target,
        tier=Tier(row.tier),
        priority=row.priority,
        state=BuildState(row.state),
        attempts=row.attempts,
        kernel_id=row.kernel_id,
        error=row.error,
        create_time=from_micros(row.create_time),
        update_time=from_micros(row.update_time),
    )


async def resolve_prefix(connection: AsyncConnection, table: sa.Table, text: str) -> str | None:
    """The one id that begins with a text of at least `MIN_PREFIX` characters; None when there is none.

    Raises:
        InvalidInput: AMBIGUOUS_ID, there are several.
    """
    # A range instead of LIKE: it uses the index on every database. "g" follows every hexadecimal digit.
    matching = sa.select(table.c.id).where(table.c.id >= text, table.c.id < text + "g").limit(2)
    found = (await connection.execute(matching)).scalars().all()
    if len(found) > 1:
        raise InvalidInput(
            f"id prefix {text}: expected one that names a single entry, found several",
            reason="AMBIGUOUS_ID",
            metadata={"prefix": text},
        )
    return str(found[0]) if found else None


async def get_blueprint(connection: AsyncConnection, blueprint_id: str, *, with_ir: bool = False) -> Blueprint:
    """One blueprint by id.

    Raises:
        NotFound: BLUEPRINT_NOT_FOUND.
    """
    columns = list(blueprints.c) if with_ir else _WITHOUT_IR
    row = (await connection.execute(sa.select(*columns).where(blueprints.c.id == blueprint_id))).one_or_none()
    if row is None:
        raise _no_blueprint(blueprint_id)
    return _blueprint(row)


async def resolve_blueprint(connection: AsyncConnection, text: str) -> Blueprint:
    """One blueprint, IR included, by id, by a prefix of it, or by name (the newest of that name).

    Raises:
        NotFound: BLUEPRINT_NOT_FOUND.
        InvalidInput: AMBIGUOUS_ID.
    """
    if text.startswith("sha256:"):
        found = text if len(text) == _DIGEST else None
        if MIN_PREFIX <= len(text) < _DIGEST:
            found = await resolve_prefix(connection, blueprints, text)
    else:
        newest = sa.select(blueprints.c.id).where(blueprints.c.name == text)
        newest = newest.order_by(blueprints.c.sequence.desc()).limit(1)
        found = (await connection.execute(newest)).scalar_one_or_none()
    if found is None:
        raise _no_blueprint(text)
    return await get_blueprint(connection, found, with_ir=True)


def _no_blueprint(text: str) -> NotFound:
    return NotFound(
        f"no blueprint {text}: expected an id, a prefix of one (8 digits or more), or a name that ListBlueprints shows",
        reason="BLUEPRINT_NOT_FOUND",
        metadata={"blueprint": text},
    )


async def insert_blueprint(
    tx: Transaction, blueprint: ir.Blueprint, data: bytes, parent_ids: Sequence[str], by: Identity
) -> None:
    """Store a new blueprint and log it.

    Raises:
        Forbidden: ROLE_NOT_ENTITLED.
    """
    check_step(LAWFUL, "blueprint", blueprint.id, None, BlueprintState.ACTIVE, by)
    sequence = await tx.log(Subject.BLUEPRINT, blueprint.id, BlueprintState.ACTIVE)
    row = {
        "sequence": sequence,
        "id": blueprint.id,
        "name": blueprint.name,
        "description": blueprint.description[:512],
        "ir": data,
        "layouts": [layout.value for layout in blueprint.layouts],
        "birth": blueprint.birth.value,
        "causal": blueprint.causal,
        "tags": list(blueprint.tags),
        "parent_ids": list(parent_ids),
        "author": signed_name(by),
        "state": BlueprintState.ACTIVE.value,
        "create_time": tx.stamp,
    }
    await tx.connection.execute(blueprints.insert().values(row))
    labels = {f"layout:{layout}" for layout in blueprint.layouts} | {f"tag:{tag}" for tag in blueprint.tags}
    rows = [{"label": label, "sequence": sequence} for label in sorted(labels)]
    await tx.connection.execute(blueprint_labels.insert(), rows)


async def set_blueprint_state(tx: Transaction, blueprint: Blueprint, state: BlueprintState, by: Identity) -> None:
    """Change whether a blueprint may be built, and log it.

    Raises:
        Conflict: UNLAWFUL_TRANSITION.
        Forbidden: ROLE_NOT_ENTITLED.
    """
    check_step(LAWFUL, "blueprint", blueprint.id, blueprint.state, state, by)
    statement = sa.update(blueprints).where(blueprints.c.id == blueprint.id).values(state=state.value)
    await tx.connection.execute(statement)
    await tx.log(Subject.BLUEPRINT, blueprint.id, state)


async def list_blueprints(
    connection: AsyncConnection,
    *,
    limit: int,
    before: int | None,
    layout: Layout | None,
    tags: Collection[str],
    include_archived: bool,
) -> Page[Blueprint]:
    """Blueprints without their IR, newest first."""
    statement = sa.select(*_WITHOUT_IR).order_by(blueprints.c.sequence.desc()).limit(limit + 1)
    if before is not None:
        statement = statement.where(blueprints.c.sequence < before)
    if not include_archived:
        statement = statement.where(blueprints.c.state == BlueprintState.ACTIVE.value)
    labels = [f"tag:{tag}" for tag in sorted(set(tags))] + ([] if layout is None else [f"layout:{layout}"])
    for label in labels:
        having = sa.select(blueprint_labels.c.sequence).where(blueprint_labels.c.label == label)
        statement = statement.where(blueprints.c.sequence.in_(having))
    rows = (await connection.execute(statement)).all()
    return Page(tuple(_blueprint(row) for row in rows[:limit]), more=len(rows) > limit)


async def blueprint_rows(connection: AsyncConnection, ids: Collection[str]) -> dict[str, Blueprint]:
    """Blueprints by id, without their IR."""
    rows = await connection.execute(sa.select(*_WITHOUT_IR).where(blueprints.c.id.in_(ids)))
    return {row.id: _blueprint(row) for row in rows}


async def ancestors(connection: AsyncConnection, blueprint_id: str) -> tuple[Blueprint, ...]:
    """A blueprint and those that it was derived from, nearest first, each once, at most 64."""
    found: dict[str, Blueprint] = {}
    generation: Sequence[str] = [blueprint_id]
    while generation and len(found) < MAX_ANCESTORS:
        rows = await blueprint_rows(connection, generation)
        found |= {one: rows[one] for one in generation if one in rows}
        parents = dict.fromkeys(parent for one in generation if one in rows for parent in rows[one].parent_ids)
        generation = [parent for parent in parents if parent not in found]
    return tuple(found.values())[:MAX_ANCESTORS]


async def get_build(connection: AsyncConnection, build_id: str) -> Build:
    """One build by id.

    Raises:
        NotFound: BUILD_NOT_FOUND.
    """
    row = (await connection.execute(sa.select(builds).where(builds.c.id == build_id))).one_or_none()
    if row is None:
        raise NotFound(
            f"no build {build_id}: expected one that ListBuilds shows",
            reason="BUILD_NOT_FOUND",
            metadata={"build_id": build_id},
        )
    return _build(row)


async def build_rows(connection: AsyncConnection, ids: Collection[str]) -> dict[str, Build]:
    """Builds by id."""
    rows = await connection.execute(sa.select(builds).where(builds.c.id.in_(ids)))
    return {row.id: _build(row) for row in rows}


async def insert_build(tx: Transaction, order: BuildOrder) -> int:
    """Store a new build as QUEUED, log it, and return its number."""
    sequence = await tx.log(Subject.BUILD, order.id, BuildState.QUEUED)
    row = {
        "sequence": sequence,
        "id": order.id,
        "blueprint_id": order.blueprint_id,
        "signature": str(order.signature),
        "target": canonical_target(order.target, order.tier),
        "tier": order.tier.value,
        "priority": order.priority,
        "state": BuildState.QUEUED.value,
        "attempts": 0,
        "kernel_id": "",
        "error": "",
        "create_time": tx.stamp,
        "update_time": tx.stamp,
    }
    await tx.connection.execute(builds.insert().values(row))
    return sequence


async def set_build(
    tx: Transaction, build_id: str, state: BuildState, *, attempts: int, kernel_id: str = "", error: str = ""
) -> None:
    """Change where a build stands, and log it."""
    values = {"state": state.value, "attempts": attempts, "kernel_id": kernel_id, "error": error}
    statement = sa.update(builds).where(builds.c.id == build_id).values(**values, update_time=tx.stamp)
    await tx.connection.execute(statement)
    await tx.log(Subject.BUILD, build_id, state, attempts=attempts, kernel_id=kernel_id, error=error)


async def queued_builds_of(connection: AsyncConnection, blueprint_id: str) -> tuple[Build, ...]:
    """Builds of a blueprint that nobody has begun."""
    waiting = sa.select(builds).where(builds.c.blueprint_id == blueprint_id, builds.c.state == BuildState.QUEUED.value)
    return tuple(_build(row) for row in await connection.execute(waiting))


async def list_builds(
    connection: AsyncConnection, *, limit: int, before: int | None, states: Collection[BuildState]
) -> Page[Build]:
    """Builds of some states, newest first."""
    # One index walk per state, merged: a rare state is found without reading past all the others.
    branches = [_newest(state, limit=limit, before=before) for state in sorted(set(states))] or [
        _newest(None, limit=limit, before=before)
    ]
    chosen = sa.union_all(*branches).subquery()
    newest = sa.select(chosen.c.sequence).order_by(chosen.c.sequence.desc()).limit(limit + 1)
    statement = sa.select(builds).where(builds.c.sequence.in_(newest)).order_by(builds.c.sequence.desc())
    rows = (await connection.execute(statement)).all()
    return Page(tuple(_build(row) for row in rows[:limit]), more=len(rows) > limit)


def _newest(state: BuildState | None, *, limit: int, before: int | None) -> sa.Select[Any]:
    inner = sa.select(builds.c.sequence).order_by(builds.c.sequence.desc()).limit(limit + 1)
    if state is not None:
        inner = inner.where(builds.c.state == state.value)
    if before is not None:
        inner = inner.where(builds.c.sequence < before)
    # SQLite takes ORDER BY and LIMIT of a branch in a subquery only.
    return sa.select(inner.subquery().c.sequence)
