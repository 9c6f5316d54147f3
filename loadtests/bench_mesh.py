"""What the chassis costs: calls with and without it, streams, a log call, loading a configuration, starting a server.

    python -m loadtests.bench_mesh

Prints JSON lines (`_report.py`). The bare server and ours run in this one process and are measured in turn, call block
by call block, so that noise of the machine hits both alike and the ratio stands when the absolute times do not.
"""

import asyncio
import io
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import BytesValue

from esper.mesh import logging as mesh_logging
from esper.mesh.channel import open_channel
from esper.mesh.logging import LoggingSettings, get_logger
from esper.mesh.server import MeshServer
from esper.mesh.service import ANYONE_KNOWN, Service, allow
from esper.mesh.settings import AuthSettings, ChannelOptions, Section, ServerSettings, load
from esper.mesh.testing import TEST_SETTINGS, issuer
from loadtests._report import Report, Target

SERVICE = "bench.v1.BenchService"
PAYLOAD = b"x" * 256
BLOCKS, CALLS = 15, 200
PARALLEL = 64
MESSAGES = 3000


class Bench(Service):
    """One unary method and one stream, doing nothing."""

    name = "bench"
    grpc_service_names = (SERVICE,)
    policy = allow(SERVICE, {"Echo": ANYONE_KNOWN, "Subscribe": ANYONE_KNOWN})

    def register(self, server: grpc.aio.Server) -> None:
        """Add both handlers."""
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, _handlers()),))


def _handlers() -> dict[str, Any]:
    async def echo(request: BytesValue, _context: Any) -> BytesValue:
        return request

    async def subscribe(request: BytesValue, _context: Any) -> AsyncIterator[BytesValue]:
        for _ in range(MESSAGES):
            yield request

    codec: dict[str, Any] = {
        "request_deserializer": BytesValue.FromString,
        "response_serializer": BytesValue.SerializeToString,
    }
    return {
        "Echo": grpc.unary_unary_rpc_method_handler(echo, **codec),
        "Subscribe": grpc.unary_stream_rpc_method_handler(subscribe, **codec),
    }


def _method(channel: grpc.aio.Channel, shape: str, name: str) -> Any:
    make = getattr(channel, shape)
    return make(
        f"/{SERVICE}/{name}",
        request_serializer=BytesValue.SerializeToString,
        response_deserializer=BytesValue.FromString,
    )


