"""A kernel that fails in runs is examined again, and quarantined where it does not hold."""

import asyncio
import contextlib
import json

import pytest

from esper.mesh.bus import BusPublisher, new_event
from esper.mesh.errors import Unavailable
from esper.mesh.identity import Role
from esper.mesh.testing import channel_as, serve, service_context
from esper.urabrask.engine import Candidate
from esper.urabrask.recall import Recall
from esper.v1 import event_pb2

KERNEL = "sha256:" + f"{0:064x}"


class Engine:
    """Judges as it is told, and counts."""

    def __init__(self, judgement):
        self.judgement, self.judged = judgement, []

    async def judge(self, candidate, bundle):
        self.judged.append((candidate.id, bundle))
        if isinstance(self.judgement, Exception):
            raise self.judgement
        return self.judgement


class Archive:
    """Serves one kernel until it is quarantined."""

    def __init__(self):
        self.reasons = []

    async def served(self, kernel_id):
        return None if self.reasons or kernel_id != KERNEL else Candidate(kernel_id, 4, {})

    async def download(self, candidate):
        return b"bits"

    async def quarantine(self, kernel_id, reason):
        self.reasons.append((kernel_id, reason))


def report(run_id="run-1", *, kind="kernel_fault", fault="not_finite", kernel_id=KERNEL):
    """The event of a runtime."""
    fields = {"kernel_id": kernel_id, "fault": fault, "detail": "its output is not finite", "answer": "identity"}
    payload = json.dumps({"kind": kind, "run_id": run_id, "fields": fields}).encode()
    return new_event("application/json", payload, attributes={"kind": kind, "run_id": run_id})


@pytest.fixture
def make(judgement):
    """Makes recalls that hear what they are told."""

    def recall(*, passed=True, runs=2, judged=None):
        engine, archive = Engine(judged or judgement(passed=passed)), Archive()
        return Recall(engine, archive, None, runs=runs, drain=asyncio.Event()), engine, archive

    return recall


async def test_a_kernel_that_fails_again_is_quarantined_at_once(make):
    """With what failed in the run and what failed here."""
    recall, engine, archive = make(passed=False)
    recall.hear(report())
    await recall.examine(KERNEL)
    assert [(KERNEL, b"bits")] == engine.judged
    ((_, why),) = archive.reasons
    assert why.startswith("failed in a run (run-1: not_finite: its output is not finite) and again here: ")
    await recall.examine(KERNEL)
    assert 1 == len(archive.reasons)


@pytest.mark.parametrize(("runs", "reasons"), [(2, 1), (0, 0)])
async def test_a_kernel_that_holds_here_is_quarantined_when_it_failed_in_several_runs(make, runs, reasons):
    """Examined once; further reports of the same run do not count."""
    recall, engine, archive = make(runs=runs)
    for run_id in ("run-1", "run-1", "run-2"):
        recall.hear(report(run_id))
        await recall.examine(KERNEL)
        assert (1, reasons if run_id == "run-2" else 0) == (len(engine.judged), len(archive.reasons))
    assert not reasons or "failed in 2 runs; last: run-2" in archive.reasons[0][1]


async def test_what_says_nothing_against_a_kernel_is_passed_over(make):
    """Slow there, diverged, another kind of event, nonsense, an unknown kernel."""
    recall, engine, archive = make(passed=False)
    nonsense = event_pb2.Event(payload=b"{", attributes={"kind": "kernel_fault"})
    other = "sha256:" + "f" * 64
    for event in (
        report(fault="slow"),
        report(fault="diverged"),
        report(kind="transition"),
        nonsense,
        report(kernel_id=other),
    ):
        recall.hear(event)
    await recall.examine(KERNEL)
    await recall.examine(other)
    assert ([], []) == (engine.judged, archive.reasons)


async def test_reports_come_over_the_bus(judgement, tmp_path):
    """From a runtime's event to the quarantine; a machinery that fails is no finding, another report tries again."""
    from esper.oona.service import Config, build

    drain = asyncio.Event()
    oona = await build(Config(), service_context("oona", tmp_path / "oona", drain=drain))
    engine, archive = Engine(Unavailable("no sandbox")), Archive()
    async with contextlib.AsyncExitStack() as stack:
        server, _ = await stack.enter_async_context(serve(oona, drain=drain))
        channel = await stack.enter_async_context(channel_as(server, Role.URABRASK))
        recall = Recall(engine, archive, channel, runs=0, drain=drain)
        recall.start()
        publisher = BusPublisher(channel)
        publisher.start()
        async with asyncio.timeout(30):
            number = 0
            while not archive.reasons:
                number += 1
                await publisher.send("run-events", report(f"run-{number}"))
                await asyncio.sleep(0.05)
                if engine.judged:
                    engine.judgement = judgement(passed=False)
        await publisher.close(1.0)
        await recall.stop()
    assert len(engine.judged) >= 2
    assert KERNEL == archive.reasons[0][0]
