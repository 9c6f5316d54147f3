"""The link never holds training up: with no mesh, or with a controller that is slow, dies, comes back, or lies."""

import asyncio
from dataclasses import replace

import pytest

from esper.kasmina.link import Standing
from esper.mesh.errors import Stale, Unavailable
from esper.mesh.testing import serve
from esper.v1 import (
    tamiyo_service_pb2,
)
from tests.kasmina.link.scripts import (
    FAST,
    NOWHERE,
    SIGNATURE,
    ScriptedTamiyo,
    on_trainer,
    some_health,
    some_report,
    timed,
    until,
    until_kernel,
)
from tests.services.tamiyo.tamiyo_mesh import open_mesh
from tests.services.tamiyo.tamiyo_worlds import kernel_id, make_hello, make_state


def test_without_a_mesh_nothing_waits_and_nothing_fails(make_link):
    """Dead from the start: after the first refusal every method returns at once; kernels are refused with a reason."""
    link = make_link(NOWHERE)
    link.open(make_hello())
    assert link.advise(make_state(1), 2.0) is None
    advice, waited = timed(link.advise, make_state(2), 60.0)
    assert advice is None
    assert waited < 20
    assert Standing.AWAY is link.standing
    link.publish_health(some_health())
    link.report(some_report())
    link.event("transition", {"seed": 1})
    link.request_kernel(kernel_id(1), SIGNATURE)
    assert link.kernel(kernel_id(1)) is None
    with pytest.raises(Unavailable):
        until_kernel(link, kernel_id(1))
    link.close(0.2)
    assert Standing.ENDED is link.standing


def test_a_link_that_was_never_opened_is_harmless(make_link):
    """Handing over without an open link drops and counts."""
    link = make_link(NOWHERE)
    link.event("early", {})
    link.request_kernel(kernel_id(1), SIGNATURE)
    assert link.kernel(kernel_id(1)) is None
    assert 1 == link._mail.dropped
    link.close(1.0)


async def test_the_controller_answers_through_the_link(tmp_path, make_link):
    """Against the real controller: explanation, state, and the same boundary."""
    async with open_mesh(tmp_path) as mesh:
        link = make_link(mesh.target)
        link.open(make_hello())
        advice = await on_trainer(link.advise, make_state(1), 5.0)
        assert 1 == advice.boundary
        assert "no validated kernel fits" in advice.explanation
        assert advice.controller_state
        assert Standing.READY is link.standing
        await on_trainer(link.close, 1.0)
        assert Standing.ENDED is link.standing
        assert link.advise(make_state(2), 5.0) is None


async def test_a_late_answer_is_never_heard(scripted, make_link):
    """A missed deadline gives None on time; the next stream begins with the state that was last handed out."""
    link = make_link(scripted.target)
    link.open(make_hello(controller_state=b""))
    assert b"after 1" == (await on_trainer(link.advise, make_state(1), 5.0)).controller_state
    scripted.delay_s = 30.0
    advice, waited = await on_trainer(timed, link.advise, make_state(2), 0.1)
    assert advice is None
    assert 0.09 < waited < 20
    scripted.delay_s = 0.0
    advice = await on_trainer(link.advise, make_state(3), 5.0)
    assert 3 == advice.boundary
    assert [b"", b"after 1"] == [hello.controller_state for hello in scripted.hellos]
    assert [1, 2, 3] == scripted.states


async def test_a_slow_controller_costs_few_deadlines(scripted, make_link):
    """After the allowed misses in a row it is away and costs nothing; probed in the background, it comes back."""
    link = make_link(scripted.target, settings=replace(FAST, misses_allowed=2))
    link.open(make_hello())
    await until(lambda: link.standing is Standing.READY)
    scripted.delay_s = 30.0
    for boundary in (1, 2):
        assert await on_trainer(link.advise, make_state(boundary), 0.05) is None
    await until(lambda: link.standing is not Standing.READY)
    costly = 0
    for boundary in range(3, 23):
        advice, waited = await on_trainer(timed, link.advise, make_state(boundary), 0.2)
        assert advice is None
        costly += waited > 0.19
    assert costly <= 10
    scripted.delay_s = 0.0
    boundary = 100

    async with asyncio.timeout(10):
        while await on_trainer(link.advise, make_state(boundary), 1.0) is None:
            boundary += 1
            await asyncio.sleep(0.02)
    assert await on_trainer(link.advise, make_state(boundary + 1), 1.0) is not None


