"""A log without room: what was acknowledged stays, and the log goes on once there is room.

Three things stop it here: a tmpfs of 4 MiB where one may be mounted, a limit on the size of the process's files
(RLIMIT_FSIZE), and SQLite's own page limit (`max_log_bytes`).
"""

import os
import sqlite3
import subprocess
import sys

import pytest

from tests.services.oona.conftest import make_event, receive, running


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def bulky(number, *, low=False):
    """Five events of 20 kB that do not compress."""
    return [make_event(number * 100 + n, payload=os.urandom(20_000), low=low, key="k") for n in range(5)]


async def fill(bus, topic="decisions"):
    """Publish until the log refuses; return what was acknowledged and the refusal."""
    acknowledged = []
    for number in range(1000):
        events = bulky(number)
        answer = await bus.publish(topic, events)
        if answer.HasField("error"):
            return acknowledged, answer.error, events
        assert len(answer.positions) == len(events)
        acknowledged += [event.id for event in events]
    pytest.fail("the log never filled up")


async def check_full(bus, error):
    """The refusal is what the contract says, and telemetry is shed instead of pushed back."""
    assert (8, "LOG_FULL") == (error.code, error.reason)
    assert "has no room" in error.message
    assert 0.25 == error.retry_delay.ToNanoseconds() / 1e9
    shed = (await bus.publish("telemetry", bulky(5000, low=True))).error
    assert (8, "SHED", False) == (shed.code, shed.reason, shed.HasField("retry_delay"))
    assert 5 == bus.service.broker.counters.shed["telemetry"]
    assert bus.service.broker.counters.refused["decisions", "LOG_FULL"] >= 5


async def check_intact(bus, acknowledged):
    """Everything acknowledged is there, once, in order."""
    call = await bus.open("decisions", credit=10_000)
    found = await receive(call, len(acknowledged), ack=False)
    assert acknowledged == [d.event.id for d in found]
    call.cancel()


async def test_full_by_limit_of_the_file(tmp_path):
    """`max_log_bytes` (SQLite's page limit) refuses with LOG_FULL; with a larger limit the log goes on where it was."""
    async with running(tmp_path, max_log_bytes=2 << 20, full_retry_s=0.25) as bus:
        acknowledged, error, refused = await fill(bus)
        await check_full(bus, error)
        await check_intact(bus, acknowledged)
    assert "ok" == sqlite3.connect(tmp_path / "oona.sqlite").execute("PRAGMA integrity_check").fetchone()[0]
    async with running(tmp_path, max_log_bytes=8 << 20) as bus:
        assert 0 == (await bus.publish("decisions", refused)).duplicates
        await check_intact(bus, acknowledged + [event.id for event in refused])


async def test_full_disk(small_disk):
    """A file system without a free block (tmpfs of 4 MiB) refuses with LOG_FULL; freeing space ends it, no restart."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    async with running(small_disk / "data", min_free_bytes=0, full_retry_s=0.25) as bus:
        acknowledged, error, refused = await fill(bus)
        await check_full(bus, error)
        await check_intact(bus, acknowledged)
        ballast.unlink()
        assert 5 == len((await bus.publish("decisions", refused)).positions)
        await check_intact(bus, acknowledged + [event.id for event in refused])


async def test_reserve_is_left_to_others(small_disk):
    """Appends stop while `min_free_bytes` are still free, so that positions and retention find room."""
    async with running(small_disk / "data", min_free_bytes=2 << 20, full_retry_s=0.25) as bus:
        acknowledged, error, _ = await fill(bus)
        await check_full(bus, error)
        free = os.statvfs(small_disk)
        assert free.f_bavail * free.f_frsize > 1 << 20
        call = await bus.open("decisions", group="g", credit=10_000)
        await receive(call, len(acknowledged))
        await bus.service.broker.save_positions()


SERVER = """
import asyncio, resource, sys
from pathlib import Path
from esper.mesh.testing import serve, service_context
from esper.oona.service import Config, build
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
async def main():
    context = service_context("oona", Path(sys.argv[1]))
    service = await build(Config(full_retry_s=0.25), context)
    async with serve(service, drain=context.drain) as (server, channel):
        from esper.v1 import oona_service_pb2 as pb, event_pb2
        from esper.v1.oona_service_pb2_grpc import OonaServiceStub
        import os
        stored = 0
        call = OonaServiceStub(channel).Publish()
        while True:
            events = [event_pb2.Event(id=f"{stored + n}", payload=os.urandom(20000)) for n in range(5)]
            await call.write(pb.PublishRequest(topic="decisions", events=events))
            answer = await call.read()
            if answer.HasField("error"):
                print(stored, answer.error.code, answer.error.reason, flush=True)
                break
            stored += 5
asyncio.run(main())
"""


async def test_file_size_limit_of_the_process(tmp_path):
    """Where the system forbids the file to grow (RLIMIT_FSIZE), the refusal is LOG_FULL too; nothing stored is lost."""
    ran = subprocess.run(  # noqa: ASYNC221  # nothing else runs here
        [sys.executable, "-c", SERVER, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    stored, code, reason = ran.stdout.split()
    assert ("8", "LOG_FULL") == (code, reason), ran.stderr
    async with running(tmp_path) as bus:
        statuses = (await bus.topic("decisions")).partition_statuses
        assert int(stored) == sum(s.next_offset for s in statuses) > 50
