"""What a run is: frozen dataclasses without torch, gRPC or files, and the rules of its states.

::

    PREPARING -> RUNNING -> SUCCEEDED
    RUNNING -> PAUSED                     asked to, or lost its control plane and was told to wait
    PREPARING, RUNNING -> FAILED | INTERRUPTED
    PREPARING, RUNNING, PAUSED, INTERRUPTED -> STOPPED
    PAUSED, FAILED, INTERRUPTED -> PREPARING      by a resume
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from esper.kasmina.control import Stage
from esper.mesh.errors import Corrupt

__all__ = [
    "NO_PROGRESS",
    "RESUMABLE",
    "SETTLED",
    "STOPPABLE",
    "Arm",
    "ProcessMark",
    "Progress",
    "Result",
    "RunRecord",
    "RunSpec",
    "RunState",
    "SeedProgress",
    "Status",
    "View",
    "from_json",
    "to_json",
    "view",
]

_T = TypeVar("_T")


class RunState(StrEnum):
    """Where a run stands."""

    PREPARING = "preparing"
    """Queued, or setting up data, model and kernels."""
    RUNNING = "running"
    """Training."""
    PAUSED = "paused"
    """Stopped at a checkpoint."""
    SUCCEEDED = "succeeded"
    """Finished; final."""
    FAILED = "failed"
    """Ended with an error."""
    STOPPED = "stopped"
    """Ended by a person; final."""
    INTERRUPTED = "interrupted"
    """Its process went away without a word."""


SETTLED = frozenset({RunState.PAUSED, RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED, RunState.INTERRUPTED})
"""States in which no process works on the run."""
RESUMABLE = frozenset({RunState.PAUSED, RunState.FAILED, RunState.INTERRUPTED})
"""States that a resume leaves."""
STOPPABLE = frozenset({RunState.PREPARING, RunState.RUNNING, RunState.PAUSED, RunState.INTERRUPTED})
"""States that a stop leaves."""


class Arm(StrEnum):
    """Which network a run trains."""

    GROWN = "grown"
    """The host with seeds."""
    HOST = "host"
    """The host alone."""
    STATIC = "static"
    """The host with the modules of another run from step 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What was asked for."""

    recipe: str
    """Name of the recipe."""
    seed: int = 0
    """Seed of all randomness."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Changed fields by dotted path."""
    arm: Arm = Arm.GROWN
    """Which network."""
    reference_run_id: str = ""
    """For STATIC: the run whose modules are there from step 0."""
    group: str = ""
    """Runs that are compared with each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedProgress:
    """One seed that is not dormant."""

    index: int
    site: str
    stage: Stage
    blueprint_name: str
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Progress as a person would follow it; None where not measured yet."""

    sequence: int
    """Counts from 1, resumes included."""
    phase: str
    epoch: float
    epochs: float
    step: int
    steps: int
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    parameters: int
    seeds: tuple[SeedProgress, ...]
    last_decision: str
    control_plane: bool
    """Whether the controller answered at the last boundary."""
    elapsed_s: float
    """Seconds of training, resumes included; what came before it is not counted."""


