"""Runs <-> contracts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format, struct_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper.tolaria.core import Arm, RunSpec, RunState
from esper.tolaria.overrides import encode
from esper.v1 import run_pb2, tolaria_service_pb2

if TYPE_CHECKING:
    from datetime import datetime

    from esper.tolaria.core import Progress, Result, View
    from esper.tolaria.recipes import Recipe

__all__ = ["recipe_to_proto", "run_to_proto", "spec_from_proto", "spec_to_proto", "state_from_proto"]

_ARMS = {run_pb2.ARM_GROWN: Arm.GROWN, run_pb2.ARM_HOST: Arm.HOST, run_pb2.ARM_STATIC: Arm.STATIC}
_ARM_NUMBERS = {arm: number for number, arm in _ARMS.items()}
_STATES = {getattr(run_pb2, f"RUN_STATE_{state.name}"): state for state in RunState}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}
_MAX_ERROR, _MAX_PHASE, _MAX_DECISION, _MAX_SITE, _MAX_NAME, _MAX_SEEDS = 8192, 128, 512, 256, 64, 1024


def spec_from_proto(message: run_pb2.RunSpec) -> RunSpec:
    """What was asked for; an arm that is not said is GROWN."""
    return RunSpec(
        recipe=message.recipe,
        seed=message.seed,
        overrides=json_format.MessageToDict(message.overrides) if message.HasField("overrides") else {},
        arm=_ARMS.get(message.arm, Arm.GROWN),
        reference_run_id=message.reference_run_id,
        group=message.group,
    )


def spec_to_proto(spec: RunSpec) -> run_pb2.RunSpec:
    """The inverse of `spec_from_proto`."""
    return run_pb2.RunSpec(
        recipe=spec.recipe,
        seed=spec.seed,
        overrides=_struct(spec.overrides) if spec.overrides else None,
        arm=_ARM_NUMBERS[spec.arm],
        reference_run_id=spec.reference_run_id,
        group=spec.group,
    )


def state_from_proto(number: int) -> RunState | None:
    """The state, or None for UNSPECIFIED."""
    return _STATES.get(number)


def run_to_proto(seen: View) -> run_pb2.Run:
    """A run as a client sees it; texts are cut to their bounds."""
    return run_pb2.Run(
        id=seen.record.id,
        spec=spec_to_proto(seen.record.spec),
        state=_STATE_NUMBERS[seen.state],
        error=_cut(seen.error, _MAX_ERROR),
        progress=_progress(seen.progress) if seen.progress else None,
        create_time=_time(seen.record.create_time),
        update_time=_time(seen.update_time),
        result=_result(seen.result) if seen.result else None,
    )


def _progress(progress: Progress) -> run_pb2.RunProgress:
    return run_pb2.RunProgress(
        sequence=progress.sequence,
        phase=_cut(progress.phase, _MAX_PHASE),
        epoch=progress.epoch,
        epochs=progress.epochs,
        step=progress.step,
        steps=progress.steps,
        train_loss=progress.train_loss,
        validation_loss=progress.validation_loss,
        validation_accuracy=progress.validation_accuracy,
        parameters=progress.parameters,
        seeds=[
            run_pb2.SeedProgress(
                index=seed.index,
                site=_cut(seed.site, _MAX_SITE),
                stage=int(seed.stage),  # type: ignore[arg-type]  # equal numbers by definition
                blueprint_name=_cut(seed.blueprint_name, _MAX_NAME),
                alpha=seed.alpha,
            )
            for seed in progress.seeds[:_MAX_SEEDS]
        ],
        last_decision=_cut(progress.last_decision, _MAX_DECISION),
        control_plane=progress.control_plane,
        elapsed=_duration(progress.elapsed_s),
    )


def _result(result: Result) -> run_pb2.RunResult:
    return run_pb2.RunResult(
        test_loss=result.test_loss,
        test_accuracy=result.test_accuracy,
        validation_loss=result.validation_loss,
        host_parameters=result.host_parameters,
        final_parameters=result.final_parameters,
        training_flops=result.training_flops,
        training_time=_duration(result.training_time_s),
        kernel_ids=result.kernel_ids[:_MAX_SEEDS],
        weights_digest=result.weights_digest,
        preparation_time=_duration(result.preparation_time_s),
    )


def recipe_to_proto(recipe: Recipe) -> tolaria_service_pb2.Recipe:
    """Name, description and full configuration."""
    return tolaria_service_pb2.Recipe(
        name=recipe.name, description=_cut(recipe.description, 1024), config=_struct(encode(recipe.build()))
    )


def _struct(data: dict[str, Any]) -> struct_pb2.Struct:
    return json_format.ParseDict(data, struct_pb2.Struct())


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes, on a border between characters."""
    raw = text.encode()
    return text if len(raw) <= limit else raw[: limit - 3].decode(errors="ignore") + "…"


def _time(moment: datetime) -> Timestamp:
    found = Timestamp()
    found.FromDatetime(moment)
    return found


def _duration(seconds: float) -> Duration:
    whole = math.floor(seconds)
    return Duration(seconds=whole, nanos=min(999_999_999, round((seconds - whole) * 1e9)))
