"""A place where a seed can be attached, and its form in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper.kasmina._ports import Port
from esper.kasmina.control import SiteDescriptor, SiteKind
from esper.kasmina.signature import Signature

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Refusal", "Site", "site_document", "site_from_document"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a seed can be attached."""

    descriptor: SiteDescriptor
    source: str
    """Qualified name of the module whose input is x; for a series site that whose output is y."""
    target: str
    """Qualified name of the module whose output is y."""
    x: Port
    y: Port
    x_shape: tuple[int, ...]
    """Canonical shape of what the kernel is given, as observed, before it is pooled to the extent of y."""
    y_shape: tuple[int, ...]

    @property
    def index(self) -> int:
        """Dense index in the run."""
        return self.descriptor.index

    @property
    def key(self) -> str:
        """Name and kind: the same in every run of the model."""
        return f"{self.descriptor.name} ({self.descriptor.kind.value})"

    @property
    def extent(self) -> tuple[int, ...]:
        """Positions of y as observed: (), (T,) or (H, W)."""
        shape = list(self.y_shape)
        del shape[self.y.layout.feature_dim]
        return tuple(shape[1:])


@dataclass(frozen=True, slots=True)
class Refusal:
    """A candidate that can not grow, and why."""

    name: str
    module_type: str
    reason: str


def site_document(site: Site) -> dict[str, Any]:
    """A site as JSON types, so that a checkpoint can be resumed before the first forward."""
    d = site.descriptor
    fields = {name: getattr(d, name) for name in d.__dataclass_fields__ if name not in {"kind", "signature"}}
    return {
        **fields,
        "kind": d.kind.value,
        "signature": str(d.signature),
        "source": site.source,
        "target": site.target,
        "x": site.x.document(),
        "y": site.y.document(),
        "x_shape": list(site.x_shape),
        "y_shape": list(site.y_shape),
    }


def site_from_document(document: Mapping[str, Any]) -> Site:
    """Read `site_document`."""
    names = SiteDescriptor.__dataclass_fields__
    fields = {name: document[name] for name in names}
    fields |= {"kind": SiteKind(document["kind"]), "signature": Signature.parse(document["signature"])}
    ports = (Port.from_document(document["x"]), Port.from_document(document["y"]))
    shapes = (tuple(document["x_shape"]), tuple(document["y_shape"]))
    return Site(SiteDescriptor(**fields), document["source"], document["target"], *ports, *shapes)
