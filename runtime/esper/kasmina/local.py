"""A control plane without a mesh: kernels that are at hand, decisions by a function or from a recording.

Typical use::

    plane = LocalPlane(kernels={kernel.id: kernel}, advise=my_policy)      # my_policy(BoundaryState) -> Advice | None
    growth = wrap(model, optimizer, mesh=plane)
    plane.reports, plane.events                                             # what a mesh would have been told
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from esper.kasmina.control import Advice, BoundaryState, FieldReport, HealthColumns, RunHello
    from esper.kasmina.signature import Signature

__all__ = ["LocalPlane"]

_KEPT = 10_000


class LocalPlane:
    """Implements `esper.kasmina.control.ControlPlane` in this process.

    Args:
        kernels: by id; a kernel that is not here is never ready.
        advise: the policy; None never decides anything.
    """

    def __init__(
        self,
        kernels: Mapping[str, object] | None = None,
        advise: Callable[[BoundaryState], Advice | None] | None = None,
    ) -> None:
        self.kernels = dict(kernels or {})
        self.variants: dict[str, object] = {}
        """Faster kernels, by the id of the one that each is to replace."""
        self.policy = advise
        self.hello: RunHello | None = None
        self.requested: list[str] = []
        self.held: tuple[str, ...] = ()
        self.reports: deque[FieldReport] = deque(maxlen=_KEPT)
        self.events: deque[tuple[str, dict[str, object]]] = deque(maxlen=_KEPT)
        self.health: deque[HealthColumns] = deque(maxlen=_KEPT)
        self.closed = False

    def open(self, hello: RunHello) -> None:
        """Remember the run."""
        self.hello = hello

    def advise(self, state: BoundaryState, deadline_s: float) -> Advice | None:
        """Ask the policy; the deadline is the policy's own affair, it runs on this thread."""
        del deadline_s
        return None if self.policy is None else self.policy(state)

    def prefetch(self, kernel_ids: Sequence[str]) -> None:
        """Remember that they were asked for."""
        self.requested.extend(kernel_ids)

    def request_kernel(self, kernel_id: str, signature: Signature) -> None:
        """Remember that it was asked for."""
        del signature
        self.requested.append(kernel_id)

    def hold_kernels(self, kernel_ids: Sequence[str]) -> None:
        """Remember which are in use; all that are at hand stay."""
        self.held = tuple(kernel_ids)

    def under_way(self, kernel_ids: Sequence[str]) -> frozenset[str]:
        """None: what is not at hand never comes."""
        del kernel_ids
        return frozenset()

    def kernel(self, kernel_id: str) -> object | None:
        """The kernel at hand, or None."""
        return self.kernels.get(kernel_id)

    def faster_kernel(self, kernel_id: str) -> object | None:
        """The variant at hand, or None."""
        return self.variants.get(kernel_id)

    def publish_health(self, columns: HealthColumns) -> None:
        """Keep the last ones."""
        self.health.append(columns)

    def report(self, report: FieldReport) -> None:
        """Keep the last ones."""
        self.reports.append(report)

    def event(self, kind: str, fields: dict[str, object]) -> None:
        """Keep the last ones."""
        self.events.append((kind, fields))

    def close(self, timeout_s: float) -> None:
        """Remember it."""
        del timeout_s
        self.closed = True