NO_PROGRESS = Progress(
    sequence=0,
    phase="",
    epoch=0.0,
    epochs=0.0,
    step=0,
    steps=0,
    train_loss=None,
    validation_loss=None,
    validation_accuracy=None,
    parameters=0,
    seeds=(),
    last_decision="",
    control_plane=False,
    elapsed_s=0.0,
)
"""Of a run whose process has not said anything yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Final figures."""

    test_loss: float
    test_accuracy: float | None
    validation_loss: float
    validation_accuracy: float | None
    host_parameters: int
    final_parameters: int
    training_flops: float
    training_time_s: float
    kernel_ids: tuple[str, ...]
    weights_digest: str
    preparation_time_s: float = 0.0
    """Wall time before the loop, resumes included; absent in results that were written before it was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMark:
    """Identifies a process beyond the reuse of its number."""

    pid: int
    started: float
    """Start time as the system tells it, seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What the service knows of a run; written by the service alone (``run.json``)."""

    id: str
    spec: RunSpec
    create_time: datetime
    update_time: datetime
    request_id: str = ""
    attempt: int = 1
    """Counts starts and resumes."""
    process: ProcessMark | None = None
    """The process of this attempt, once started."""
    verdict: RunState | None = None
    """State that the service found or set for this attempt (FAILED, STOPPED, INTERRUPTED); overrules the process."""
    error: str = ""
    """Why, with a verdict."""
    resume_boundary: int | None = None
    """Boundary of the checkpoint to go on from; None for the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the training process last said of itself; written by the process alone (``status.json``)."""

    attempt: int
    state: RunState
    update_time: datetime
    process: ProcessMark | None = None
    """The process itself, so that a service that was killed while starting it finds it again."""
    progress: Progress | None = None
    result: Result | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A run as a client sees it: what the service and the process know, put together."""

    record: RunRecord
    state: RunState
    error: str
    progress: Progress | None
    result: Result | None
    update_time: datetime


def view(record: RunRecord, status: Status | None) -> View:
    """Put together what the service and the process know.

    A status of an earlier attempt tells the last progress, but not the state: the run was resumed since.
    """
    present = status is not None and status.attempt == record.attempt
    state, error = RunState.PREPARING, ""
    if status is not None and present:
        state, error = status.state, status.error
    # A process that came to its end in good order has the last word, even when a stop arrived a moment later.
    if record.verdict is not None and state is not RunState.SUCCEEDED:
        state, error = record.verdict, record.error
    return View(
        record=record,
        state=state,
        error=error,
        progress=status.progress if status else None,
        result=status.result if status and state is RunState.SUCCEEDED else None,
        update_time=max(record.update_time, status.update_time) if status and present else record.update_time,
    )


def to_json(value: object) -> Any:
    """A dataclass of this module as plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return value.value if isinstance(value, StrEnum | Stage) else value


def _seed(data: dict[str, Any]) -> SeedProgress:
    return SeedProgress(**{**data, "stage": Stage(data["stage"])})


def _progress(data: dict[str, Any]) -> Progress:
    return Progress(**{**data, "seeds": tuple(_seed(seed) for seed in data["seeds"])})


def _result(data: dict[str, Any]) -> Result:
    return Result(**{**data, "kernel_ids": tuple(data["kernel_ids"])})


def _spec(data: dict[str, Any]) -> RunSpec:
    return RunSpec(**{**data, "arm": Arm(data["arm"])})


def _record(data: dict[str, Any]) -> RunRecord:
    return RunRecord(
        **{
            **data,
            "spec": _spec(data["spec"]),
            "create_time": datetime.fromisoformat(data["create_time"]),
            "update_time": datetime.fromisoformat(data["update_time"]),
            "process": ProcessMark(**data["process"]) if data["process"] else None,
            "verdict": RunState(data["verdict"]) if data["verdict"] else None,
        }
    )


def _status(data: dict[str, Any]) -> Status:
    return Status(
        **{
            **data,
            "state": RunState(data["state"]),
            "update_time": datetime.fromisoformat(data["update_time"]),
            "process": ProcessMark(**data["process"]) if data["process"] else None,
            "progress": _progress(data["progress"]) if data["progress"] else None,
            "result": _result(data["result"]) if data["result"] else None,
        }
    )


_READERS: dict[type, Any] = {RunRecord: _record, Status: _status, Result: _result, RunSpec: _spec}


def from_json(kind: type[_T], data: Any, *, name: str = "run") -> _T:
    """Read what `to_json` wrote.

    Raises:
        Corrupt: RUN_FILE_CORRUPT, the data has another form.
    """
    try:
        value: _T = _READERS[kind](data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        text = re.sub(r"\s+", " ", str(error))[:200]
        raise Corrupt(
            f"{name}: expected a {kind.__name__} as Esper writes it, found something else ({text})",
            reason="RUN_FILE_CORRUPT",
        ) from error
    return value
