"""Conversions: signatures, sites, measurements, and the helpers of all of them; see `esper.kasmina.convert`."""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING, Any

from esper.kasmina.control import Counterfactual, SiteDescriptor, SiteHealth, SiteKind, Stage
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import InvalidInput
from esper.v1 import field_report_pb2, seed_pb2, signature_pb2, site_pb2, tensor_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_NAN = float("nan")
MAX_FAILURE = 256
MAX_SENTENCE = 512
_MAX_NAME = 256
_MAX_TYPE = 128

GATE_BLOCKS: tuple[str, ...] = tuple(
    name.removeprefix("GATE_BLOCK_") for name, _ in seed_pb2.GateBlock.items() if not name.endswith("_UNSPECIFIED")
)
"""Reasons of gates that the contract names, without their prefix: what ``SeedState.blocked_by`` should hold."""

GATED = frozenset(range(Stage.GERMINATED, Stage.FINE_TUNING + 1)) | {Stage.EMBARGOED, Stage.ROLLED_BACK}
"""Stages that a gate lies ahead of: only there a seed is ready, or is not."""


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(enum: Any, prefix: str, name: str) -> Any:
    return enum.Value(f"{prefix}_{name.upper()}")


def member(kind: type[Any], enum: Any, prefix: str, number: int) -> Any:
    """The domain's member for a number of the wire.

    Raises:
        InvalidInput: unspecified, or a number that this version does not know.
    """
    try:
        return kind(enum.Name(number).removeprefix(f"{prefix}_").lower())
    except ValueError as error:
        known = ", ".join(str(member) for member in kind)
        raise InvalidInput(f"{prefix.lower()}: expected one of {known}, found number {number}") from error


def stage(number: int) -> Stage:
    try:
        return Stage(number)
    except ValueError as error:
        raise InvalidInput(f"seed stage: expected 1 to {max(Stage)}, found {number}") from error


def column(values: Iterable[float | None]) -> list[float]:
    """One column; empty when nothing in it was measured."""
    column = [_NAN if value is None else value for value in values]
    return [] if all(isnan(value) for value in column) else column


def entries(column: Sequence[Any], size: int, name: str) -> Sequence[Any]:
    if len(column) not in {0, size}:
        raise InvalidInput(f"column {name}: expected {size} entries or none, found {len(column)}")
    return column


def optional(column: Sequence[float], row: int) -> float | None:
    if not column or isnan(column[row]):
        return None
    return column[row]


def given(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def signature_to_proto(signature: Signature) -> signature_pb2.Signature:
    """A signature for the wire."""
    return signature_pb2.Signature(
        layout=number(signature_pb2.Layout, "LAYOUT", signature.layout.value),
        in_features=signature.in_features,
        out_features=signature.out_features,
        dtype=number(tensor_pb2.DataType, "DATA_TYPE", signature.dtype),
    )


def signature_from_proto(message: signature_pb2.Signature) -> Signature:
    """A signature from the wire.

    Raises:
        InvalidInput: no layout, a width out of bounds, or a dtype that is not a floating-point type.
    """
    dtype = tensor_pb2.DataType.Name(message.dtype) if message.dtype in tensor_pb2.DataType.values() else "none"
    return Signature(
        member(Layout, signature_pb2.Layout, "LAYOUT", message.layout),
        message.in_features,
        message.out_features,
        dtype.removeprefix("DATA_TYPE_").lower(),
    )


def site_to_proto(site: SiteDescriptor) -> site_pb2.Site:
    """A site for the wire."""
    return site_pb2.Site(
        index=site.index,
        name=cut(site.name, _MAX_NAME),
        kind=number(site_pb2.SiteKind, "SITE_KIND", site.kind.value),
        granularity=number(site_pb2.Granularity, "GRANULARITY", site.granularity or "unspecified"),
        module_type=cut(site.module_type, _MAX_TYPE),
        signature=signature_to_proto(site.signature),
        narrowest_width=site.narrowest_width,
        parameters=site.parameters,
        depth=site.depth,
        causal=site.causal,
    )


def site_from_proto(message: site_pb2.Site) -> SiteDescriptor:
    """A site from the wire.

    Raises:
        InvalidInput: no kind, or a signature that is none.
    """
    granularity = site_pb2.Granularity.Name(message.granularity).removeprefix("GRANULARITY_").lower()
    return SiteDescriptor(
        index=message.index,
        name=message.name,
        kind=member(SiteKind, site_pb2.SiteKind, "SITE_KIND", message.kind),
        granularity="" if granularity == "unspecified" else granularity,
        module_type=message.module_type,
        signature=signature_from_proto(message.signature),
        narrowest_width=message.narrowest_width,
        parameters=message.parameters,
        depth=message.depth,
        causal=message.causal,
    )


def site_health_to_proto(sites: Sequence[SiteHealth]) -> site_pb2.SiteColumns:
    """Statistics of sites as columns."""
    return site_pb2.SiteColumns(
        site=[site.index for site in sites],
        effective_rank=column(site.effective_rank for site in sites),
        saturation=column(site.saturation for site in sites),
        dead_fraction=column(site.dead_fraction for site in sites),
        gradient_norm=column(site.gradient_norm for site in sites),
        bottleneck=column(site.bottleneck for site in sites),
    )


def site_health_from_proto(message: site_pb2.SiteColumns) -> tuple[SiteHealth, ...]:
    """Statistics of sites from columns.

    Raises:
        InvalidInput: columns of different lengths.
    """
    size = len(message.site)
    rank = entries(message.effective_rank, size, "effective_rank")
    saturation = entries(message.saturation, size, "saturation")
    dead = entries(message.dead_fraction, size, "dead_fraction")
    gradient = entries(message.gradient_norm, size, "gradient_norm")
    bottleneck = entries(message.bottleneck, size, "bottleneck")
    return tuple(
        SiteHealth(
            index=index,
            effective_rank=optional(rank, row),
            saturation=optional(saturation, row),
            dead_fraction=optional(dead, row),
            gradient_norm=optional(gradient, row),
            bottleneck=optional(bottleneck, row),
        )
        for row, index in enumerate(message.site)
    )


def counterfactual_to_proto(measured: Counterfactual) -> field_report_pb2.Counterfactual:
    """A counterfactual measurement for the wire."""
    return field_report_pb2.Counterfactual(
        mean_gain=measured.mean_gain,
        lower_bound=measured.lower_bound,
        confidence=measured.confidence,
        batches=measured.batches,
    )


def counterfactual_from_proto(message: field_report_pb2.Counterfactual) -> Counterfactual:
    """A counterfactual measurement from the wire."""
    return Counterfactual(
        mean_gain=message.mean_gain,
        lower_bound=message.lower_bound,
        confidence=message.confidence,
        batches=message.batches,
    )
