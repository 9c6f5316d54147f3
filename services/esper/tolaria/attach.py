"""Adds modules to a host for good, in plain torch: for the static arm, and for export.

The arithmetic is that of the runtime at alpha 1, ``y + delta(y)`` in series and ``y + delta(fit(x))`` in parallel; the
modules are the blueprints' own, run eagerly, so that nothing of the mesh is needed to train or to export them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor, nn

from esper.kasmina._ports import first_tensor, fit, output_tensor, replace_first
from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.control import SiteKind
from esper.kasmina.kernels.bundle import PARAMETERS, kernel_id_of, unpack
from esper.kasmina.sites import Site, site_document, site_from_document
from esper.mesh.errors import Corrupt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

__all__ = ["Attached", "Grown", "attach", "from_bundle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A module that grew: where, from which kernel, and how its newborn was treated."""

    site: Site
    kernel_id: str
    blueprint_name: str
    learning_rate_scale: float
    """Rate of the newborn over the host's."""
    newborn_steps: int = 0
    """Optimizer steps from its graft until it was the host's own."""
    alpha: float = 1.0
    """Blend factor; 1 for everything that stayed for good."""

    @property
    def key(self) -> str:
        """Name of the module among those that grew: ``seed3``."""
        return f"seed{self.site.index}"

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "site": site_document(self.site),
            "kernel_id": self.kernel_id,
            "blueprint_name": self.blueprint_name,
            "learning_rate_scale": self.learning_rate_scale,
            "newborn_steps": self.newborn_steps,
            "alpha": self.alpha,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Attached:
        """Read `document`."""
        return cls(
            site=site_from_document(document["site"]),
            kernel_id=str(document["kernel_id"]),
            blueprint_name=str(document["blueprint_name"]),
            learning_rate_scale=float(document["learning_rate_scale"]),
            newborn_steps=int(document["newborn_steps"]),
            alpha=float(document["alpha"]),
        )


def from_bundle(kernel_id: str, bundle: bytes) -> BlueprintModule:
    """The blueprint of a kernel in plain torch, with the initial parameters of the bundle; no native code is loaded.

    Raises:
        Corrupt: the bytes are not those of the kernel.
    """
    if kernel_id_of(bundle) != kernel_id:
        raise Corrupt(f"kernel {kernel_id}: its bytes have the digest {kernel_id_of(bundle)}", reason="DIGEST_MISMATCH")
    opened = unpack(bundle)
    plan = opened.blueprint.check(opened.manifest.signature)
    return BlueprintModule(plan, parameters=safetensors.torch.load(opened.members[PARAMETERS]))


def attach(host: nn.Module, site: Site, module: nn.Module, alpha: float = 1.0) -> list[RemovableHandle]:
    """Add `module` at a site of `host` by hooks; the host's own modules, keys and parameters stay as they are."""
    target = host.get_submodule(site.target)
    held: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        assert x is not None
        held.append(x)

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        y = output_tensor(output)
        if site.descriptor.kind is SiteKind.SERIES:
            x = site.y.ordered(y)
        else:
            extent = site.y.extent(tuple(y.shape))
            x = fit(site.x.ordered(held.pop()), site.x.layout, site.y.layout, extent)
        restored = site.y.restore(module(site.y.fold(x)), tuple(y.shape))
        return replace_first(output, y + (restored if alpha == 1.0 else restored * alpha))

    handles: list[RemovableHandle] = []
    if site.descriptor.kind is SiteKind.PARALLEL:
        handles.append(host.get_submodule(site.source).register_forward_pre_hook(keep, with_kwargs=True))
    handles.append(target.register_forward_hook(add))
    return handles


class Grown(nn.Module):
    """A host and what grew in it as one ordinary module, in plain torch.

    Its state stands under ``host.`` and ``grown.seed<index>.``.

    Args:
        host: without hooks of its own; taken over, not copied.
        grown: what to add, in order, with its module.
    """

    def __init__(self, host: nn.Module, grown: Sequence[tuple[Attached, nn.Module]]) -> None:
        super().__init__()
        self.host = host
        self.grown = nn.ModuleDict({attached.key: module for attached, module in grown})
        for attached, module in grown:
            attach(host, attached.site, module, attached.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """The host's output."""
        y: Tensor = self.host(x)
        return y
