"""What the runtime keeps of one seed that is not DORMANT, and of its whole life for the lineage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from esper.kasmina.control import BlendStrategy, Counterfactual, KernelChoice

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from esper.kasmina.attach import Attachment
    from esper.kasmina.blending import Blend
    from esper.kasmina.isolation import IsolationTrainer
    from esper.kasmina.signature import Signature
    from esper.kasmina.sites import Site

__all__ = ["KernelLike", "ManifestLike", "SeedRun", "choice_document", "choice_from_document"]


class ManifestLike(Protocol):
    """What the runtime reads of a kernel's manifest."""

    @property
    def signature(self) -> Signature:
        """What it maps from and to."""

    @property
    def birth(self) -> Any:
        """``zero`` or ``random``; an enum of strings or a string."""

    @property
    def parameter_count(self) -> int:
        """Trainable scalars."""

    @property
    def causal(self) -> bool:
        """True where a position never sees a later one."""

    @property
    def flops_per_position(self) -> int:
        """Of the forward."""


class KernelLike(Protocol):
    """What the runtime needs of ``esper.kasmina.kernels.Kernel``."""

    @property
    def manifest(self) -> ManifestLike:
        """What it is."""

    def instantiate(self, device: torch.device | str = "cpu") -> nn.Module:
        """A module with parameters of its own."""


@dataclass(slots=True)
class SeedRun:
    """One life of a seed, from GERMINATED until the site is DORMANT again or FOSSILIZED for good."""

    site: Site
    choice: KernelChoice
    germinated_boundary: int
    record: dict[str, Any]
    """Its entry of the lineage, JSON types."""
    kernel: KernelLike | None = None
    attachment: Attachment | None = None
    blend: Blend | None = None
    isolation: IsolationTrainer | None = None
    birth: str = ""
    parameters: int = 0
    flops: float = 0.0
    """Per sample, of the forward."""
    birth_finite: bool = True
    birth_gradient: float | None = None
    shapes: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    """Shape and dtype of each parameter at birth."""
    isolation_gain: float | None = None
    held_out: int = 0
    counterfactual: Counterfactual | None = None
    losses_before: int = 0
    """Training losses that the run had seen when the seed was grafted."""
    failure: str = ""
    faults: list[str] = field(default_factory=list)
    """What its kernel did wrong, one sentence each, oldest first."""
    drift: Tensor | None = None
    """How loud the seed is, as all ranks agreed; None where there is one rank, and its own number counts."""

    @property
    def index(self) -> int:
        """Of the site and the seed."""
        return self.site.index

    @property
    def module(self) -> nn.Module:
        """The kernel's module."""
        assert self.attachment is not None
        return self.attachment.seed.delta


def choice_document(choice: KernelChoice) -> dict[str, Any]:
    """As JSON types."""
    return {
        "kernel_id": choice.kernel_id,
        "blueprint_name": choice.blueprint_name,
        "blend": choice.blend.value,
        "blend_steps": choice.blend_steps,
        "learning_rate_scale": choice.learning_rate_scale,
    }


def choice_from_document(document: dict[str, Any]) -> KernelChoice:
    """Read `choice_document`."""
    return KernelChoice(**{**document, "blend": BlendStrategy(document["blend"])})
