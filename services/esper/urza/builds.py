"""Builds: requests for one kernel each. Who asks for the same kernel twice has asked once."""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from esper.kasmina.kernels.bundle import Tier
from esper.kasmina.signature import Signature

__all__ = ["Build", "BuildOrder", "BuildState", "Tier", "build_id", "canonical_target"]


class BuildState(StrEnum):
    """Where a build stands."""

    QUEUED = "queued"
    """Waits for a forge."""

    LEASED = "leased"
    """A forge holds its lease."""

    SUCCEEDED = "succeeded"
    """Its kernel is stored; final."""

    FAILED = "failed"
    """No attempts left, or it cannot be built; a retry leads back to QUEUED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """What somebody asks for."""

    blueprint_id: str
    """What to build."""

    signature: Signature
    """What the kernel maps from and to."""

    target: str
    """Machine that will run it; empty for any forge's own machine."""

    tier: Tier
    """Effort."""

    priority: int = 0
    """Higher is leased first; 0 to 100."""

    @property
    def id(self) -> str:
        """Name of the build: the same order has the same name for ever."""
        return build_id(self.blueprint_id, self.signature, self.target, self.tier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One build of the library."""

    sequence: int
    """Number of the change that stored it."""

    id: str
    """Digest of the order."""

    blueprint_id: str
    """What to build."""

    signature: Signature
    """What the kernel maps from and to."""

    target: str
    """Machine that will run it; empty for any, always empty for the portable tier."""

    tier: Tier
    """Effort."""

    priority: int
    """Higher is leased first; 0 to 100."""

    state: BuildState
    """Where it stands."""

    attempts: int
    """Leases handed out since it was last requested."""

    kernel_id: str
    """Kernel that came of it; empty until SUCCEEDED."""

    error: str
    """The compiler's own words when it failed; else empty."""

    create_time: datetime
    """When it was first requested."""

    update_time: datetime
    """When its state last changed."""


def canonical_target(target: str, tier: Tier) -> str:
    """The target that counts: a portable kernel runs anywhere, so it is asked for once and not once per machine."""
    return "" if tier is Tier.PORTABLE else target


def build_id(blueprint_id: str, signature: Signature, target: str, tier: Tier) -> str:
    """Name of the build of a blueprint for a signature, a target and a tier: `sha256:` and 64 hexadecimal digits."""
    order = [blueprint_id, str(signature), canonical_target(target, tier), tier.value]
    return "sha256:" + hashlib.sha256(json.dumps(order, separators=(",", ":")).encode()).hexdigest()
