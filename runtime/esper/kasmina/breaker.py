"""Circuit breakers: what failed is kept out for a while, tried once, and kept out for longer if it fails again.

The pattern is that of M. Nygard, *Release It!* (2007). A circuit that is CLOSED lets through. A failure opens it:
nothing is let through for a number of boundaries. Then it is HALF_OPEN: one trial is let through, whose success closes
it and whose failure opens it again for twice as long::

    CLOSED --failure--> OPEN --boundaries--> HALF_OPEN --trial succeeds--> CLOSED
                         ^                      |
                         +---- trial fails -----+   (twice as long, up to a bound)

There is one circuit per compiled code of a kernel (open: its portable graph runs), per kernel (open: no seed may take
it) and per site (open: no seed may begin there). Boundaries are the clock, not seconds, so that equal runs decide
equally. What took the process down opens for good: half-open would mean to lose another process.

State is plain data. It is part of the session's checkpoint, and kept outside of it as well (`Breakers.document`), since
going back to a checkpoint must not bring back trust in what failed after it.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Breakers", "CircuitState", "Scope"]

_LIMIT = 4096


class Scope(StrEnum):
    """What a circuit stands for."""

    CODE = "code"
    """The compiled code of a kernel, on this machine; keyed by kernel id."""
    KERNEL = "kernel"
    """A kernel, however it is run; keyed by its id."""
    SITE = "site"
    """A place of the host; keyed by its name and kind."""


class CircuitState(StrEnum):
    """See the module."""

    CLOSED = "closed"
    """Lets through."""
    OPEN = "open"
    """Lets nothing through until some boundaries have passed."""
    HALF_OPEN = "half_open"
    """Lets one trial through."""


@dataclass(slots=True)
class _Circuit:
    left: int = 0
    """Boundaries until it is half open; 0 where it is."""
    trips: int = 0
    """Failures since it was last closed."""
    for_good: bool = False
    trying: bool = False
    """A trial is under way."""
    reason: str = ""
    """Of the last failure."""

    @property
    def open(self) -> bool:
        return self.for_good or self.left > 0


class Breakers:
    """All circuits of a run; closed ones are not kept. Thread-safe: a watchdog may trip one.

    Args:
        first: boundaries for which the first failure opens a circuit, by scope.
        longest: bound of these, however often it fails.
    """

    def __init__(self, first: Mapping[Scope, int], longest: int) -> None:
        self._first = dict(first)
        self._longest = longest
        self._lock = threading.Lock()
        self._circuits: dict[tuple[Scope, str], _Circuit] = {}

    def state(self, scope: Scope, key: str) -> CircuitState:
        """Where a circuit stands."""
        circuit = self._circuits.get((scope, key))
        if circuit is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if circuit.open else CircuitState.HALF_OPEN

    def refusal(self, scope: Scope, key: str) -> str:
        """Why nothing is let through; empty where it is, a trial included."""
        with self._lock:
            circuit = self._circuits.get((scope, key))
            if circuit is None or not (circuit.open or circuit.trying):
                return ""
            if circuit.trying and not circuit.open:
                when = "until the trial under way is over"
            else:
                when = "for good" if circuit.for_good else f"for {circuit.left} boundaries"
            return f"{scope.value} {key:.80}: circuit open {when}, after {circuit.reason}"

    def trip(self, scope: Scope, key: str, reason: str, *, for_good: bool = False, first: int | None = None) -> int:
        """A failure: open the circuit. Returns the boundaries for which it stays so.

        Args:
            scope: what failed.
            key: which.
            reason: one sentence.
            for_good: never let anything through again.
            first: instead of the boundaries of the first failure of this scope.
        """
        with self._lock:
            circuit = self._circuits.pop((scope, key), None) or _Circuit()
            self._circuits[scope, key] = circuit
            circuit.trips += 1
            circuit.left = max(
                0,
                min(self._longest, (self._first[scope] if first is None else first) * 2 ** min(circuit.trips - 1, 32)),
            )
            circuit.for_good = circuit.for_good or for_good
            circuit.trying = False
            circuit.reason = reason
            self._bound()
            return circuit.left

    def _bound(self) -> None:
        while len(self._circuits) > _LIMIT:
            # The oldest goes, and of what took a process down only when nothing else is left.
            oldest = next((k for k, c in self._circuits.items() if not c.for_good), next(iter(self._circuits)))
            del self._circuits[oldest]

    def begin(self, scope: Scope, key: str) -> None:
        """Something is let through; where the circuit is half open it is the one trial."""
        with self._lock:
            circuit = self._circuits.get((scope, key))
            if circuit is not None and not circuit.open:
                circuit.trying = True

    def succeed(self, scope: Scope, key: str) -> None:
        """What was let through has proved itself: close the circuit, unless it was opened meanwhile."""
        with self._lock:
            circuit = self._circuits.get((scope, key))
            if circuit is not None and not circuit.open:
                del self._circuits[scope, key]

    def give_up(self, scope: Scope, key: str) -> None:
        """The trial ended without showing anything: another one may begin."""
        with self._lock:
            circuit = self._circuits.get((scope, key))
            if circuit is not None:
                circuit.trying = False

    def reset(self, scope: Scope, key: str) -> None:
        """Close a circuit by order of an operator."""
        with self._lock:
            self._circuits.pop((scope, key), None)

    def trying(self, scope: Scope, key: str) -> bool:
        """True while the trial of a half-open circuit is under way."""
        circuit = self._circuits.get((scope, key))
        return circuit is not None and circuit.trying

    def tick(self) -> None:
        """A boundary has passed."""
        with self._lock:
            for circuit in self._circuits.values():
                circuit.left = max(0, circuit.left - 1)

    def document(self) -> dict[str, dict[str, dict[str, Any]]]:
        """As JSON types, by scope and key; empty where all are closed."""
        with self._lock:
            found: dict[str, dict[str, dict[str, Any]]] = {}
            for (scope, key), circuit in self._circuits.items():
                found.setdefault(scope.value, {})[key] = asdict(circuit)
            return found

    def replace(self, *documents: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Take over what `document` gave; of several that know a circuit the last one counts. Trials are over."""
        merged: dict[tuple[Scope, str], _Circuit] = {}
        for document in documents:
            for name, circuits in document.items():
                scope = Scope(name)
                for key, fields in circuits.items():
                    merged.pop((scope, key), None)
                    merged[scope, key] = _Circuit(**{**fields, "trying": False})
        with self._lock:
            self._circuits = merged
            self._bound()
