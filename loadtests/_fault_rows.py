"""One line of the fault table: what is injected, and what must come of it."""

from collections.abc import Callable
from dataclasses import dataclass

from loadtests._faults import Found, Trial, examine

__all__ = ["Row"]


@dataclass(frozen=True, kw_only=False)
class Row:
    """A fault and its consequences."""

    where: str
    """What fails."""
    fault: str
    """How."""
    begin: Callable[[], tuple[Trial, Callable[[Trial], None]]]
    """Gives a fresh trial and the script that trains it and injects the fault."""
    differs: int = 0
    """First step after which the host may differ from a run without growth; 0: it never does."""
    missed: int | None = None
    """Training steps that the seed misses before something else takes over; None where it is taken out for good."""
    answer: str = ""
    """``portable``, ``identity``, ``cancelled``; empty where no kernel is at fault."""
    kind: str = ""
    """The fault as it is told; empty where it is not a kernel's."""
    circuit: str = ""
    """Scope of the circuit that must be open afterwards."""
    says: str = ""
    """What the log says, once."""
    counts: str = ""
    """Counter that must have counted."""
    escapes: str = ""
    """What reaches the user's loop: a known limit."""

    @property
    def name(self) -> str:
        """Of the test."""
        return f"{self.where}: {self.fault}"

    def run(self) -> Found:
        """Train with the fault."""
        trial, script = self.begin()
        found = examine(script, trial)
        found.missed = trial.missed
        return found

    def problems(self, found: Found) -> list[str]:
        """What is not as it must be; empty where all is."""
        if self.escapes:
            return [] if self.escapes in found.escaped else [f"expected {self.escapes!r} to escape: {found.escaped!r}"]
        told = [(f["fault"], f["answer"]) for kind, f in found.events if kind == "kernel_fault"]
        lines = [line for line in found.log if line.startswith("kernel fault: ")]
        expected = [(self.kind, self.answer)] if self.kind else told
        said = sum(self.says in line for line in found.log)
        failed = any("kernel failed" in reason for reason in found.reasons)
        checks = {
            f"reached the loop: {found.escaped}": not found.escaped,
            f"host: expected to differ from step {self.differs}, found {found.differs}": found.differs == self.differs,
            f"seed: expected {self.missed} steps missed, found {found.missed}": self.missed in {None, found.missed},
            f"events: expected {expected}, found {told}": told == expected,
            f"log: expected a line for each of {told}, found {lines}": len(lines) == len(told),
            f"counters: expected one {self.kind}, found {found.counters}": not self.kind
            or found.counters.get(f"fault_{self.kind}") == 1,
            f"circuits: expected {self.circuit}, found {found.circuits}": not self.circuit
            or self.circuit in found.circuits,
            f"field reports: expected a failure, found {found.reasons}": self.answer != "identity" or failed,
            f"stage: expected a cancelled seed, found {found.stage}": self.answer != "cancelled"
            or (found.stage in {"CANCELLED", "DORMANT"} and bool(found.reasons)),
            f"log: expected {self.says!r}, found {found.log}": not self.says or said > 0,
            f"counters: expected {self.counts}, found {found.counters}": not self.counts
            or self.counts in found.counters,
        }
        return [text for text, holds in checks.items() if not holds]
