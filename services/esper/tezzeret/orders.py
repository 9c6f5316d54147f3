"""What the forge is asked for, what comes of it, and what it tells about the way there. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from esper.kasmina.kernels.bundle import Manifest, Tier
from esper.kasmina.signature import Signature
from esper.mesh.errors import Conflict

__all__ = ["BuildFailed", "Built", "Capability", "Order", "Phase", "Step", "Task", "trim"]

MAX_ERROR = 8000
"""Characters of a compiler's words that are passed on; the contract takes 8 KiB."""


class Phase(StrEnum):
    """How far an attempt at a build has come."""

    LEASED = "leased"
    EXPORTING = "exporting"
    COMPILING = "compiling"
    UPLOADING = "uploading"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        """Whether the attempt is over."""
        return self in {Phase.SUCCEEDED, Phase.FAILED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A build of the library, with the IR of its blueprint."""

    build_id: str
    blueprint_id: str
    ir: bytes
    """Canonical JSON of the blueprint."""
    signature: Signature
    target: str
    """Machine that will run the kernel; empty means the forge's own."""
    tier: Tier


@dataclass(frozen=True, slots=True)
class Task:
    """An order under a lease."""

    lease_id: str
    attempt: int
    order: Order


@dataclass(frozen=True, slots=True)
class Built:
    """A finished kernel."""

    kernel_id: str
    bundle: bytes
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happened to an order."""

    order: Order
    phase: Phase
    elapsed_s: float
    """Since the lease began."""
    occurred_at: datetime
    attempt: int = 1
    error: str = ""
    kernel_id: str = ""


@dataclass(frozen=True, slots=True)
class Capability:
    """What the machine of the workers can build."""

    target: str
    """Its name."""
    limitations: Mapping[Tier, tuple[str, ...]]
    """Why it cannot build a tier; empty where it can."""

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that it can build."""
        return tuple(tier for tier in Tier if not self.limitations.get(tier))


class BuildFailed(Conflict):
    """An attempt at a build gave no kernel; the text is the tool's own, for the author of the blueprint."""

    default_reason = "BUILD_FAILED"

    def __init__(self, words: str, *, retryable: bool, reason: str | None = None) -> None:
        super().__init__(trim(words), reason=reason)
        self.retryable = retryable
        """Whether another attempt may succeed: after a crash or a hang, not after a compiler's refusal."""


def trim(words: str) -> str:
    """A long text without its middle: compilers say what failed at the beginning and why at the end."""
    if len(words.encode()) <= MAX_ERROR:
        return words
    half = MAX_ERROR // 2 - 16
    data = words.encode()
    return data[:half].decode(errors="ignore") + "\n[...]\n" + data[-half:].decode(errors="ignore")
