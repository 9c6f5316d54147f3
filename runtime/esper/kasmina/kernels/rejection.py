"""Why a kernel is not loaded: every refusal lists its reasons.

::

    KernelRejected
    ├── KernelCorrupt     DATA_LOSS            the bytes are not what their digest or manifest promises
    ├── KernelUntrusted   PERMISSION_DENIED    nobody whom this process trusts says that it may run
    └── KernelUnfit       FAILED_PRECONDITION  a sound kernel, but not for this place
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.mesh.errors import Conflict, Corrupt, EsperError, Forbidden

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KernelCorrupt", "KernelRejected", "KernelUnfit", "KernelUntrusted"]


class KernelRejected(EsperError):
    """A kernel was refused before any of its code was loaded; raise one of the children."""

    default_reason = "KERNEL_REJECTED"

    def __init__(self, kernel_id: str, reasons: Sequence[str], **keywords: Any) -> None:
        self.kernel_id = kernel_id
        self.reasons = tuple(reasons)
        """One sentence each, most fundamental first."""
        text = f"kernel {kernel_id:.80} is refused: {'; '.join(self.reasons)}"
        super().__init__(text, metadata={"kernel_id": kernel_id[:80]}, **keywords)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.kernel_id, self.reasons)


class KernelCorrupt(KernelRejected, Corrupt):
    """The bytes of the bundle are not what its digest or its manifest promises."""

    default_reason = "KERNEL_CORRUPT"


class KernelUntrusted(KernelRejected, Forbidden):
    """No verdict that this process believes says that the kernel may run."""

    default_reason = "KERNEL_UNTRUSTED"


class KernelUnfit(KernelRejected, Conflict):
    """The kernel is sound, but made for another shape, dtype or machine."""

    default_reason = "KERNEL_UNFIT"
