"""What a decision costs: the controller alone, and over a real gRPC stream, at 200 sites and at the contract's 4,096.

    python -m loadtests.bench_tamiyo

Prints JSON lines (`_report.py`). Each figure is the median over repeated runs of the 95th percentile within a run of
`BOUNDARIES` boundaries. Every boundary is a full one: sites newly measured, three living seeds with counterfactuals, a
closed site, and a library of 240 validated kernels, 12 for each of the 20 signatures of the host.
"""

import asyncio
import math
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc.aio

from esper.kasmina.control import (
    BoundaryState,
    Counterfactual,
    RunHello,
    SeedState,
    SiteDescriptor,
    SiteHealth,
    SiteKind,
    Stage,
)
from esper.kasmina.convert import (
    advice_to_proto,
    boundary_state_from_proto,
    boundary_state_to_proto,
    run_hello_to_proto,
)
from esper.kasmina.signature import Layout, Signature
from esper.mesh.channel import open_channel
from esper.mesh.server import MeshServer
from esper.mesh.service import ServiceContext
from esper.mesh.testing import TEST_SETTINGS, issuer
from esper.tamiyo.catalogue import Catalogue, KernelState
from esper.tamiyo.controller import Conversation
from esper.tamiyo.domain import KernelFacts
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.rules import Rules
from esper.tamiyo.service import Config, Tamiyo
from esper.v1 import run_pb2
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from loadtests._report import Report, Target, median_of

BOUNDARIES, REPEATS = 100, 5
SIGNATURES, BLUEPRINTS = 20, 12
MEASURED = 32
TAGS = (("conv",), ("mlp",), ("adapter", "mlp"), ("attention",))


def signature(number: int) -> Signature:
    """One of the host's shapes."""
    width = 8 * (1 + number % SIGNATURES)
    return Signature(Layout.IMAGE, width, width)


def library() -> list[KernelFacts]:
    """240 validated kernels."""
    return [
        KernelFacts(
            kernel_id=f"sha256:{number * BLUEPRINTS + kind:064x}",
            blueprint_id=f"sha256:{kind:064x}",
            blueprint_name=f"blueprint{kind}",
            signature=signature(number),
            portable=True,
            target="",
            zero_birth=True,
            causal=False,
            parameters=200 * (1 + kind),
            flops_per_position=400,
            latency_us=20.0 + kind,
            tags=TAGS[kind % len(TAGS)],
        )
        for number in range(SIGNATURES)
        for kind in range(BLUEPRINTS)
    ]


