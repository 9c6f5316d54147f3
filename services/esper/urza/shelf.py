"""Statements about kernels, their verdicts, tags and transitions, and about the keys that sign verdicts."""

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.kasmina.kernels.signing import SignedVerdict, Statement
from esper.kasmina.signature import Signature
from esper.mesh.errors import AlreadyExists, Conflict, LimitExceeded, NotFound
from esper.mesh.identity import Identity
from esper.urza.blueprints import Birth, Blueprint
from esper.urza.builds import Tier
from esper.urza.changes import Subject
from esper.urza.clock import from_micros
from esper.urza.kernels import Kernel, KernelOffer, KernelState, Transition, check_transition, signed_name
from esper.urza.records import MIN_PREFIX, resolve_prefix
from esper.urza.schema import kernel_tags, kernels, signing_keys, transitions, verdicts
from esper.urza.store import Transaction
from esper.urza.verdicts import LATENCY, MEMORY, Proof, RegisteredKey, figure

__all__ = [
    "FULL",
    "get_kernel",
    "judge",
    "kernel_from_row",
    "kernel_rows",
    "keys",
    "register_key",
    "resolve_kernel",
    "stage",
    "stored_ids",
    "transition",
    "transitions_of",
]

MAX_KEYS = 1000
FULL = sa.select(kernels, verdicts.c.statement, verdicts.c.signature.label("signed"), verdicts.c.key_id).select_from(
    kernels.outerjoin(verdicts, verdicts.c.kernel_id == kernels.c.id)
)


def kernel_from_row(row: sa.Row[Any]) -> Kernel:
    """A kernel from a row of `FULL`."""
    verdict = statement = None
    if row.statement is not None:
        verdict = SignedVerdict(row.statement, row.signed, row.key_id)
        statement = Statement.from_bytes(row.statement)
    return Kernel(
        sequence=row.sequence,
        id=row.id,
        build_id=row.build_id,
        blueprint_id=row.blueprint_id,
        blueprint_name=row.blueprint_name,
        signature=Signature.parse(row.signature),
        tier=Tier(row.tier),
        target=row.target,
        birth=Birth(row.birth),
        causal=row.causal,
        parameters=row.parameters,
        flops_per_position=row.flops_per_position,
        size_bytes=row.size_bytes,
        state=KernelState(row.state),
        create_time=from_micros(row.create_time),
        update_time=from_micros(row.update_time),
        verdict=verdict,
        statement=statement,
    )


async def get_kernel(connection: AsyncConnection, kernel_id: str) -> Kernel:
    """One kernel with its verdict, by id.

    Raises:
        NotFound: KERNEL_NOT_FOUND.
    """
    row = (await connection.execute(FULL.where(kernels.c.id == kernel_id))).one_or_none()
    if row is None:
        raise _no_kernel(kernel_id)
    return kernel_from_row(row)


async def resolve_kernel(connection: AsyncConnection, text: str) -> Kernel:
    """One kernel by id or by a prefix of it of at least 8 digits.

    Raises:
        NotFound: KERNEL_NOT_FOUND.
        InvalidInput: AMBIGUOUS_ID.
    """
    found = await resolve_prefix(connection, kernels, text) if len(text) >= MIN_PREFIX else None
    if found is None:
        raise _no_kernel(text)
    return await get_kernel(connection, found)


def _no_kernel(text: str) -> NotFound:
    return NotFound(
        f"no kernel {text}: expected one that ListKernels shows",
        reason="KERNEL_NOT_FOUND",
        metadata={"kernel_id": text},
    )


async def kernel_rows(connection: AsyncConnection, ids: Collection[str]) -> dict[str, Kernel]:
    """Kernels by id."""
    return {row.id: kernel_from_row(row) for row in await connection.execute(FULL.where(kernels.c.id.in_(ids)))}


async def stored_ids(connection: AsyncConnection, ids: Collection[str]) -> set[str]:
    """Those of some ids that are kernels here."""
    return set((await connection.execute(sa.select(kernels.c.id).where(kernels.c.id.in_(ids)))).scalars())


async def stage(
    tx: Transaction, kernel_id: str, size_bytes: int, offer: KernelOffer, blueprint: Blueprint, by: Identity
) -> int:
    """Store a new kernel as STAGED, log it, and return its number.

    Raises:
        Forbidden: ROLE_NOT_ENTITLED.
    """
    check_transition(kernel_id, None, KernelState.STAGED, by)
    sequence = await tx.log(Subject.KERNEL, kernel_id, KernelState.STAGED)
    row = {
        "sequence": sequence,
        "id": kernel_id,
        "build_id": offer.build_id,
        "blueprint_id": offer.blueprint_id,
        "blueprint_name": blueprint.name,
        "signature": str(offer.signature),
        "tier": offer.tier.value,
        "target": offer.target,
        "birth": blueprint.birth.value,
        "causal": blueprint.causal,
        "parameters": offer.parameters,
        "flops_per_position": offer.flops_per_position,
        "size_bytes": size_bytes,
        "state": KernelState.STAGED.value,
        "create_time": tx.stamp,
        "update_time": tx.stamp,
    }
    await tx.connection.execute(kernels.insert().values(row))
    await _add_tags(tx, sequence, blueprint.tags)
    await _record(tx, kernel_id, None, KernelState.STAGED, by, f"uploaded for build {offer.build_id}")
    return sequence


