"""Kernels: their states, the transitions that are lawful, and who is entitled to each.

The table `LAWFUL` is the whole law. The store calls `check_transition` on every change of a kernel's state and knows no
other way to make one; STAGED is left only by a verdict (`verdicts.Proof`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType

from esper.kasmina.blueprints.ir import Birth
from esper.kasmina.kernels.signing import SignedVerdict, Statement
from esper.kasmina.signature import Signature
from esper.mesh.errors import InvalidInput
from esper.mesh.identity import Identity, Role
from esper.urza.blueprints import Blueprint
from esper.urza.builds import Build, Tier
from esper.urza.law import check_step

__all__ = [
    "LAWFUL",
    "Kernel",
    "KernelOffer",
    "KernelState",
    "Transition",
    "check_offer",
    "check_transition",
    "signed_name",
]


class KernelState(StrEnum):
    """Where a kernel stands. Only VALIDATED kernels run."""

    STAGED = "staged"
    """Stored, not yet judged."""

    VALIDATED = "validated"
    """Passed the gauntlet, carries a signed verdict."""

    REJECTED = "rejected"
    """Failed the gauntlet; final."""

    ARCHIVED = "archived"
    """Kept for lineage and for the runs that use it, no longer chosen."""

    QUARANTINED = "quarantined"
    """Found harmful after validation: no longer served; final."""


LAWFUL: Mapping[tuple[KernelState | None, KernelState], frozenset[Role]] = MappingProxyType(
    {
        (None, KernelState.STAGED): frozenset({Role.TEZZERET}),
        (KernelState.STAGED, KernelState.VALIDATED): frozenset({Role.URABRASK}),
        (KernelState.STAGED, KernelState.REJECTED): frozenset({Role.URABRASK}),
        (KernelState.VALIDATED, KernelState.ARCHIVED): frozenset({Role.OPERATOR}),
        (KernelState.VALIDATED, KernelState.QUARANTINED): frozenset({Role.OPERATOR, Role.URABRASK}),
        (KernelState.ARCHIVED, KernelState.QUARANTINED): frozenset({Role.OPERATOR, Role.URABRASK}),
    }
)
"""(from, to) -> roles entitled to it; every pair that is missing is unlawful. None stands for "not stored yet"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOffer:
    """What a forge says about the bundle that it is about to upload; believed only where the library can check it."""

    build_id: str
    """Build that asked for it."""

    blueprint_id: str
    """Blueprint that it was built from."""

    signature: Signature
    """What it maps from and to."""

    tier: Tier
    """Effort spent."""

    target: str
    """Machine that it was built for."""

    parameters: int
    """Trainable parameters, in elements."""

    flops_per_position: int
    """Floating-point operations of the forward per position of the output; 0 means unknown."""

    id: str = ""
    """Digest of the bundle, when the forge says it beforehand."""

    size_bytes: int = 0
    """Length of the bundle, when the forge says it beforehand."""

    birth: Birth | None = None
    """Behaviour at birth, when the forge says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of the library."""

    sequence: int
    """Number of the change that stored it."""

    id: str
    """Digest of the bundle's bytes."""

    build_id: str
    """Build that asked for it."""

    blueprint_id: str
    """Blueprint that it was built from."""

    blueprint_name: str
    """Name of that blueprint."""

    signature: Signature
    """What it maps from and to."""

    tier: Tier
    """Effort spent."""

    target: str
    """Machine that it was built for."""

    birth: Birth
    """Behaviour at birth, as its blueprint says."""

    causal: bool
    """True when no position of a sequence sees a later one, as its blueprint says."""

    parameters: int
    """Trainable parameters, in elements."""

    flops_per_position: int
    """Floating-point operations of the forward per position of the output; 0 means unknown."""

    size_bytes: int
    """Length of the bundle."""

    state: KernelState
    """Where it stands."""

    create_time: datetime
    """When the upload was complete."""

    update_time: datetime
    """When the state last changed."""

    verdict: SignedVerdict | None = None
    """The judgement, as signed; None while STAGED."""

    statement: Statement | None = None
    """What the verdict says; None while STAGED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One change of a kernel's state."""

    from_state: KernelState | None
    """From; None for the upload."""

    to_state: KernelState
    """To."""

    identity: str
    """Who did it, like `urabrask:gauntlet-1`."""

    reason: str
    """Why."""

    occur_time: datetime
    """When."""


def signed_name(identity: Identity) -> str:
    """How an identity stands in the records, at most 128 characters: `operator:alice`, or `urabrask` for a service."""
    if identity.subject == identity.role.value:
        return identity.subject
    return f"{identity.role.value}:{identity.subject}"[:128]


def check_transition(kernel_id: str, before: KernelState | None, after: KernelState, by: Identity) -> None:
    """Refuse what the law does not allow.

    Raises:
        Conflict: UNLAWFUL_TRANSITION, nobody may do this.
        Forbidden: ROLE_NOT_ENTITLED, somebody may, but not this caller.
    """
    check_step(LAWFUL, "kernel", kernel_id, before, after, by)


def check_offer(offer: KernelOffer | Kernel, build: Build, blueprint: Blueprint) -> None:
    """Refuse a bundle that is not what the build asked for.

    Raises:
        InvalidInput: KERNEL_MISMATCH, with every difference.
    """
    # A build for "any machine" takes the machine of whoever built it; every other target must be met exactly.
    wanted_target = offer.target if build.tier is Tier.PORTABLE or not build.target else build.target
    expected = {
        "blueprint_id": (build.blueprint_id, offer.blueprint_id),
        "signature": (str(build.signature), str(offer.signature)),
        "tier": (build.tier.value, offer.tier.value),
        "target": (wanted_target, offer.target),
        "birth": (blueprint.birth.value, (offer.birth or blueprint.birth).value),
    }
    wrong = [f"{name} {want!r}, found {found!r}" for name, (want, found) in expected.items() if want != found]
    if wrong:
        raise InvalidInput(
            f"kernel for build {build.id}: expected {'; '.join(wrong)}",
            reason="KERNEL_MISMATCH",
            metadata={"build_id": build.id},
        )
