"""Contracts -> what the controller knows, and its decisions as they are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.kasmina.convert import decision_to_proto, signature_from_proto, signature_to_proto
from esper.kasmina.kernels.pace import score
from esper.kasmina.signature import Layout
from esper.tamiyo.catalogue import KernelState
from esper.tamiyo.domain import KernelFacts
from esper.tamiyo.preparation import BlueprintFacts
from esper.v1 import blueprint_pb2, build_pb2, kernel_pb2, signature_pb2, tamiyo_service_pb2

if TYPE_CHECKING:
    from datetime import datetime

    from esper.kasmina.control import Decision
    from esper.tamiyo.preparation import BuildWish
    from esper.v1 import verdict_pb2

__all__ = ["blueprint_from_proto", "kernel_from_proto", "kernel_state_from_proto", "recorded_to_proto", "wish_to_proto"]

_LATENCY = "latency.forward.p50"
_TIERS = {
    "portable": build_pb2.TIER_PORTABLE,
    "standard": build_pb2.TIER_STANDARD,
    "aggressive": build_pb2.TIER_AGGRESSIVE,
}
_STATES = {
    kernel_pb2.KERNEL_STATE_STAGED: KernelState.STAGED,
    kernel_pb2.KERNEL_STATE_VALIDATED: KernelState.VALIDATED,
}


def blueprint_from_proto(message: blueprint_pb2.Blueprint) -> BlueprintFacts:
    """A blueprint of the library; layouts that this version does not know are left out."""
    known = {f"LAYOUT_{layout.value.upper()}": layout for layout in Layout}
    names = [signature_pb2.Layout.Name(number) for number in message.layouts]
    return BlueprintFacts(
        blueprint_id=message.id,
        name=message.name,
        layouts=frozenset(known[name] for name in names if name in known),
        causal=message.causal,
        tags=tuple(message.tags),
    )


def kernel_state_from_proto(state: kernel_pb2.KernelState.ValueType) -> KernelState:
    """Where a kernel stands; what is neither staged nor validated is closed."""
    return _STATES.get(state, KernelState.CLOSED)


def kernel_from_proto(message: kernel_pb2.Kernel) -> KernelFacts:
    """A kernel of the library.

    Raises:
        InvalidInput: its signature is none.
    """
    return KernelFacts(
        kernel_id=message.id,
        blueprint_id=message.blueprint_id,
        blueprint_name=message.blueprint_name,
        signature=signature_from_proto(message.signature),
        portable=message.tier == build_pb2.TIER_PORTABLE,
        target=message.target,
        zero_birth=message.birth == blueprint_pb2.BIRTH_ZERO,
        causal=message.causal,
        parameters=message.parameters,
        flops_per_position=message.flops_per_position,
        latency_us=_latency_us(message.verdict),
        pace=_pace(message),
    )


def _pace(message: kernel_pb2.Kernel) -> float:
    if message.tier == build_pb2.TIER_PORTABLE:
        return 1.0
    return score({figure.name: figure.value for figure in message.verdict.measurements})


def _latency_us(verdict: verdict_pb2.Verdict) -> float | None:
    for figure in verdict.measurements:
        if figure.name == _LATENCY:
            return figure.value * {"us": 1.0, "ms": 1e3, "s": 1e6}.get(figure.unit, 1.0)
    return None


def wish_to_proto(wish: BuildWish) -> build_pb2.Build:
    """A build to ask for."""
    return build_pb2.Build(
        blueprint_id=wish.blueprint_id,
        signature=signature_to_proto(wish.signature),
        target=wish.target,
        tier=_TIERS[wish.tier],
        priority=wish.priority,
    )


def recorded_to_proto(decision: Decision, policy: str, decided: datetime) -> tamiyo_service_pb2.RecordedDecision:
    """A decision as it is kept and published."""
    message = tamiyo_service_pb2.RecordedDecision(decision=decision_to_proto(decision), policy=policy)
    message.decide_time.FromDatetime(decided)
    return message
