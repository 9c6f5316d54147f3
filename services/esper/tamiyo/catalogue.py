"""What the library holds, as far as a controller must know: blueprints to build, kernels and where they stand."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING

from esper.tamiyo.domain import Shelf

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.kasmina.signature import Signature
    from esper.tamiyo.domain import KernelFacts
    from esper.tamiyo.preparation import BlueprintFacts

__all__ = ["Catalogue", "KernelState"]


class KernelState(StrEnum):
    """Where a kernel stands, as a controller sees it."""

    STAGED = "staged"
    """Not judged yet."""
    VALIDATED = "validated"
    """May be chosen."""
    CLOSED = "closed"
    """Rejected, archived or quarantined: is not chosen any more."""


class Catalogue:
    """A view that is replaced by a listing and kept up by changes. Used from one event loop.

    Args:
        limit: most kernels kept; beyond it the ones seen longest ago are forgotten.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._blueprints: dict[str, BlueprintFacts] = {}
        self._validated: OrderedDict[str, KernelFacts] = OrderedDict()
        self._states: OrderedDict[str, KernelState] = OrderedDict()
        self.revision = 0
        """Grows with every change."""

    @property
    def blueprints(self) -> tuple[BlueprintFacts, ...]:
        """Those that may be built, by name."""
        return tuple(sorted(self._blueprints.values(), key=lambda b: (b.name, b.blueprint_id)))

    def clear(self) -> None:
        """Forget everything: a new listing follows."""
        self._blueprints.clear()
        self._validated.clear()
        self._states.clear()
        self.revision += 1

    def put_blueprint(self, blueprint: BlueprintFacts, *, active: bool) -> None:
        """A blueprint was submitted, archived or brought back."""
        self.revision += 1
        if active:
            self._blueprints[blueprint.blueprint_id] = blueprint
        else:
            self._blueprints.pop(blueprint.blueprint_id, None)

    def put_kernel(self, kernel: KernelFacts, state: KernelState) -> None:
        """A kernel was stored or changed its state."""
        self.revision += 1
        self._states[kernel.kernel_id] = state
        self._states.move_to_end(kernel.kernel_id)
        if state is KernelState.VALIDATED:
            self._validated[kernel.kernel_id] = kernel
            self._validated.move_to_end(kernel.kernel_id)
        else:
            self._validated.pop(kernel.kernel_id, None)
        while len(self._states) > self.limit:
            self._validated.pop(self._states.popitem(last=False)[0], None)

    def state_of(self, kernel_id: str) -> KernelState | None:
        """Where a kernel stands; None when it was never seen."""
        return self._states.get(kernel_id)

    def shelf(self, signatures: Iterable[Signature]) -> Shelf:
        """The validated kernels of some signatures, with the tags of their blueprints."""
        wanted = frozenset(signatures)
        return Shelf(
            replace(kernel, tags=self._tags(kernel))
            for kernel in self._validated.values()
            if kernel.signature in wanted
        )

    def _tags(self, kernel: KernelFacts) -> tuple[str, ...]:
        blueprint = self._blueprints.get(kernel.blueprint_id)
        return kernel.tags if blueprint is None else blueprint.tags
