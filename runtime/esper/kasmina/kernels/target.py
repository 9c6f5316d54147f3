"""The machine that a compiled kernel was made for; torch-free except `Target.here`.

``str(Target.here())`` is like ``cpu/x86_64/avx512/torch-2.13``. Two machines with one target string run one another's
kernels: the compiler is told to use no instruction beyond those that the capability names.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

from esper.mesh.errors import InvalidInput

__all__ = ["Target"]

_PART = re.compile(r"[a-z0-9_.+-]{1,32}")
_MARCH = {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "default": "x86-64-v2"}


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """Device type, architecture, capability and the minor version of torch whose ABI the kernel links.

    Raises:
        InvalidInput: a part is empty, too long or has a character outside ``a-z 0-9 _ . + -``.
    """

    device: str
    """``cpu`` or ``cuda``."""
    architecture: str
    """Machine for a CPU (``x86_64``, ``aarch64``); vendor for a GPU (``nvidia``)."""
    capability: str
    """Vector instructions of a CPU (``avx512``, ``avx2``, ``default``); compute capability of a GPU (``sm_90``)."""
    torch: str
    """Minor version of torch, ``2.13``."""

    def __post_init__(self) -> None:
        for name in ("device", "architecture", "capability", "torch"):
            if not _PART.fullmatch(getattr(self, name)):
                raise InvalidInput(f"target {name}: expected {_PART.pattern}, found {getattr(self, name)!r:.60}")

    def __str__(self) -> str:
        return f"{self.device}/{self.architecture}/{self.capability}/torch-{self.torch}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read the form that ``str()`` writes.

        Raises:
            InvalidInput: the text has another form.
        """
        parts = text.split("/")
        if len(parts) != 4 or not parts[3].startswith("torch-"):
            raise InvalidInput(f"target: expected like 'cpu/x86_64/avx512/torch-2.13', found {text!r:.80}")
        return cls(parts[0], parts[1], parts[2], parts[3].removeprefix("torch-"))

    @classmethod
    def here(cls, device: str = "cpu") -> Target:
        """The target of this process.

        Raises:
            InvalidInput: there is no such device here.
        """
        import torch

        version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
        if device == "cpu":
            capability = torch.backends.cpu.get_cpu_capability().lower()
            return cls("cpu", platform.machine().lower(), capability, version)
        if device == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            return cls("cuda", "nvidia", f"sm_{major}{minor}", version)
        raise InvalidInput(f"target: expected cpu, or cuda where there is one, found {device!r:.40}")

    @property
    def march(self) -> str | None:
        """The ``-march`` that keeps to the capability; None where the compiler's own choice stands."""
        return _MARCH.get(self.capability) if self.device == "cpu" and self.architecture == "x86_64" else None
