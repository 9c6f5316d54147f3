"""What the sandbox sends, read with the suspicion that code of strangers deserves; torch-free."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper.kasmina.kernels.signing import CheckResult, Figure
from esper.mesh.errors import InvalidInput
from esper.urabrask.checks import CHECKS

__all__ = ["Findings", "check_from", "findings_from", "shown"]

MAX_NAME = 64
MAX_FINDING = 1024
MAX_UNIT = 16
MAX_TAG = 48
MAX_TAGS = 32
MAX_FIGURES = 64
_NAMES = tuple(spec.name for spec in CHECKS)


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome of one run through the gauntlet."""

    target: str
    """Machine of the run."""
    checks: tuple[CheckResult, ...]
    """In the order of the gauntlet; it ends early only behind a failure."""
    measurements: tuple[Figure, ...]
    tags: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every check of the gauntlet was run and held; never taken from the sandbox's word."""
        return tuple(check.name for check in self.checks) == _NAMES and all(check.passed for check in self.checks)


def shown(value: object) -> str:
    """A value in words, however long or deep it is."""
    return reprlib.repr(value)[:200]


def check_from(document: object) -> CheckResult:
    """One result.

    Raises:
        InvalidInput: of another form, or of a check that does not exist.
    """
    if (
        not isinstance(document, Mapping)
        or document.get("name") not in _NAMES
        or type(document.get("passed")) is not bool
    ):
        raise InvalidInput(f"sandbox: expected the result of a check, found {shown(document)}")
    return CheckResult(
        name=document["name"],
        passed=document["passed"],
        finding=_text(document.get("finding"), MAX_FINDING),
        elapsed_ms=_number(document.get("elapsed_ms")),
    )


def findings_from(document: Mapping[str, Any]) -> Findings:
    """The whole result.

    Raises:
        InvalidInput: of another form; checks that repeat, are out of order, or stop without a failure.
    """
    checks = tuple(check_from(entry) for entry in _entries(document, "checks", len(_NAMES)))
    positions = [_NAMES.index(check.name) for check in checks]
    if positions != sorted(set(positions)) or not checks:
        raise InvalidInput(f"sandbox: expected each check once and in order, found {[check.name for check in checks]}")
    if all(check.passed for check in checks) and len(checks) < len(_NAMES):
        raise InvalidInput(f"sandbox: expected {len(_NAMES)} checks or a failure, found {len(checks)} that passed")
    figures = []
    for entry in _entries(document, "measurements", MAX_FIGURES):
        if not isinstance(entry, Mapping):
            raise InvalidInput(f"sandbox: expected a measurement, found {shown(entry)}")
        name, unit = _text(entry.get("name"), MAX_NAME), _text(entry.get("unit"), MAX_UNIT)
        figures.append(Figure(name, _number(entry.get("value")), unit))
    tags = tuple(_text(tag, MAX_TAG) for tag in _entries(document, "tags", MAX_TAGS))
    return Findings(_text(document.get("target"), 128), checks, tuple(figures), tags)


def _entries(document: Mapping[str, Any], key: str, most: int) -> list[Any]:
    entries = document.get(key)
    if not isinstance(entries, list) or len(entries) > most:
        raise InvalidInput(f"sandbox: expected at most {most} {key}, found {shown(entries)}")
    return entries


def _text(value: object, most: int) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"sandbox: expected a text, found {shown(value)}")
    # The limits of the contract count bytes; halves of surrogate pairs have none.
    return value.encode(errors="replace")[:most].decode(errors="ignore")


def _number(value: object) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass  # an integer beyond every float
    raise InvalidInput(f"sandbox: expected a finite number, found {shown(value)}")