def hello(sites: int) -> RunHello:
    """A host with this many sites, a third of them spans."""
    return RunHello(
        run_id="bench",
        target="cpu",
        total_steps=100 * BOUNDARIES * 2,
        decay_start=0.9,
        host_parameters=1_000_000,
        parameter_budget=1_000_000,
        max_active_seeds=8,
        sites=tuple(
            SiteDescriptor(
                index=i,
                name=f"net.block{i // 3}.conv{i % 3}" if i % 3 else f"net.block{i // 3}.conv1..net.block{i // 3}.conv2",
                kind=SiteKind.SERIES if i % 2 else SiteKind.PARALLEL,
                granularity="layer" if i % 3 else "span",
                module_type="Conv2d",
                signature=signature(i // 3),
                narrowest_width=8 * (1 + (i // 3) % SIGNATURES),
                parameters=10_000,
                depth=i / sites,
            )
            for i in range(sites)
        ),
    )


def states(sites: int) -> list[run_pb2.TrainingState]:
    """The boundaries of one run, encoded as they arrive."""
    gain = Counterfactual(mean_gain=0.02, lower_bound=0.01, confidence=0.95, batches=16)
    kernel = f"sha256:{3:064x}"
    found = []
    for boundary in range(1, BOUNDARIES + 1):
        stages = (Stage.GRAFTING, Stage.FINE_TUNING, Stage.FINE_TUNING, Stage.EMBARGOED)
        found.append(
            BoundaryState(
                run_id="bench",
                boundary=boundary,
                step=100 * boundary,
                epoch=float(boundary),
                train_loss=1 / boundary,
                validation_loss=1 / boundary,
                validation_accuracy=0.9,
                learning_rate=0.01,
                gradient_norm=1.0,
                parameters_added=1000,
                flops_per_sample=1e8,
                seconds=float(boundary),
                seeds=tuple(
                    SeedState(
                        index=i * 5,
                        stage=stage,
                        boundaries_in_stage=boundary % 4,
                        steps_in_stage=100,
                        ready=stage is not Stage.EMBARGOED,
                        kernel_id=kernel,
                        parameters=200,
                        counterfactual=gain,
                    )
                    for i, stage in enumerate(stages)
                ),
                sites=tuple(
                    SiteHealth(
                        index=(boundary * MEASURED + i) % sites, effective_rank=5.0 + i / 10, saturation=0.4 + i / 100
                    )
                    for i in range(min(MEASURED, sites))
                ),
            )
        )
    return [boundary_state_to_proto(state) for state in found]


def p95(values: list[float]) -> float:
    """95th percentile."""
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def alone(sites: int) -> float:
    """Seconds of a decision without the network, conversions included: 95th percentile of a run."""
    catalogue = Catalogue(10_000)
    for kernel in library():
        catalogue.put_kernel(kernel, KernelState.VALIDATED)
    run = hello(sites)
    shelf = catalogue.shelf(site.signature for site in run.sites)
    talk = Conversation(run, HeuristicPolicy(), Rules())
    taken = []
    for message in states(sites):
        began = time.perf_counter()
        advice_to_proto(talk.advise(boundary_state_from_proto(message), shelf))
        taken.append(time.perf_counter() - began)
    return p95(taken)


async def over_the_wire(sites: int) -> float:
    """Seconds from sending a state to holding its advice, through a real server with every hook. 95th percentile."""
    drain = asyncio.Event()
    opened: dict[str, grpc.aio.Channel] = {}
    with TemporaryDirectory() as folder:

        def channel(_name: str) -> grpc.aio.Channel:
            # The library and the bus are not served here: their clients fail in the background, as they may.
            return opened.setdefault("self", open_channel(server.target))

        context = ServiceContext(
            name="tamiyo", data_dir=Path(folder), channel=channel, drain=drain, clock=lambda: datetime.now(UTC)
        )
        service = Tamiyo(Config(), context)
        for kernel in library():
            service.view.catalogue.put_kernel(kernel, KernelState.VALIDATED)
        server = MeshServer(TEST_SETTINGS, [service], issuer=issuer, drain=drain)
        await server.start()
        messages = [pb.AdviseRequest(state=state) for state in states(sites)]
        taken = []
        try:
            async with open_channel(server.target) as client:
                call: Any = TamiyoServiceStub(client).Advise()
                await call.write(pb.AdviseRequest(hello=run_hello_to_proto(hello(sites))))
                await call.read()
                for message in messages:
                    began = time.perf_counter()
                    await call.write(message)
                    answer = await call.read()
                    taken.append(time.perf_counter() - began)
                    assert answer.advice.boundary == message.state.boundary
                await call.done_writing()
        finally:
            for one in opened.values():
                await one.close()
            await server.stop()
    return p95(taken)


def main() -> None:
    """Measure and print."""
    report = Report("tamiyo", ("grpcio", "protobuf"))
    sizes = {"boundaries": BOUNDARIES, "kernels": SIGNATURES * BLUEPRINTS, "measured_sites": MEASURED}
    for sites, target, repeats in ((200, Target.below(10), REPEATS), (4096, None, 2)):
        value, runs = median_of(partial(alone, sites), repeats)
        _add(report, f"decision p95, controller alone, {sites} sites", value, runs, target, sites=sites, **sizes)
        value, runs = median_of(partial(_run, sites), repeats)
        _add(report, f"decision p95, over gRPC, {sites} sites", value, runs, target, sites=sites, **sizes)


def _run(sites: int) -> float:
    return asyncio.run(over_the_wire(sites))


def _add(report: Report, metric: str, value: float, runs: list[float], target: Target | None, **sizes: int) -> None:
    report.add(metric, value * 1e3, unit="ms", target=target, runs=[run * 1e3 for run in runs], **sizes)


if __name__ == "__main__":
    main()
