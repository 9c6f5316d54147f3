"""Statements about work and its leases: claim, renew, complete, expire."""

import secrets
from dataclasses import replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.mesh.errors import Forbidden, InvalidInput
from esper.mesh.identity import Identity
from esper.urza import records, shelf
from esper.urza.blueprints import BlueprintState
from esper.urza.builds import BuildState, Tier
from esper.urza.clock import from_micros
from esper.urza.kernels import check_offer
from esper.urza.leases import (
    HOLDERS,
    Built,
    Failed,
    Judged,
    Lease,
    LeaseState,
    Outcome,
    Request,
    Work,
    WorkKind,
    WorkState,
    fingerprint_of,
    lease_lost,
)
from esper.urza.schema import leases, work
from esper.urza.store import Transaction
from esper.urza.verdicts import check_evaluator, prove

__all__ = [
    "claim",
    "complete",
    "enqueue",
    "expire_due",
    "forget",
    "get_work",
    "next_expiry",
    "renew",
    "requeue",
    "waiting",
    "withdraw",
]

EXPIRE_BATCH = 256
_ARCHIVED = "its blueprint was archived"
_BUILD_STATE = {
    WorkState.QUEUED: BuildState.QUEUED,
    WorkState.LEASED: BuildState.LEASED,
    WorkState.FAILED: BuildState.FAILED,
}


async def enqueue(
    tx: Transaction, kind: WorkKind, subject_id: str, *, position: int, priority: int, tier: Tier, target: str
) -> None:
    """Put new work into the queue; higher priority first, then the smaller position."""
    row = {
        "kind": kind.value,
        "subject_id": subject_id,
        "state": WorkState.QUEUED.value,
        "urgency": -priority,
        "position": position,
        "attempts": 0,
        "error": "",
        "tier": tier.value,
        "target": target,
    }
    await tx.connection.execute(work.insert().values(row))
    tx.signals.add(kind.value)


async def get_work(connection: AsyncConnection, kind: WorkKind, subject_id: str) -> Work:
    """One piece of work, which must exist."""
    chosen = sa.select(work).where(work.c.kind == kind.value, work.c.subject_id == subject_id)
    row = (await connection.execute(chosen)).one()
    return Work(
        kind=WorkKind(row.kind),
        subject_id=row.subject_id,
        state=WorkState(row.state),
        attempts=row.attempts,
        error=row.error,
    )


async def _save(tx: Transaction, piece: Work) -> None:
    """Write where a piece of work stands, and with it the state of its build."""
    await tx.connection.execute(
        sa.update(work)
        .where(work.c.kind == piece.kind.value, work.c.subject_id == piece.subject_id)
        .values(state=piece.state.value, attempts=piece.attempts, error=piece.error)
    )
    if piece.state is WorkState.QUEUED:
        tx.signals.add(piece.kind.value)
    if piece.kind is WorkKind.COMPILE and piece.state in _BUILD_STATE:
        await records.set_build(
            tx, piece.subject_id, _BUILD_STATE[piece.state], attempts=piece.attempts, error=piece.error
        )


async def requeue(tx: Transaction, kind: WorkKind, subject_id: str) -> bool:
    """Queue work afresh that was given up; False when it was not."""
    piece = await get_work(tx.connection, kind, subject_id)
    if piece.state is not WorkState.FAILED:
        return False
    await _save(tx, piece.retry())
    return True


async def withdraw(tx: Transaction, build_id: str) -> None:
    """Give a build up that nobody has begun, because its blueprint was archived."""
    await _save(tx, (await get_work(tx.connection, WorkKind.COMPILE, build_id)).give_up(_ARCHIVED))


async def _end_attempt(tx: Transaction, piece: Work) -> None:
    """Write down an attempt without an outcome: what would be queued again is given up if it may not be built now."""
    if piece.kind is WorkKind.COMPILE and piece.state is WorkState.QUEUED:
        build = await records.get_build(tx.connection, piece.subject_id)
        blueprint = await records.get_blueprint(tx.connection, build.blueprint_id)
        if blueprint.state is BlueprintState.ARCHIVED:
            piece = piece.give_up(_ARCHIVED)
    await _save(tx, piece)


