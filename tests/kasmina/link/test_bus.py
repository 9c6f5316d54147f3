"""What a run leaves on the bus, and how a link ends."""

import asyncio
import contextlib
import json
import time
from dataclasses import replace

from esper.kasmina.kernels.rejection import KernelCorrupt
from esper.kasmina.link import Standing
from esper.mesh.bus import BusSubscriber
from esper.mesh.errors import Stale
from esper.mesh.identity import Role
from esper.v1 import (
    field_report_pb2,
    health_pb2,
    oona_service_pb2,
)
from tests.kasmina.link.scripts import (
    FAST,
    NOWHERE,
    SIGNATURE,
    on_trainer,
    some_health,
    some_report,
    timed,
    until,
)
from tests.services.tamiyo.tamiyo_mesh import Mesh, open_mesh
from tests.services.tamiyo.tamiyo_worlds import kernel_id, make_hello, make_state


async def _events(mesh: Mesh, topic, count):
    start = oona_service_pb2.START_POSITION_EARLIEST
    found = []
    async with asyncio.timeout(10), BusSubscriber(mesh.channel(Role.CLIENT), topic, start=start) as subscriber:
        async for delivery in subscriber:
            found.append(delivery.event)
            if len(found) == count:
                return found
    return found


async def test_what_a_run_leaves_on_the_bus(tmp_path, make_link):
    """Telemetry and reports as messages, events as JSON, each keyed by its run, in the order of leaving."""
    async with open_mesh(tmp_path) as mesh:
        link = make_link(mesh.target)
        link.open(make_hello())
        link.publish_health(some_health())
        link.report(some_report())
        fields = {"seed": 1, "when": Stale("x")}
        link.event("transition", fields)
        fields["seed"] = 2
        link.event("rollback", fields)
        link.event("too large", {"text": "x" * 300_000})
        await on_trainer(link.close, 5.0)
        (health,) = await _events(mesh, "telemetry", 1)
        (report,) = await _events(mesh, "field-reports", 1)
        events = await _events(mesh, "run-events", 2)
    assert 7 == health_pb2.HealthBatch.FromString(health.payload).step
    assert ("esper.v1.HealthBatch", "digits-1") == (health.type, health.key)
    assert kernel_id(1) == field_report_pb2.FieldReport.FromString(report.payload).kernel_id
    assert {"kind": "transition", "run_id": "digits-1", "fields": {"seed": 1, "when": "x"}} == json.loads(
        events[0].payload
    )
    assert ["transition", "rollback"] == [event.attributes["kind"] for event in events]
    assert {"application/json"} == {event.type for event in events}


async def test_what_is_left_while_the_bus_is_away_arrives_later(tmp_path, make_link):
    """Reports outlive a mesh that is started after the trainer."""
    async with open_mesh(tmp_path) as mesh:
        port = mesh.server.port
    link = make_link(f"127.0.0.1:{port}")
    link.open(make_hello())
    link.report(some_report())
    await until(lambda: link.standing is Standing.AWAY)
    async with open_mesh(tmp_path, port=port) as mesh:
        assert 1 == len(await _events(mesh, "field-reports", 1))
        await on_trainer(link.close, 1.0)


def test_handing_over_is_bounded_and_fast(make_link):
    """Ten thousand reports to a dead bus: microseconds each, no more kept than the bound, the rest counted."""
    link = make_link(NOWHERE, settings=replace(FAST, report_limit=100, telemetry_limit=50))
    link.open(make_hello())
    _, took = timed(lambda: [link.report(some_report()) for _ in range(2000)])
    _, health = timed(lambda: [link.publish_health(some_health()) for _ in range(2000)])
    assert took < 2.0
    assert health < 2.0
    time.sleep(0.2)
    assert link._mail.dropped > 1000
    _, closing = timed(link.close, 0.1)
    assert closing < 1.5


async def test_closing_twice_and_in_the_middle_of_a_fetch_is_clean(open_link, library):
    """Nothing hangs when the run ends while a kernel is on its way."""
    library.failures = 100
    link = open_link(kernel_attempts=100)
    link.request_kernel(library.id, SIGNATURE)
    await asyncio.sleep(0.05)
    _, took = await on_trainer(timed, link.close, 0.5)
    assert took < 1.5
    link.close(0.5)
    link.event("late", {})
    assert not link._thread.is_alive()


def test_a_defect_of_the_background_thread_ends_the_link_not_the_run(make_link, monkeypatch):
    """Even then nothing raises into training."""
    link = make_link(NOWHERE)
    monkeypatch.setattr(link._mail, "start", lambda _channel: 1 / 0)
    link.open(make_hello())
    assert link.advise(make_state(1), 0.1) is None
    link.event("lost", {})
    with contextlib.suppress(Exception):
        link.close(0.5)
    assert not link._thread.is_alive()


def test_refusals_keep_their_class():
    """What the trainer catches is the tree of the mesh."""
    assert issubclass(KernelCorrupt, Exception)
