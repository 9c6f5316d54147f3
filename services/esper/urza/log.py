"""Statements about the change log."""

from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.urza import records, shelf
from esper.urza.blueprints import Blueprint, BlueprintState
from esper.urza.builds import Build, BuildState
from esper.urza.changes import Change, Subject
from esper.urza.clock import from_micros
from esper.urza.kernels import Kernel, KernelState
from esper.urza.schema import changes, library

__all__ = ["changes_after", "head"]


async def head(connection: AsyncConnection) -> int:
    """Number of the last change; 0 in an empty library."""
    return int((await connection.execute(sa.select(library.c.sequence))).scalar_one())


async def changes_after(connection: AsyncConnection, sequence: int, *, limit: int) -> list[Change]:
    """The changes that follow a number, in order, each with its subject as it was right after it."""
    following = sa.select(changes).where(changes.c.sequence > sequence).order_by(changes.c.sequence).limit(limit)
    rows = (await connection.execute(following)).all()
    ids = {kind: {row.subject_id for row in rows if row.subject == kind.value} for kind in Subject}
    blueprints = await records.blueprint_rows(connection, ids[Subject.BLUEPRINT]) if ids[Subject.BLUEPRINT] else {}
    builds = await records.build_rows(connection, ids[Subject.BUILD]) if ids[Subject.BUILD] else {}
    kernels = await shelf.kernel_rows(connection, ids[Subject.KERNEL]) if ids[Subject.KERNEL] else {}
    return [_change(row, blueprints, builds, kernels) for row in rows]


def _change(
    row: sa.Row[Any], blueprints: dict[str, Blueprint], builds: dict[str, Build], kernels: dict[str, Kernel]
) -> Change:
    then = from_micros(row.occur_time)
    subject: Blueprint | Build | Kernel
    match Subject(row.subject):
        case Subject.BLUEPRINT:
            subject = replace(blueprints[row.subject_id], state=BlueprintState(row.state))
        case Subject.BUILD:
            subject = replace(
                builds[row.subject_id],
                state=BuildState(row.state),
                attempts=row.attempts,
                kernel_id=row.kernel_id,
                error=row.error,
                update_time=then,
            )
        case Subject.KERNEL:
            subject = _kernel_then(kernels[row.subject_id], KernelState(row.state), row)
    return Change(sequence=row.sequence, occur_time=then, subject=subject)


def _kernel_then(kernel: Kernel, state: KernelState, row: sa.Row[Any]) -> Kernel:
    judged = state is not KernelState.STAGED
    return replace(
        kernel,
        state=state,
        update_time=from_micros(row.occur_time),
        verdict=kernel.verdict if judged else None,
        statement=kernel.statement if judged else None,
    )