async def judge(tx: Transaction, proof: Proof, by: Identity) -> None:
    """Write a verified verdict down: STAGED becomes VALIDATED or REJECTED.

    Raises:
        Conflict: UNLAWFUL_TRANSITION.
        Forbidden: ROLE_NOT_ENTITLED.
    """
    statement = proof.statement
    kernel = await get_kernel(tx.connection, statement.kernel_id)
    after = KernelState.VALIDATED if statement.passed else KernelState.REJECTED
    failed = [check.name for check in statement.checks if not check.passed]
    reason = f"gauntlet {statement.gauntlet_version}: " + (
        f"passed {len(statement.checks)} checks" if statement.passed else f"failed {', '.join(failed) or 'as a whole'}"
    )
    await _transition(tx, kernel, after, by, reason)
    signed = proof.verdict
    row = {
        "kernel_id": kernel.id,
        "statement": signed.statement,
        "signature": signed.signature,
        "key_id": signed.key_id,
    }
    await tx.connection.execute(verdicts.insert().values(row))
    figures = {"latency_us": figure(statement, LATENCY), "memory_bytes": figure(statement, MEMORY)}
    await tx.connection.execute(sa.update(kernels).where(kernels.c.id == kernel.id).values(figures))
    await _add_tags(tx, kernel.sequence, statement.tags)


async def transition(tx: Transaction, kernel_id: str, after: KernelState, by: Identity, reason: str) -> Kernel:
    """Archive or quarantine a kernel; again is no change. What a verdict decides goes through `judge`.

    Raises:
        NotFound: KERNEL_NOT_FOUND.
        Conflict: UNLAWFUL_TRANSITION.
        Forbidden: ROLE_NOT_ENTITLED.
    """
    kernel = await get_kernel(tx.connection, kernel_id)
    if kernel.state is after:
        return kernel
    if after not in {KernelState.ARCHIVED, KernelState.QUARANTINED}:
        raise Conflict(f"kernel {kernel_id}: only a verdict leads to {after}", reason="UNLAWFUL_TRANSITION")
    await _transition(tx, kernel, after, by, reason)
    return await get_kernel(tx.connection, kernel_id)


async def _transition(tx: Transaction, kernel: Kernel, after: KernelState, by: Identity, reason: str) -> None:
    check_transition(kernel.id, kernel.state, after, by)
    moved = await tx.connection.execute(
        sa.update(kernels)
        .where(kernels.c.id == kernel.id, kernels.c.state == kernel.state.value)
        .values(state=after.value, update_time=tx.stamp)
    )
    if moved.rowcount != 1:
        raise AssertionError(f"kernel {kernel.id} left {kernel.state} under the library's lock")
    await tx.log(Subject.KERNEL, kernel.id, after)
    await _record(tx, kernel.id, kernel.state, after, by, reason)


async def _record(
    tx: Transaction, kernel_id: str, before: KernelState | None, after: KernelState, by: Identity, reason: str
) -> None:
    row = {
        "kernel_id": kernel_id,
        "sequence": tx.sequence,
        "from_state": None if before is None else before.value,
        "to_state": after.value,
        "identity": signed_name(by),
        "reason": reason[:1024],
        "occur_time": tx.stamp,
    }
    await tx.connection.execute(transitions.insert().values(row))


async def _add_tags(tx: Transaction, sequence: int, tags: Collection[str]) -> None:
    known = sa.select(kernel_tags.c.tag).where(kernel_tags.c.sequence == sequence, kernel_tags.c.tag.in_(tags))
    fresh = set(tags) - set((await tx.connection.execute(known)).scalars())
    if fresh:
        rows = [{"tag": tag, "sequence": sequence} for tag in sorted(fresh)]
        await tx.connection.execute(kernel_tags.insert(), rows)


async def transitions_of(connection: AsyncConnection, kernel_id: str) -> tuple[Transition, ...]:
    """Every change of a kernel's state, oldest first."""
    statement = sa.select(transitions).where(transitions.c.kernel_id == kernel_id).order_by(transitions.c.sequence)
    return tuple(
        Transition(
            from_state=None if row.from_state is None else KernelState(row.from_state),
            to_state=KernelState(row.to_state),
            identity=row.identity,
            reason=row.reason,
            occur_time=from_micros(row.occur_time),
        )
        for row in await connection.execute(statement)
    )


async def keys(connection: AsyncConnection) -> tuple[RegisteredKey, ...]:
    """Every registered key, oldest first."""
    order = (signing_keys.c.create_time, signing_keys.c.key_id)
    rows = await connection.execute(sa.select(signing_keys).order_by(*order))
    return tuple(
        RegisteredKey(
            key_id=row.key_id,
            public_key=row.public_key,
            create_time=from_micros(row.create_time),
            revoked=row.revoked,
        )
        for row in rows
    )


async def register_key(tx: Transaction, key_id: str, public_key: bytes, by: Identity, *, revoked: bool) -> None:
    """Store a public key; registering it again with `revoked` takes it out of trust for good.

    Raises:
        AlreadyExists: KEY_DIFFERS.
        LimitExceeded: TOO_MANY_KEYS.
    """
    known = {key.key_id: key for key in await keys(tx.connection)}
    before = known.get(key_id)
    if before is not None:
        if before.public_key != public_key:
            raise AlreadyExists(
                f"signing key {key_id}: another public key is registered under this name",
                reason="KEY_DIFFERS",
                metadata={"key_id": key_id},
            )
        if revoked and not before.revoked:
            revoke = sa.update(signing_keys).where(signing_keys.c.key_id == key_id).values(revoked=True)
            await tx.connection.execute(revoke)
        return
    if len(known) >= MAX_KEYS:
        raise LimitExceeded(f"signing keys: {MAX_KEYS} are registered, no more are taken", reason="TOO_MANY_KEYS")
    row = {
        "key_id": key_id,
        "public_key": public_key,
        "create_time": tx.stamp,
        "revoked": revoked,
        "registrar": signed_name(by),
    }
    await tx.connection.execute(signing_keys.insert().values(row))
