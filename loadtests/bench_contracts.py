"""Sizes of typical messages, and the time to write and read them.

    python -m loadtests.bench_contracts

Prints JSON lines (`_report.py`). The messages are those of a real run: a boundary of `digits`, the commands that the
heuristic policy gives in a hundred boundaries, telemetry of a thousand seeds with every column measured. pydantic's
JSON of the same boundary is measured in the same run, as the usual alternative.
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace

from google.protobuf.message import Message
from pydantic import BaseModel

import esper_dataclasses.esper.v1 as dataclass_client
from esper.kasmina.blueprints.catalogue import catalogue
from esper.kasmina.convert import boundary_state_from_proto, decision_to_proto
from esper.tamiyo.controller import Conversation
from esper.tamiyo.domain import Shelf
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.rules import Rules
from esper.v1 import decision_pb2, health_pb2, run_pb2, seed_pb2
from loadtests import bench_tamiyo
from loadtests._report import Report, Target

SEEDS = 1000
LOOPS = 2000
SITES = 200
RUN = "digits-20261123-201500-k3f9"


def training_state() -> run_pb2.TrainingState:
    """The summary of one run at a boundary, every scalar measured, without seed and site columns."""
    state = run_pb2.TrainingState(
        run_id=RUN,
        boundary=12,
        step=204,
        epoch=12.0,
        train_loss=0.2314567,
        validation_loss=0.2987654,
        validation_accuracy=0.9412345,
        learning_rate=0.003,
        gradient_norm=1.2345678,
        parameters_added=1234,
        flops_per_sample=123456.0,
    )
    state.elapsed.FromMilliseconds(12_345)
    return state


def decisions() -> list[decision_pb2.Decision]:
    """All that the heuristic policy commands in a run of a hundred boundaries, kernels named as the catalogue names."""
    names = [blueprint.name for blueprint in catalogue()]
    shelf = Shelf(
        replace(kernel, blueprint_name=names[number % len(names)])
        for number, kernel in enumerate(bench_tamiyo.library())
    )
    talk = Conversation(bench_tamiyo.hello(SITES), HeuristicPolicy(), Rules())
    answers = [talk.advise(boundary_state_from_proto(state), shelf) for state in bench_tamiyo.states(SITES)]
    return [decision_to_proto(decision) for advice in answers for decision in advice.decisions]


def health_batch() -> health_pb2.HealthBatch:
    """Telemetry of a thousand seeds at one step, nothing missing."""
    rng = random.Random(0)  # values of a benchmark
    column = [[rng.random() for _ in range(SEEDS)] for _ in range(5)]
    return health_pb2.HealthBatch(
        run_id=RUN,
        step=100_000,
        seed=range(SEEDS),
        stage=[seed_pb2.SEED_STAGE_FINE_TUNING] * SEEDS,
        alpha=column[0],
        gradient_norm=column[1],
        weight_norm=column[2],
        output_ratio=column[3],
        bottleneck=column[4],
    )


class _JsonState(BaseModel):
    run_id: str
    boundary: int
    step: int
    epoch: float
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    gradient_norm: float
    parameters_added: int
    flops_per_sample: float
    elapsed: float


def _round_trip(message: Message, loops: int) -> Callable[[], float]:
    parse = type(message).FromString

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(loops):
            parse(message.SerializeToString())
        return (time.perf_counter() - begin) / loops

    return run


def _dataclass_round_trip(message: Message, loops: int) -> Callable[[], float]:
    mirror = getattr(dataclass_client, type(message).__name__)
    value = mirror.parse(message.SerializeToString())

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(loops):
            mirror.parse(bytes(value))
        return (time.perf_counter() - begin) / loops

    return run


def _json_round_trip(state: run_pb2.TrainingState, loops: int) -> Callable[[], float]:
    names = [name for name in _JsonState.model_fields if name != "elapsed"]
    model = _JsonState(elapsed=12.345, **{name: getattr(state, name) for name in names})

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(loops):
            _JsonState.model_validate_json(model.model_dump_json())
        return (time.perf_counter() - begin) / loops

    return run


def main() -> None:
    """Measure and print."""
    report = Report("contracts", ["protobuf", "betterproto2", "pydantic"])
    state, health = training_state(), health_batch()
    commanded = decisions()
    decision = max(commanded, key=lambda found: found.ByteSize())
    report.add("size of a state summary", state.ByteSize(), unit="bytes", target=Target.below(280))
    report.add(
        "size of the largest decision of a run",
        decision.ByteSize(),
        unit="bytes",
        target=Target.below(200),
        decisions=len(commanded),
    )
    per_seed = health.ByteSize() / SEEDS
    report.add("size of a health batch per seed", per_seed, unit="bytes", target=Target.below(32), seeds=SEEDS)
    micro, milli = 1e6, 1e3
    for name, message in (("state summary", state), ("decision", decision)):
        metric = f"encode and decode a {name}"
        report.measure(metric, _round_trip(message, LOOPS), unit="us", scale=micro, target=Target.below(20), repeats=15)
    metric = "encode and decode a health batch"
    run = _round_trip(health, 100)
    report.measure(metric, run, unit="ms", scale=milli, target=Target.below(1), repeats=15, seeds=SEEDS)
    binary = report.measure("encode and decode a state, again", _round_trip(state, LOOPS), unit="us", scale=micro)
    client = report.measure(
        "the same by the dataclass client", _dataclass_round_trip(state, 200), unit="us", scale=micro
    )
    text = report.measure("the same as pydantic JSON", _json_round_trip(state, LOOPS), unit="us", scale=micro)
    report.add("pydantic JSON / protobuf", text / binary, unit="ratio")
    report.add("dataclass client / protobuf", client / binary, unit="ratio")


if __name__ == "__main__":
    main()
