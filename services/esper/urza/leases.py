"""Work and leases: which steps a piece of work may take, as pure functions that the store applies.

Only the claim itself is SQL alone (`queue.claim`), because it has to choose and take in one statement.

::

    QUEUED --claim--> LEASED --succeed--> DONE
      ^                 |
      |                 +--expire or retryable failure, attempts left--> QUEUED
      |                 +--expire or failure otherwise-----------------> FAILED
      +--retry------------------------------------------------------------+

    QUEUED --give up--> FAILED   (of a build whose blueprint was archived)
"""

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from esper.kasmina.kernels.signing import SignedVerdict, Statement
from esper.mesh.errors import Conflict, Stale
from esper.mesh.identity import Role
from esper.urza.blueprints import Blueprint
from esper.urza.builds import Build, Tier
from esper.urza.kernels import Kernel

__all__ = [
    "HOLDERS",
    "Built",
    "Failed",
    "Judged",
    "Lease",
    "LeaseState",
    "Outcome",
    "Request",
    "Work",
    "WorkKind",
    "WorkState",
    "fingerprint_of",
    "lease_lost",
]

MAX_ERROR = 8192
"""Characters of an error that are kept."""


class WorkKind(StrEnum):
    """Kind of work that the library hands out."""

    COMPILE = "compile"
    """Build a kernel."""

    EVALUATE = "evaluate"
    """Judge a staged kernel."""


HOLDERS = {WorkKind.COMPILE: Role.TEZZERET, WorkKind.EVALUATE: Role.URABRASK}
"""The one role that may take, keep and complete each kind of work."""


class WorkState(StrEnum):
    """Where a piece of work stands."""

    QUEUED = "queued"
    """Waits for a holder."""

    LEASED = "leased"
    """Somebody is at it."""

    DONE = "done"
    """It has its outcome; final."""

    FAILED = "failed"
    """Given up; a retry leads back to QUEUED."""


class LeaseState(StrEnum):
    """Where a lease stands."""

    ACTIVE = "active"
    """Held. There is at most one active lease per piece of work; the schema enforces it."""

    COMPLETED = "completed"
    """Ended with an outcome."""

    EXPIRED = "expired"
    """Ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A piece of work, whatever it is about."""

    kind: WorkKind
    """What has to be done."""

    subject_id: str
    """The build or the kernel."""

    state: WorkState
    """Where it stands."""

    attempts: int = 0
    """Leases handed out since it was last queued afresh."""

    error: str = ""
    """How the last attempt failed; empty when none did."""

    def succeed(self) -> "Work":
        """End it with its outcome.

        Raises:
            Conflict: nobody holds it.
        """
        self._expect(WorkState.LEASED, "completed")
        return replace(self, state=WorkState.DONE, error="")

    def fail(self, error: str, *, retryable: bool, max_attempts: int) -> "Work":
        """End an attempt without an outcome: back into the queue while attempts are left, else given up.

        Raises:
            Conflict: nobody holds it.
        """
        self._expect(WorkState.LEASED, "failed")
        error = error[:MAX_ERROR] or "no reason given"
        if retryable and self.attempts < max_attempts:
            return replace(self, state=WorkState.QUEUED, error=error)
        return replace(self, state=WorkState.FAILED, error=error)

    def expire(self, holder: str, *, max_attempts: int) -> "Work":
        """End an attempt whose lease ran out. What an earlier attempt said is kept: a crash says nothing by itself.

        Raises:
            Conflict: nobody holds it.
        """
        said = f"attempt {self.attempts} of {max_attempts}: the lease of {holder} ran out without an outcome"
        return self.fail(self._after(said), retryable=True, max_attempts=max_attempts)

    def give_up(self, why: str) -> "Work":
        """End it while it waits; what an earlier attempt said is kept.

        Raises:
            Conflict: it does not wait.
        """
        self._expect(WorkState.QUEUED, "given up")
        return replace(self, state=WorkState.FAILED, error=self._after(why)[:MAX_ERROR])

    def _after(self, said: str) -> str:
        return f"{said}; before that: {self.error}" if self.error else said

    def retry(self) -> "Work":
        """Queue it afresh, with all its attempts.

        Raises:
            Conflict: it was not given up.
        """
        self._expect(WorkState.FAILED, "retried")
        return replace(self, state=WorkState.QUEUED, attempts=0, error="")

    def _expect(self, state: WorkState, step: str) -> None:
        if self.state is not state:
            raise Conflict(
                f"{self.kind} of {self.subject_id}: expected state {state} to be {step}, found {self.state}",
                reason="UNLAWFUL_TRANSITION",
                metadata={"subject_id": self.subject_id, "from": self.state.value},
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Right to do one piece of work until `expire_time`."""

    id: str
    """Secret of the holder: 16 random bytes in hexadecimal."""

    kind: WorkKind
    """Kind of work."""

    subject_id: str
    """The build or the kernel."""

    holder: str
    """Who holds it, for people."""

    attempt: int
    """Which attempt this is, from 1."""

    lease_time_s: float
    """Length that a renewal without one means again."""

    expire_time: datetime
    """When it runs out unless renewed."""

    build: Build | None = None
    """For COMPILE: what is asked for."""

    blueprint: Blueprint | None = None
    """For COMPILE: the blueprint with its IR."""

    kernel: Kernel | None = None
    """For EVALUATE: the staged kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What somebody who wants work can do."""

    kind: WorkKind
    """Kind of work."""

    holder: str
    """Who asks, for people."""

    limit: int = 1
    """Pieces at most."""

    lease_time_s: float = 30.0
    """Length of the leases."""

    tiers: frozenset[Tier] = frozenset()
    """For COMPILE: tiers that the forge can build; empty for all."""

    target: str = ""
    """The caller's own machine; empty for work for any."""


@dataclass(frozen=True, slots=True)
class Built:
    """COMPILE succeeded."""

    kernel_id: str
    """The uploaded kernel."""


@dataclass(frozen=True, slots=True)
class Judged:
    """EVALUATE came to a judgement."""

    verdict: SignedVerdict
    """As signed."""

    claimed: Statement
    """The fields beside the signed bytes."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The work failed."""

    error: str
    """The tool's own words."""

    retryable: bool
    """Whether another attempt may succeed."""


Outcome = Built | Judged | Failed


def fingerprint_of(outcome: Outcome) -> str:
    """What tells one outcome from another, so that a completion may be sent again."""
    match outcome:
        case Built():
            parts = ["built", outcome.kernel_id]
        case Judged():
            signed = outcome.verdict
            parts = ["judged", signed.statement.hex(), signed.signature.hex(), signed.key_id]
        case Failed():
            parts = ["failed", outcome.error, str(outcome.retryable)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def lease_lost() -> Stale:
    """The one answer to every lease that is not held: it says nothing about whose it was."""
    return Stale(
        "this lease is not held: it ran out, was completed, or never was; stop working and lease again",
        reason="LEASE_LOST",
    )
