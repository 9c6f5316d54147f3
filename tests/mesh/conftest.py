"""Fixtures of the mesh's tests: restored global state, one service with a method of every shape and style."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from esper.mesh import context as ambient
from esper.mesh import logging as mesh_logging
from esper.mesh.errors import NotFound
from esper.mesh.service import ANYONE_KNOWN, Service, allow
from esper.mesh.streams import race_drain, until_drain

SERVICE = "test.v1.EchoService"
LISTED = [
    "Unary",
    "Generate",
    "Write",
    "Collect",
    "ReadAll",
    "Subscribe",
    "WatchWrite",
    "Hang",
    "Boom",
    "BoomAfter",
    "Orphan",
    "OrphanAfter",
    "Sync",
]


class EchoStub:
    """What generated code would be: one callable per method."""

    def __init__(self, channel: grpc.aio.Channel | grpc.Channel) -> None:
        codec = {"request_serializer": StringValue.SerializeToString, "response_deserializer": StringValue.FromString}
        shapes = {
            "unary_unary": "Unary Unlisted Unknown Hang Boom Orphan Sync",
            "unary_stream": "Generate Write BoomAfter OrphanAfter",
            "stream_unary": "Collect ReadAll",
            "stream_stream": "Subscribe WatchWrite",
        }
        for shape, names in shapes.items():
            for name in names.split():
                setattr(self, name, getattr(channel, shape)(f"/{SERVICE}/{name}", **codec))


@pytest.fixture
def stub_of() -> type[EchoStub]:
    """Makes stubs of the echo service: `stub_of(channel).Unary(...)`."""
    return EchoStub


@pytest.fixture(autouse=True)
def _unconfigured_logging() -> Iterator[None]:
    """Logging is global: every test leaves it as it found it."""
    yield
    mesh_logging.shutdown()


class EchoService(Service):
    """Every shape in every style, over a well-known message type."""

    name = "echo"
    grpc_service_names = (SERVICE,)
    policy = allow(SERVICE, dict.fromkeys(LISTED, ANYONE_KNOWN))

    def __init__(self) -> None:
        self.events: list[str] = []
        self.drain_event = None
        self.gate = None
        self.seen: list[object] = []

    def register(self, server: grpc.aio.Server) -> None:
        """Add handlers without generated code."""
        codec = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}
        uu, us = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        su, ss = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        handlers = {
            "Unary": uu(self.unary, **codec),
            "Unlisted": uu(self.unary, **codec),
            "Generate": us(self.generate, **codec),
            "Write": us(self.write, **codec),
            "Collect": su(self.collect, **codec),
            "ReadAll": su(self.read_all, **codec),
            "Subscribe": ss(self.subscribe, **codec),
            "WatchWrite": ss(self.watch_write, **codec),
            "Hang": uu(self.hang, **codec),
            "Boom": uu(self.boom, **codec),
            "BoomAfter": us(self.boom_after, **codec),
            "Orphan": uu(self.orphan, **codec),
            "OrphanAfter": us(self.orphan_after, **codec),
            "Sync": uu(lambda request, context: request, **codec),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def start(self) -> None:
        self.events.append("start")

    async def drain(self) -> None:
        self.events.append("drain")

    async def close(self) -> None:
        self.events.append("close")

    async def unary(self, request: StringValue, context: grpc.aio.ServicerContext) -> StringValue:
        self.seen.append(
            (ambient.current_identity(), ambient.request_id(), ambient.time_remaining(), ambient.current_method())
        )
        if request.value == "missing":
            raise NotFound("no such echo", reason="ECHO_NOT_FOUND", metadata={"name": request.value})
        if request.value == "abort":
            await context.abort(grpc.StatusCode.DATA_LOSS, "by hand")
        if request.value == "code":
            context.set_code(grpc.StatusCode.ABORTED)
        return StringValue(value=request.value + "!")

    async def generate(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        try:
            for letter in request.value:
                yield StringValue(value=letter)
                if letter == "~":
                    await self.gate.wait()
        finally:
            self.events.append("generator closed")

    async def write(self, request: StringValue, context: grpc.aio.ServicerContext) -> None:
        for letter in request.value:
            await context.write(StringValue(value=letter))

    async def collect(self, requests: AsyncIterator[StringValue], context: object) -> StringValue:
        return StringValue(value="".join([item.value async for item in requests]))

    async def read_all(self, _requests: object, context: grpc.aio.ServicerContext) -> StringValue:
        parts = []
        while (item := await context.read()) is not grpc.aio.EOF:
            parts.append(item.value)
        return StringValue(value="".join(parts))

    async def subscribe(self, requests: AsyncIterator[StringValue], context: object) -> AsyncIterator[StringValue]:
        async for item in race_drain(requests, self.drain_event):
            yield StringValue(value=item.value.upper())
        self.events.append("stream ended")

    async def watch_write(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        while True:
            item = await until_drain(context.read(), self.drain_event, grpc.aio.EOF)
            if item is grpc.aio.EOF:
                return
            await context.write(StringValue(value=item.value.lower()))

    async def hang(self, request: StringValue, context: object) -> StringValue:
        self.events.append("hanging")
        try:
            await self.gate.wait()
        finally:
            self.events.append("let go")
        return request

    async def boom(self, request: StringValue, context: object) -> StringValue:
        raise RuntimeError("database password=hunter2 is wrong")

    async def boom_after(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        raise RuntimeError("database password=hunter2 is wrong")

    async def orphan(self, request: StringValue, context: object) -> StringValue:
        await _cancelled_elsewhere()
        return request

    async def orphan_after(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        await _cancelled_elsewhere()


async def _cancelled_elsewhere() -> None:
    """Wait for work that somebody else cancels, as when a channel closes under a call."""
    work = asyncio.create_task(asyncio.sleep(60))
    asyncio.get_running_loop().call_soon(work.cancel)
    await work


@pytest.fixture
async def echo() -> EchoService:
    """An echo service whose gate is shut; serve it with `drain=echo.drain_event`."""
    service = EchoService()
    service.gate = asyncio.Event()
    service.drain_event = asyncio.Event()
    return service