def _queued(request: Request) -> list[sa.ColumnElement[bool]]:
    conditions = [work.c.kind == request.kind.value, work.c.state == WorkState.QUEUED.value]
    if request.kind is WorkKind.COMPILE and request.tiers:
        conditions.append(work.c.tier.in_(sorted(tier.value for tier in request.tiers)))
    if request.target:
        # A kernel for another machine can be neither built nor judged here; a portable one can be both anywhere.
        conditions.append(sa.or_(work.c.tier == Tier.PORTABLE.value, work.c.target.in_(["", request.target])))
    return conditions


async def waiting(connection: AsyncConnection, request: Request) -> bool:
    """Whether there is work for this request: a look that takes no lock, before a claim that does."""
    some = sa.select(work.c.subject_id).where(*_queued(request)).limit(1)
    return (await connection.execute(some)).first() is not None


async def claim(tx: Transaction, request: Request) -> tuple[Lease, ...]:
    """Take work: choosing and taking is one statement, so no two callers can take the same piece."""
    chosen = (
        sa.select(work.c.subject_id)
        .where(*_queued(request))
        .order_by(work.c.urgency, work.c.position)
        .limit(request.limit)
        .with_for_update(skip_locked=True)
    )
    taken = (
        sa.update(work)
        .where(work.c.kind == request.kind.value, work.c.subject_id.in_(chosen))
        .where(work.c.state == WorkState.QUEUED.value)
        .values(state=WorkState.LEASED.value, attempts=work.c.attempts + 1)
        .returning(work)
    )
    rows = (await tx.connection.execute(taken)).all()
    return tuple([await _grant(tx, request, row) for row in sorted(rows, key=lambda row: (row.urgency, row.position))])


async def _grant(tx: Transaction, request: Request, row: sa.Row[Any]) -> Lease:
    lease = Lease(
        id=secrets.token_hex(16),
        kind=request.kind,
        subject_id=row.subject_id,
        holder=request.holder,
        attempt=row.attempts,
        lease_time_s=request.lease_time_s,
        expire_time=tx.now + timedelta(seconds=request.lease_time_s),
    )
    values = {
        "id": lease.id,
        "kind": lease.kind.value,
        "subject_id": lease.subject_id,
        "holder": lease.holder,
        "attempt": lease.attempt,
        "lease_time_us": _us(lease.lease_time_s),
        "expire_time": tx.stamp + _us(lease.lease_time_s),
        "state": LeaseState.ACTIVE.value,
        "outcome": "",
    }
    await tx.connection.execute(leases.insert().values(values))
    if request.kind is WorkKind.EVALUATE:
        return replace(lease, kernel=await shelf.get_kernel(tx.connection, lease.subject_id))
    await records.set_build(tx, lease.subject_id, BuildState.LEASED, attempts=lease.attempt, error=row.error)
    build = await records.get_build(tx.connection, lease.subject_id)
    blueprint = await records.get_blueprint(tx.connection, build.blueprint_id, with_ir=True)
    return replace(lease, build=build, blueprint=blueprint)


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


async def _find(connection: AsyncConnection, lease_id: str, by: Identity) -> sa.Row[Any]:
    """A lease that is remembered, and that a caller of this role may hold.

    Raises:
        Stale: LEASE_LOST.
        Forbidden: ROLE_NOT_ENTITLED.
    """
    row = (await connection.execute(sa.select(leases).where(leases.c.id == lease_id))).one_or_none()
    if row is None:
        raise lease_lost()
    owner = HOLDERS[WorkKind(row.kind)]
    if by.role is not owner:
        raise Forbidden(
            "not allowed",
            reason="ROLE_NOT_ENTITLED",
            private=f"a lease to {row.kind} belongs to {owner}, caller is {by.role}/{by.subject}",
        )
    return row


async def renew(tx: Transaction, lease_id: str, lease_time_s: float | None, by: Identity) -> int:
    """Keep a lease; return the moment at which it runs out now, in microseconds.

    Raises:
        Stale: LEASE_LOST.
        Forbidden: ROLE_NOT_ENTITLED.
    """
    row = await _find(tx.connection, lease_id, by)
    length = row.lease_time_us if lease_time_s is None else _us(lease_time_s)
    kept = await tx.connection.execute(
        sa.update(leases)
        .where(leases.c.id == lease_id, leases.c.state == LeaseState.ACTIVE.value, leases.c.expire_time > tx.stamp)
        .values(expire_time=tx.stamp + length, lease_time_us=length)
    )
    if kept.rowcount != 1:
        raise lease_lost()
    return int(tx.stamp + length)