async def test_a_mesh_that_dies_and_comes_back_is_found_again(make_link):
    """None at once while it is away; afterwards the run goes on from its last controller_state."""
    first = ScriptedTamiyo()
    link = None
    async with serve(first) as (server, _):
        port = server.port
        link = make_link(server.target)
        link.open(make_hello())
        assert await on_trainer(link.advise, make_state(1), 5.0) is not None
        await until(lambda: link.standing is Standing.READY)
    await until(lambda: link.standing is Standing.AWAY)
    advice, waited = await on_trainer(timed, link.advise, make_state(2), 60.0)
    assert advice is None
    assert waited < 20
    from esper.mesh.testing import settings_with

    second = ScriptedTamiyo()
    async with serve(second, settings=settings_with(port=port)):
        await until(lambda: link.standing is Standing.READY)
        assert 3 == (await on_trainer(link.advise, make_state(3), 5.0)).boundary
        assert b"after 1" == second.hellos[0].controller_state
        await on_trainer(link.close, 1.0)


async def test_a_question_survives_one_break_of_the_stream(scripted, make_link):
    """A hand-over between servers within the deadline is not even noticed: the question goes along."""
    link = make_link(scripted.target)
    link.open(make_hello())
    await until(lambda: link.standing is Standing.READY)
    scripted.error = Unavailable("drains")

    async def recover():
        await until(lambda: link.standing is not Standing.READY)
        scripted.error = None

    _, advice = await asyncio.gather(recover(), on_trainer(link.advise, make_state(1), 5.0))
    assert advice is None or advice.boundary == 1
    await until(lambda: link.standing is Standing.READY)
    assert 2 == (await on_trainer(link.advise, make_state(2), 5.0)).boundary


async def test_a_run_that_was_taken_over_asks_no_more(scripted, make_link):
    """Two trainers of one run must not take it from each other for ever; a new hello begins again."""
    scripted.error = Stale("a newer stream", reason="RUN_TAKEN_OVER")
    link = make_link(scripted.target)
    link.open(make_hello())
    await until(lambda: link.standing is Standing.ENDED)
    scripted.error = None
    assert link.advise(make_state(1), 5.0) is None
    link.open(make_hello())
    assert 2 == (await on_trainer(link.advise, make_state(2), 5.0)).boundary


async def test_going_back_to_a_checkpoint_opens_another_stream(scripted, make_link):
    """A boundary that is not after the last one, with or without a new hello, begins a new conversation."""
    link = make_link(scripted.target)
    link.open(make_hello())
    assert await on_trainer(link.advise, make_state(5), 5.0) is not None
    assert 3 == (await on_trainer(link.advise, make_state(3), 5.0)).boundary
    link.open(make_hello(controller_state=b"older"))
    assert 2 == (await on_trainer(link.advise, make_state(2), 5.0)).boundary
    assert [b"", b"after 5", b"older"] == [hello.controller_state for hello in scripted.hellos]


async def test_a_controller_that_does_not_speak_the_contract_is_away(scripted, make_link):
    """An advice before `ready`, or a refusal for good, is no reason to stop training."""
    scripted.odd_first = True
    link = make_link(scripted.target)
    link.open(make_hello())
    await until(lambda: link.standing is Standing.AWAY)
    assert link.advise(make_state(1), 5.0) is None


async def test_a_controller_that_never_says_ready_is_away(make_link):
    """Opening a stream has a deadline of its own."""

    class Mute(ScriptedTamiyo):
        async def Advise(self, request_iterator, context):  # noqa: N802  # the contract's name
            async for _ in request_iterator:
                await asyncio.sleep(60)
                yield tamiyo_service_pb2.AdviseResponse()

    async with serve(Mute()) as (server, _):
        link = make_link(server.target, settings=replace(FAST, connect_timeout_s=0.1))
        link.open(make_hello())
        advice, waited = await on_trainer(timed, link.advise, make_state(1), 5.0)
        assert advice is None
        assert waited < 2.0
        await on_trainer(link.close, 0.2)


async def test_a_state_that_cannot_be_sent_is_no_error_of_training(scripted, make_link):
    """A seed with a kernel id that is none costs the advice, and is logged."""
    from tests.services.tamiyo.tamiyo_worlds import make_seed

    link = make_link(scripted.target)
    link.open(make_hello())
    assert await on_trainer(link.advise, make_state(1, [make_seed(0, kernel_id="kernel one")]), 5.0) is None
    await until(lambda: link.standing is Standing.READY)
    assert await on_trainer(link.advise, make_state(2), 5.0) is not None
