"""The change log: what changed, numbered without gaps, in the order in which it was committed."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from esper.urza.blueprints import Blueprint
from esper.urza.builds import Build
from esper.urza.kernels import Kernel

__all__ = ["Change", "Subject"]


class Subject(StrEnum):
    """What a change is about."""

    BLUEPRINT = "blueprint"
    BUILD = "build"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change, with its subject as it was right after it."""

    sequence: int
    """Its number, from 1, without gaps."""

    occur_time: datetime
    """When it was committed."""

    subject: Blueprint | Build | Kernel
    """What changed; a blueprint comes without its IR."""