async def _timed(work: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def _calls(report: Report) -> None:
    """Latency and throughput of unary calls and of a stream, bare and through the chassis."""
    bare = grpc.aio.server()
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, _handlers()),))
    bare_port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    request = BytesValue(value=PAYLOAD)
    async with MeshServer(TEST_SETTINGS, [Bench()], issuer=issuer) as server:
        plain = grpc.aio.insecure_channel(f"127.0.0.1:{bare_port}")
        ours = open_channel(server.target, retry_methods=())
        echoes = [_method(channel, "unary_unary", "Echo") for channel in (plain, ours)]
        streams = [_method(channel, "unary_stream", "Subscribe") for channel in (plain, ours)]

        async def one_by_one(echo: Any) -> None:
            for _ in range(CALLS):
                await echo(request, timeout=10)

        async def at_once(echo: Any) -> None:
            async def worker() -> None:
                for _ in range(CALLS // 20):
                    await echo(request, timeout=10)

            await asyncio.gather(*(worker() for _ in range(PARALLEL)))

        async def stream(subscribe: Any) -> None:
            async for _ in subscribe(request):
                pass

        singles = await _pairs(one_by_one, echoes)
        crowds = await _pairs(at_once, echoes)
        flows = await _pairs(stream, streams)
        await plain.close()
        await ours.close()
    await bare.stop(0)

    sizes: dict[str, Any] = {"payload_bytes": len(PAYLOAD), "client": "same process"}
    per_call = [seconds / CALLS * 1e6 for _, seconds in singles]
    name = "unary call through the chassis"
    latency = statistics.median(per_call)
    report.add(name, latency, unit="us", target=Target.below(2000), runs=per_call, calls=CALLS, **sizes)
    _ratio(report, "unary call, chassis over bare grpc.aio", singles, 1.6, calls=CALLS, **sizes)
    added = [(ours_s - bare_s) / CALLS * 1e6 for bare_s, ours_s in singles]
    report.add(
        "unary call, added by the chassis", statistics.median(added), unit="us", runs=added, calls=CALLS, **sizes
    )
    total = PARALLEL * (CALLS // 20)
    rates = [total / seconds for _, seconds in crowds]
    report.add(
        "unary throughput, 64 callers", statistics.median(rates), unit="1/s", target=Target.above(1000), runs=rates,
        calls=total, **sizes,
    )  # fmt: skip
    _ratio(report, "unary throughput, 64 callers, time over bare grpc.aio", crowds, 1.6, calls=total, **sizes)
    rates = [MESSAGES / seconds for _, seconds in flows]
    report.add(
        "stream of single messages", statistics.median(rates), unit="1/s", target=Target.above(5000), runs=rates,
        messages=MESSAGES, **sizes,
    )  # fmt: skip
    _ratio(report, "stream of single messages, time over bare grpc.aio", flows, 1.3, messages=MESSAGES, **sizes)


async def _pairs(work: Callable[[Any], Awaitable[None]], targets: list[Any]) -> list[tuple[float, float]]:
    """Times of (bare, ours), taken in turn; which goes first alternates."""
    pairs: list[tuple[float, float]] = []
    for block in range(BLOCKS + 1):
        order = (0, 1) if block % 2 else (1, 0)
        taken = {index: await _timed(lambda index=index: work(targets[index])) for index in order}  # type: ignore[misc]  # the default binds the loop's value
        if block:
            pairs.append((taken[0], taken[1]))
    return pairs


def _ratio(report: Report, metric: str, pairs: list[tuple[float, float]], limit: float, **sizes: Any) -> None:
    ratios = [ours / bare for bare, ours in pairs]
    report.add(metric, statistics.median(ratios), unit="ratio", target=Target.below(limit), runs=ratios, **sizes)


def _log_call() -> float:
    """Seconds per record on the caller's thread while the writer works."""
    log = get_logger("bench")
    began = time.perf_counter()
    for number in range(2000):
        log.info("kernel published", kernel="sha256:" + "0" * 64, number=number, site="encoder.0", loss=0.25)
    spent = time.perf_counter() - began
    mesh_logging.flush()
    return spent / 2000


class _Wide(Section):
    """A section wider than any of ours."""

    limits: dict[str, int] = {}  # noqa: RUF012  # pydantic copies defaults
    """Many values."""

    server: ServerSettings = ServerSettings()
    """A nested section."""

    channel: ChannelOptions = ChannelOptions()
    """Another."""


class _Root(Section):
    """Five wide sections: several times what a mesh needs."""

    auth: AuthSettings = AuthSettings()
    """Identity."""

    logging: LoggingSettings = LoggingSettings()
    """Logs."""

    a: _Wide = _Wide()
    """Section."""

    b: _Wide = _Wide()
    """Section."""

    c: _Wide = _Wide()
    """Section."""

    d: _Wide = _Wide()
    """Section."""

    e: _Wide = _Wide()
    """Section."""


def _config(directory: Path) -> tuple[Path, dict[str, str]]:
    sections = "abcde"
    text = "schema_version = 1\n" + "".join(
        f"[{name}.limits]\n" + "".join(f"k{n} = {n}\n" for n in range(100)) + f"[{name}.server]\nport = 1\n"
        for name in sections
    )
    file = directory / "esper.toml"
    file.write_text(text)
    environ = {f"ESPER_{name.upper()}__LIMITS__E{n}": str(n) for name in sections for n in range(50)}
    return file, environ | {f"UNRELATED_{n}": "x" * 40 for n in range(200)}


def _start() -> float:
    """Seconds from nothing to a listening server and back, in a running loop."""

    async def run() -> float:
        began = time.perf_counter()
        server = MeshServer(TEST_SETTINGS, [Bench()], issuer=issuer)
        await server.start()
        ready = time.perf_counter() - began
        await server.stop()
        return ready

    return asyncio.run(run())


def main() -> None:
    """Run every measurement and print its line."""
    report = Report("mesh", ["grpcio", "protobuf", "protovalidate", "structlog", "pydantic-settings"])
    sink = io.StringIO()
    mesh_logging.configure(LoggingSettings(format="json", queue_size=100_000), stream=lambda: sink)
    report.measure(
        "log call on the caller's thread", _log_call, unit="us", target=Target.below(20), scale=1e6, records=2000
    )
    mesh_logging.configure(LoggingSettings(level="warning"), stream=lambda: sink)
    asyncio.run(_calls(report))
    report.measure(
        "server start, port 0 to SERVING", _start, unit="ms", target=Target.below(100), scale=1e3, repeats=15
    )
    mesh_logging.shutdown()
    with TemporaryDirectory() as directory:
        file, environ = _config(Path(directory))

        def load_config() -> float:
            began = time.perf_counter()
            load(_Root, file=file, environ=environ)
            return time.perf_counter() - began

        report.measure(
            "configuration load", load_config, unit="ms", target=Target.below(50), scale=1e3, repeats=15,
            keys_in_file=505, keys_in_environment=250,
        )  # fmt: skip


if __name__ == "__main__":
    main()
