"""Conversions: decisions and advice on the way down, field reports on the way up; see `esper.kasmina.convert`."""

from __future__ import annotations

from typing import cast

from esper.kasmina._convert_base import (
    MAX_SENTENCE,
    counterfactual_from_proto,
    counterfactual_to_proto,
    cut,
    member,
    number,
    site_from_proto,
    site_to_proto,
    stage,
)
from esper.kasmina.control import Action, Advice, BlendStrategy, Decision, FieldReport, KernelChoice, Outcome
from esper.mesh.blobs import digest_bytes, digest_text
from esper.v1 import decision_pb2, field_report_pb2, seed_pb2, tamiyo_service_pb2


def kernel_choice_to_proto(choice: KernelChoice) -> decision_pb2.KernelChoice:
    """The kernel of a GERMINATE for the wire.

    Raises:
        InvalidInput: a kernel id that is no digest.
    """
    return decision_pb2.KernelChoice(
        kernel=digest_bytes(choice.kernel_id),
        blueprint_name=choice.blueprint_name,
        blend=number(decision_pb2.BlendStrategy, "BLEND_STRATEGY", choice.blend.value),
        blend_steps=choice.blend_steps,
        learning_rate_scale=choice.learning_rate_scale,
    )


def kernel_choice_from_proto(message: decision_pb2.KernelChoice) -> KernelChoice:
    """The kernel of a GERMINATE from the wire.

    Raises:
        InvalidInput: a digest that is not 32 bytes, or no blend strategy.
    """
    return KernelChoice(
        kernel_id=digest_text(message.kernel),
        blueprint_name=message.blueprint_name,
        blend=member(BlendStrategy, decision_pb2.BlendStrategy, "BLEND_STRATEGY", message.blend),
        blend_steps=message.blend_steps,
        learning_rate_scale=message.learning_rate_scale,
    )


def decision_to_proto(decision: Decision) -> decision_pb2.Decision:
    """One command for the wire.

    Raises:
        InvalidInput: a kernel id that is no digest.
    """
    message = decision_pb2.Decision(
        id=decision.decision_id,
        boundary=decision.boundary,
        seed=decision.seed,
        action=number(decision_pb2.DecisionAction, "DECISION_ACTION", decision.action.value),
        embargo_boundaries=decision.embargo_boundaries,
        reason=decision.reason,
        explanation=cut(decision.explanation, MAX_SENTENCE),
    )
    if decision.to_stage is not None:
        message.to_stage = cast("seed_pb2.SeedStage.ValueType", int(decision.to_stage))
    if decision.kernel is not None:
        message.kernel.CopyFrom(kernel_choice_to_proto(decision.kernel))
    return message


def decision_from_proto(message: decision_pb2.Decision) -> Decision:
    """One command from the wire.

    Raises:
        InvalidInput: no action, an unknown stage, or a kernel that is none.
    """
    return Decision(
        decision_id=message.id,
        boundary=message.boundary,
        seed=message.seed,
        action=member(Action, decision_pb2.DecisionAction, "DECISION_ACTION", message.action),
        reason=message.reason,
        explanation=message.explanation,
        to_stage=stage(message.to_stage) if message.to_stage else None,
        kernel=kernel_choice_from_proto(message.kernel) if message.HasField("kernel") else None,
        embargo_boundaries=message.embargo_boundaries,
    )


def advice_to_proto(advice: Advice) -> tamiyo_service_pb2.Advice:
    """The answer to a boundary for the wire.

    Raises:
        InvalidInput: a kernel id that is no digest.
    """
    return tamiyo_service_pb2.Advice(
        boundary=advice.boundary,
        decisions=[decision_to_proto(decision) for decision in advice.decisions],
        explanation=cut(advice.explanation, MAX_SENTENCE),
        controller_state=advice.controller_state,
        prefetch=[digest_bytes(kernel_id) for kernel_id in advice.prefetch],
    )


def advice_from_proto(message: tamiyo_service_pb2.Advice) -> Advice:
    """The answer to a boundary from the wire.

    Raises:
        InvalidInput: a decision that is none, or a digest that is not 32 bytes.
    """
    return Advice(
        boundary=message.boundary,
        decisions=tuple(decision_from_proto(decision) for decision in message.decisions),
        explanation=message.explanation,
        controller_state=message.controller_state,
        prefetch=tuple(digest_text(raw) for raw in message.prefetch),
    )


def field_report_to_proto(report: FieldReport) -> field_report_pb2.FieldReport:
    """A field report for the wire."""
    measured = report.counterfactual
    return field_report_pb2.FieldReport(
        run_id=report.run_id,
        task=report.task,
        site=site_to_proto(report.site),
        kernel_id=report.kernel_id,
        blueprint_name=report.blueprint_name,
        outcome=number(field_report_pb2.Outcome, "OUTCOME", report.outcome.value),
        germinated_boundary=report.germinated_boundary,
        ended_boundary=report.ended_boundary,
        parameters=report.parameters,
        counterfactual=None if measured is None else counterfactual_to_proto(measured),
        reason=cut(report.reason, MAX_SENTENCE),
    )


def field_report_from_proto(message: field_report_pb2.FieldReport) -> FieldReport:
    """A field report from the wire.

    Raises:
        InvalidInput: no outcome, or a site that is none.
    """
    return FieldReport(
        run_id=message.run_id,
        task=message.task,
        site=site_from_proto(message.site),
        kernel_id=message.kernel_id,
        blueprint_name=message.blueprint_name,
        outcome=member(Outcome, field_report_pb2.Outcome, "OUTCOME", message.outcome),
        germinated_boundary=message.germinated_boundary,
        ended_boundary=message.ended_boundary,
        parameters=message.parameters,
        counterfactual=(
            counterfactual_from_proto(message.counterfactual) if message.HasField("counterfactual") else None
        ),
        reason=message.reason,
    )