async def complete(
    tx: Transaction, lease_id: str, outcome: Outcome, by: Identity, *, max_attempts: int
) -> tuple[WorkKind, str]:
    """End a lease with its outcome; return what the work was about. The same outcome again changes nothing.

    Raises:
        Stale: LEASE_LOST.
        Forbidden: NOT_THE_EVALUATOR, ROLE_NOT_ENTITLED.
        InvalidInput: VERDICT_INVALID, KERNEL_MISMATCH, OUTCOME_MISMATCH.
        NotFound: KERNEL_NOT_FOUND.
    """
    if isinstance(outcome, Judged):
        check_evaluator(by)
    row = await _find(tx.connection, lease_id, by)
    kind, subject_id, fingerprint = WorkKind(row.kind), str(row.subject_id), fingerprint_of(outcome)
    if row.state == LeaseState.COMPLETED.value and row.outcome == fingerprint:
        return kind, subject_id
    ended = await tx.connection.execute(
        sa.update(leases)
        .where(leases.c.id == lease_id, leases.c.state == LeaseState.ACTIVE.value, leases.c.expire_time > tx.stamp)
        # From here on `expire_time` says since when the lease is over, which is how long it is remembered.
        .values(state=LeaseState.COMPLETED.value, outcome=fingerprint, expire_time=tx.stamp)
    )
    if ended.rowcount != 1:
        raise lease_lost()
    piece = await get_work(tx.connection, kind, subject_id)
    match kind, outcome:
        case _, Failed():
            await _end_attempt(tx, piece.fail(outcome.error, retryable=outcome.retryable, max_attempts=max_attempts))
        case WorkKind.COMPILE, Built():
            await _built(tx, piece, outcome.kernel_id)
        case WorkKind.EVALUATE, Judged():
            known = await shelf.keys(tx.connection)
            proof = prove(outcome.verdict, outcome.claimed, kernel_id=subject_id, keys=known, by=by)
            await shelf.judge(tx, proof, by)
            await _save(tx, piece.succeed())
        case _:
            raise InvalidInput(
                f"work {kind} of {subject_id}: expected "
                f"{'a kernel' if kind is WorkKind.COMPILE else 'a verdict'} or a failure as its outcome, found "
                f"{'a kernel' if isinstance(outcome, Built) else 'a verdict'}",
                reason="OUTCOME_MISMATCH",
            )
    return kind, subject_id


async def _built(tx: Transaction, piece: Work, kernel_id: str) -> None:
    kernel = await shelf.get_kernel(tx.connection, kernel_id)
    build = await records.get_build(tx.connection, piece.subject_id)
    blueprint = await records.get_blueprint(tx.connection, build.blueprint_id)
    check_offer(kernel, build, blueprint)
    await _save(tx, piece.succeed())
    await records.set_build(tx, build.id, BuildState.SUCCEEDED, attempts=piece.attempts, kernel_id=kernel_id)


async def expire_due(tx: Transaction, *, max_attempts: int) -> int:
    """End the leases that ran out, at most 256 of them; return how many there were."""
    due = (
        sa.select(leases)
        .where(leases.c.state == LeaseState.ACTIVE.value, leases.c.expire_time <= tx.stamp)
        .order_by(leases.c.expire_time)
        .limit(EXPIRE_BATCH)
    )
    rows = (await tx.connection.execute(due)).all()
    for row in rows:
        over = sa.update(leases).where(leases.c.id == row.id).values(state=LeaseState.EXPIRED.value)
        await tx.connection.execute(over)
        piece = await get_work(tx.connection, WorkKind(row.kind), row.subject_id)
        await _end_attempt(tx, piece.expire(row.holder, max_attempts=max_attempts))
    return len(rows)


async def next_expiry(connection: AsyncConnection) -> float | None:
    """When the next active lease runs out, in seconds since the epoch; None without one."""
    soonest = sa.select(sa.func.min(leases.c.expire_time)).where(leases.c.state == LeaseState.ACTIVE.value)
    value = (await connection.execute(soonest)).scalar_one()
    return None if value is None else from_micros(value).timestamp()


async def forget(tx: Transaction, *, older_than_s: float) -> int:
    """Remove leases that were over longer ago than this; return how many there were."""
    over = [LeaseState.COMPLETED.value, LeaseState.EXPIRED.value]
    stale = leases.c.state.in_(over) & (leases.c.expire_time < tx.stamp - _us(older_than_s))
    return (await tx.connection.execute(sa.delete(leases).where(stale))).rowcount
