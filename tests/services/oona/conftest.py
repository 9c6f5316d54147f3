"""A real bus on a port of the system's choice, and events to put on it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from esper.mesh.server import MeshServer
from esper.mesh.testing import serve, service_context
from esper.oona.service import Config, OonaService, build
from esper.v1 import event_pb2, oona_service_pb2
from esper.v1.oona_service_pb2_grpc import OonaServiceStub


@dataclass
class Bus:
    """A running bus and its client."""

    service: OonaService
    server: MeshServer
    channel: grpc.aio.Channel
    stub: Any
    drain: asyncio.Event

    async def publish(self, topic: str, events: Sequence[event_pb2.Event]) -> oona_service_pb2.PublishResponse:
        """One batch on a stream of its own; its answer."""
        call = self.stub.Publish()
        await call.write(oona_service_pb2.PublishRequest(topic=topic, events=events, batch=7))
        await call.done_writing()
        answer = await call.read()
        assert await call.read() is grpc.aio.EOF
        assert answer.batch == 7
        return answer

    async def topic(self, name: str) -> event_pb2.Topic:
        """The topic as GetTopic shows it."""
        answer = await self.stub.GetTopic(oona_service_pb2.GetTopicRequest(name=name))
        return answer.topic

    async def make(self, name: str, **settings: Any) -> event_pb2.Topic:
        """A topic of a test's own."""
        request = oona_service_pb2.CreateTopicRequest(topic=event_pb2.Topic(name=name, **settings))
        return (await self.stub.CreateTopic(request)).topic

    async def open(self, topic: str, **settings: Any) -> Any:
        """An open Subscribe stream, past `opened`; its partitions are left in `.partitions`."""
        call = self.stub.Subscribe()
        opening = oona_service_pb2.SubscribeOpen(topic=topic, **settings)
        await call.write(oona_service_pb2.SubscribeRequest(open=opening))
        first = await call.read()
        assert first.WhichOneof("kind") == "opened"
        call.partitions = list(first.opened.partitions)
        return call


@asynccontextmanager
async def running(data_dir: Path, **config: Any) -> AsyncIterator[Bus]:
    """Start a bus over a directory; stop it at the end."""
    context = service_context("oona", data_dir)
    service = await build(Config(**config), context)
    assert isinstance(service, OonaService)
    async with serve(service, drain=context.drain) as (server, channel):
        yield Bus(service, server, channel, OonaServiceStub(channel), context.drain)


def make_event(number: int, *, key: str = "", low: bool = False, payload: bytes | None = None) -> event_pb2.Event:
    """An event whose id and payload say its number."""
    return event_pb2.Event(
        id=f"event-{number}",
        key=key,
        type="application/octet-stream",
        payload=str(number).encode() if payload is None else payload,
        priority=event_pb2.PRIORITY_LOW if low else event_pb2.PRIORITY_NORMAL,
    )


async def receive(call: Any, count: int, *, ack: bool = True) -> list[oona_service_pb2.Delivery]:
    """Read deliveries until there are `count`; acknowledge them if asked to."""
    found: list[oona_service_pb2.Delivery] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            message = await call.read()
            assert message is not grpc.aio.EOF, f"stream ended after {len(found)} of {count}"
            found.extend(message.deliveries.deliveries)
    if ack:
        acks = oona_service_pb2.SubscribeAck(delivery_ids=[d.delivery_id for d in found])
        await call.write(oona_service_pb2.SubscribeRequest(ack=acks))
    return found


async def eventually(condition: Any, *, within_s: float = 10.0) -> None:
    """Wait until an async condition holds."""
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110  # the condition is behind an RPC, there is no event to wait for
            await asyncio.sleep(0.01)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[Bus]:
    """A bus with quick redelivery."""
    async with running(tmp_path, backoff_s=0.02, backoff_max_s=0.1, position_interval_s=0.05) as started:
        yield started
