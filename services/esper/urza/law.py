"""Laws about states and how they are enforced: tables of steps with the roles entitled to each, and one check."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from esper.mesh.errors import Conflict, Forbidden
from esper.mesh.identity import Identity, Role

__all__ = ["check_step", "entitled_to"]

_S = TypeVar("_S", bound=StrEnum)


def entitled_to(law: Mapping[tuple[_S | None, _S], frozenset[Role]], before: _S | None, after: _S) -> frozenset[Role]:
    """Roles that may take this step; none when it is unlawful."""
    return law.get((before, after), frozenset())


def check_step(
    law: Mapping[tuple[_S | None, _S], frozenset[Role]],
    what: str,
    subject_id: str,
    before: _S | None,
    after: _S,
    by: Identity,
) -> None:
    """Refuse what a law does not allow.

    Args:
        law: (from, to) -> roles entitled to it; every pair that is missing is unlawful. From None: not stored yet.
        what: `blueprint` or `kernel`.
        subject_id: which one.
        before: where it stands.
        after: where it should go.
        by: who asks.

    Raises:
        Conflict: UNLAWFUL_TRANSITION, nobody may do this.
        Forbidden: ROLE_NOT_ENTITLED, somebody may, but not this caller.
    """
    entitled = entitled_to(law, before, after)
    found = "not stored" if before is None else before.value
    if not entitled:
        allowed = sorted(source.value for source, to in law if to is after and source is not None)
        raise Conflict(
            f"{what} {subject_id}: expected state {' or '.join(allowed) or 'not stored'} to become {after.value}, "
            f"found {found}",
            reason="UNLAWFUL_TRANSITION",
            metadata={f"{what}_id": subject_id, "from": found, "to": after.value},
        )
    if by.role not in entitled:
        raise Forbidden(
            "not allowed",
            reason="ROLE_NOT_ENTITLED",
            private=f"{what} {subject_id}: {found} -> {after.value} belongs to {sorted(entitled)}, caller is {by}",
        )
