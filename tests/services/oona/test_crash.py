"""kill -9 in the middle of publishing: every event that was acknowledged is there, once, in order."""

import asyncio
import os
import signal
import sys

import grpc
import pytest

from esper.mesh.channel import open_channel
from esper.v1 import event_pb2, oona_service_pb2
from esper.v1.oona_service_pb2_grpc import OonaServiceStub
from tests.services.oona.conftest import receive, running

SERVER = """
import asyncio, sys
from pathlib import Path
from esper.mesh.testing import serve, service_context
from esper.oona.service import Config, build
async def main():
    context = service_context("oona", Path(sys.argv[1]))
    async with serve(await build(Config(partitions=2), context), drain=context.drain) as (server, channel):
        print(server.target, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
BATCH = 20


async def start(path):
    """A bus in a process of its own; its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().strip()


async def publish_until_killed(target, process, topic, begin, kill_after):
    """Publish without waiting for answers; kill the server after some; return the ids acknowledged."""
    acknowledged = []
    channel = open_channel(target)
    call = OonaServiceStub(channel).Publish()

    async def write():
        for number in range(begin, begin + 100_000):
            events = [
                event_pb2.Event(id=f"{number}-{n}", key=f"k{n % 3}", payload=b"%d" % (number * BATCH + n))
                for n in range(BATCH)
            ]
            await call.write(oona_service_pb2.PublishRequest(topic=topic, batch=number, events=events))

    writing = asyncio.create_task(write())
    try:
        while True:
            answer = await call.read()
            assert BATCH == len(answer.positions)
            acknowledged += [f"{answer.batch}-{n}" for n in range(BATCH)]
            if len(acknowledged) == kill_after * BATCH:
                os.kill(process.pid, signal.SIGKILL)
    except grpc.aio.AioRpcError:
        pass
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await process.wait()
    await channel.close()
    return acknowledged


@pytest.mark.parametrize("topic", ["decisions", "telemetry"])
async def test_every_acknowledged_event_survives_kill_9(tmp_path, topic):
    """Three servers in a row are killed while batches are under way.

    Afterwards no acknowledged event is missing, no event is there twice, every batch is there whole or not at all, and
    each key is in order.
    """
    acknowledged = []
    for life, kill_after in enumerate((7, 40, 90)):
        process, target = await start(tmp_path)
        acknowledged += await publish_until_killed(target, process, topic, life * 1_000_000, kill_after)
    assert len(acknowledged) >= (7 + 40 + 90) * BATCH
    async with running(tmp_path) as bus:
        statuses = (await bus.topic(topic)).partition_statuses
        call = await bus.open(topic, credit=10_000)
        count = sum(s.next_offset for s in statuses)
        found = []
        while len(found) < count:
            found += await receive(call, 1, ack=False)
            credit = oona_service_pb2.SubscribeCredit(credit=1000)
            await call.write(oona_service_pb2.SubscribeRequest(credit=credit))
        ids = [d.event.id for d in found]
        assert set(acknowledged) <= set(ids)
        assert len(ids) == len(set(ids))
        batches = {}
        for identity in ids:
            batches.setdefault(identity.split("-")[0], []).append(identity)
        assert {BATCH} == {len(b) for b in batches.values()}
        for key in ("k0", "k1", "k2"):
            numbers = [int(d.event.payload) for d in found if d.event.key == key]
            assert sorted(numbers) == numbers


async def test_group_goes_on_after_kill_9(tmp_path):
    """A group whose server was killed gets nothing again that it acknowledged well before, and misses nothing."""
    process, target = await start(tmp_path)
    channel = open_channel(target)
    stub = OonaServiceStub(channel)
    call = stub.Publish()
    events = [event_pb2.Event(id=f"{n}", key=f"k{n % 5}", payload=b"x") for n in range(300)]
    await call.write(oona_service_pb2.PublishRequest(topic="decisions", events=events))
    await call.read()
    reading = stub.Subscribe()
    opening = oona_service_pb2.SubscribeOpen(topic="decisions", group="g", credit=200)
    await reading.write(oona_service_pb2.SubscribeRequest(open=opening))
    await reading.read()
    first = await receive(reading, 200, ack=False)
    handled = [d for n, d in enumerate(first) if n % 4]
    ack = oona_service_pb2.SubscribeAck(delivery_ids=[d.delivery_id for d in handled])
    await reading.write(oona_service_pb2.SubscribeRequest(ack=ack))
    await asyncio.sleep(1.0)  # positions are saved within 0.2 s
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await channel.close()
    async with running(tmp_path) as bus:
        assert 300 - len(handled) == (await bus.topic("decisions")).groups[0].lag
        reading = await bus.open("decisions", group="g", credit=1000)
        again = await receive(reading, 300 - len(handled))
        assert {e.id for e in events} - {d.event.id for d in handled} == {d.event.id for d in again}
        left = {d.event.id for n, d in enumerate(first) if n % 4 == 0}
        assert all((d.attempt == 2) == (d.event.id in left) for d in again)
