"""Watching the library: complete, in order, without gaps; and its echo on the message bus."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from esper.kasmina.signature import Layout, Signature
from esper.mesh.bus import BusPublisher, BusSubscriber
from esper.mesh.channel import open_channel
from esper.mesh.errors import Code, LimitExceeded, Unavailable
from esper.mesh.testing import serve, service_context, settings_with
from esper.oona.service import Config as OonaConfig
from esper.oona.service import build as build_oona
from esper.urza import announce, desk, feed
from esper.urza.announce import TOPIC, Announcer
from esper.urza.builds import BuildOrder, BuildState, Tier
from esper.urza.changes import Change
from esper.urza.desk import Rules
from esper.urza.leases import Request, WorkKind
from esper.urza.library import Library
from esper.urza.service import Config
from esper.urza.service import build as build_urza
from esper.urza.store import sqlite_url
from esper.v1 import oona_service_pb2, oona_service_pb2_grpc, urza_service_pb2_grpc
from esper.v1 import urza_service_pb2 as pb
from tests.services.urza.urza_calls import Served, refusal, serve_library
from tests.services.urza.urza_world import FORGE, World, make_ir, open_world


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A library behind a real server."""
    async with serve_library(tmp_path) as opened:
        yield opened


async def take(changes: Any, count: int) -> list[Any]:
    """The next changes of a watch."""
    async with asyncio.timeout(30):
        return [await anext(changes) for _ in range(count)]


async def test_a_watch_begins_with_the_present(served: Served) -> None:
    """Without a number the first answer is the present one, and then comes what happens."""
    await served.submit("before")
    call = aiter(served.client.WatchLibrary(pb.WatchLibraryRequest()))
    (position,) = await take(call, 1)
    assert (1, "position") == (position.sequence, position.WhichOneof("change"))
    await served.submit("after")
    build = await served.order()
    changes = await take(call, 3)
    assert [2, 3, 4] == [change.sequence for change in changes]
    assert ["after", "low_rank"] == [change.blueprint.name for change in changes[:2]]
    assert build == changes[2].build
    assert all(change.HasField("occur_time") for change in changes)


async def test_a_watch_goes_on_where_it_broke_off(served: Served) -> None:
    """History and present join without a gap or a repetition, however many changes lie between."""
    for number in range(30):
        await served.submit(f"old_{number}")
    call = aiter(served.client.WatchLibrary(pb.WatchLibraryRequest(after_sequence=10)))
    first = await take(call, 5)
    adding = asyncio.gather(*(served.submit(f"new_{number}") for number in range(30)))
    rest = await take(call, 45)
    await adding
    assert list(range(11, 61)) == [change.sequence for change in (*first, *rest)]


async def test_a_number_from_another_library_is_refused(served: Served) -> None:
    """A watcher that is ahead of this library has seen another one: it is told instead of waiting for ever."""
    error = await refusal(served.client.WatchLibrary(pb.WatchLibraryRequest(after_sequence=1)))
    assert (Code.OUT_OF_RANGE, "SEQUENCE_AHEAD") == (error.code, error.reason)


async def test_watches_end_at_the_drain(tmp_path: Path) -> None:
    """A server that stops ends every watch with UNAVAILABLE, and does not wait for its grace."""
    async with serve_library(tmp_path, settings=settings_with(drain_grace_s=120)) as served, asyncio.timeout(60):
        call = aiter(served.client.WatchLibrary(pb.WatchLibraryRequest()))
        await take(call, 1)
        stopping = asyncio.ensure_future(served.server.stop())
        error = await refusal(call)
        assert (Code.UNAVAILABLE, "DRAINING") == (error.code, error.reason)
        await stopping


async def test_a_watcher_that_is_too_slow_is_sent_away(tmp_path: Path) -> None:
    """Who is further behind than the queue is long loses the stream, but no change: it watches again from its last."""
    async with open_world(sqlite_url(tmp_path / "library.db"), tmp_path, rules=Rules(watcher_queue=16)) as world:
        async with aclosing(world.library.watch(None)) as changes:
            assert 0 == await anext(changes)
            for number in range(40):
                await world.submit(f"b{number}")
            seen: list[int] = []
            with pytest.raises(LimitExceeded) as caught:
                await _collect(changes, seen)
        assert "WATCHER_TOO_SLOW" == caught.value.reason
        assert list(range(1, 17)) == seen
        assert {"after_sequence": "16"} == caught.value.metadata
        async with aclosing(world.library.watch(seen[-1])) as changes:
            assert list(range(17, 41)) == [change.sequence for change in await take(changes, 24)]


async def _collect(changes: AsyncIterator[int | Change], seen: list[int]) -> None:
    async for change in changes:
        assert isinstance(change, Change)
        seen.append(change.sequence)


async def test_watches_end_with_the_library(small_world: World) -> None:
    """Closing a library ends its watches."""
    changes = small_world.library.watch(None)
    assert 0 == await anext(changes)
    ending = asyncio.ensure_future(anext(changes, None))
    await asyncio.sleep(0)
    await small_world.library.close()
    assert None is await ending


async def test_the_feed_outlives_trouble_with_the_database(small_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the log cannot be read for a while, watchers wait, and then miss nothing."""
    from esper.mesh.errors import Unavailable
    from esper.urza import feed, log

    monkeypatch.setattr(feed, "_RETRY_S", 0.01)
    real, failures = log.changes_after, 3

    async def flaky(*arguments: Any, **more: Any) -> list[Change]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise Unavailable("not now")
        return await real(*arguments, **more)

    async with aclosing(small_world.library.watch(None)) as changes:
        await anext(changes)
        monkeypatch.setattr(log, "changes_after", flaky)
        await small_world.submit()
        assert [1] == [change.sequence for change in await take(changes, 1)]


async def test_servers_that_share_a_database_wake_each_other(postgres_url: str, tmp_path: Path) -> None:
    """On PostgreSQL a watch and a waiting forge on one server hear of what was asked for on the other, at once."""
    async with open_world(postgres_url, tmp_path / "a") as here, open_world(postgres_url, tmp_path / "b") as there:
        assert here.library.store.library_id == there.library.store.library_id
        async with aclosing(there.library.watch(None)) as changes:
            await anext(changes)
            request = Request(kind=WorkKind.COMPILE, holder="there")
            waiting = asyncio.ensure_future(there.library.desk.lease(request, FORGE, wait_s=60))
            await asyncio.sleep(0.1)
            build = await here.order()
            assert [1, 2] == [change.sequence for change in await take(changes, 2)]
            async with asyncio.timeout(10):
                assert [build.id] == [lease.subject_id for lease in await waiting]


async def test_notifications_survive_a_cut_connection(
    postgres_url: str, postgres_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When PostgreSQL cuts every connection, a server listens again by itself and misses nothing."""
    import asyncpg

    from esper.urza import notify

    monkeypatch.setattr(notify, "_RETRY_S", 0.01)
    async with (
        open_world(postgres_url, tmp_path / "a") as here,
        open_world(postgres_url, tmp_path / "b") as there,
        aclosing(there.library.watch(None)) as changes,
    ):
        await anext(changes)
        admin = await asyncpg.connect(postgres_server)
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND query LIKE 'LISTEN%'",
            postgres_url.rpartition("/")[2],
        )
        await admin.close()
        await here.submit()
        assert [1] == [change.sequence for change in await take(changes, 1)]


async def test_a_lost_notification_server_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing answers, listening goes on trying, until the drain."""
    import sqlalchemy as sa

    from esper.urza import notify

    monkeypatch.setattr(notify, "_RETRY_S", 0.01)
    drain = asyncio.Event()
    url = sa.make_url("postgresql+asyncpg://esper@127.0.0.1:1/library")
    listening = asyncio.ensure_future(notify.listen(url, lambda _topics: None, frozenset(), drain))
    await asyncio.sleep(0.1)
    assert not listening.done()
    drain.set()
    async with asyncio.timeout(10):
        await listening


async def test_two_servers_hand_each_piece_out_once(postgres_url: str, tmp_path: Path) -> None:
    """Forges of two servers on one database never get the same build."""
    taken: list[str] = []

    async def forge(library: Library) -> None:
        while leases := await library.desk.lease(Request(kind=WorkKind.COMPILE, holder="x", limit=2), FORGE):
            taken.extend(lease.subject_id for lease in leases)

    async with open_world(postgres_url, tmp_path / "a") as here, open_world(postgres_url, tmp_path / "b") as there:
        builds = await here.orders(24)
        await asyncio.gather(*(forge(world.library) for world in (here, there) for _ in range(4)))
        assert sorted(build.id for build in builds) == sorted(taken)


async def test_watching_survives_any_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while changes and leases are looked at, both are looked at again."""
    failures = {"changes": 1, "leases": 1}
    changes_after, next_expiry = feed.log.changes_after, desk.queue.next_expiry

    async def unread(*arguments: Any, **named: Any) -> Any:
        failures["changes"] -= 1
        if failures["changes"] >= 0:
            raise ZeroDivisionError
        return await changes_after(*arguments, **named)

    async def unseen(*arguments: Any) -> Any:
        failures["leases"] -= 1
        if failures["leases"] >= 0:
            raise ZeroDivisionError
        return await next_expiry(*arguments)

    monkeypatch.setattr(feed.log, "changes_after", unread)
    monkeypatch.setattr(desk.queue, "next_expiry", unseen)
    for module in (feed, desk):
        monkeypatch.setattr(module, "_RETRY_S", 0.01)
    rules = Rules(idle_sweep_s=0.01)
    async with (
        asyncio.timeout(60),
        open_world(sqlite_url(tmp_path / "library.db"), tmp_path, rules=rules) as world,
        aclosing(world.library.watch(None)) as changes,
    ):
        assert 0 == await anext(changes)
        await world.order()
        assert [1, 2] == [change.sequence for change in await take(changes, 2)]
        request = Request(kind=WorkKind.COMPILE, holder="x", lease_time_s=1.0)
        assert await world.library.desk.lease(request, FORGE)
        while failures["leases"] >= 0:  # noqa: ASYNC110  # the library's own clock
            await asyncio.sleep(0.005)
        world.clock.advance(2.0)
        states = [change.subject.state for change in await take(changes, 2)]
        assert [BuildState.LEASED, BuildState.QUEUED] == states


class TestBus:
    """The topic `library-events`."""

    async def test_changes_are_announced(self, tmp_path: Path) -> None:
        """Each change arrives on the bus as it would in a watch, keyed by its subject, under an id for ever its own."""
        drain = asyncio.Event()
        oona = await build_oona(OonaConfig(), service_context("oona", tmp_path / "oona", drain=drain))
        async with serve(oona) as (_server, channel):
            context = service_context("urza", tmp_path / "urza", channel=lambda _name: channel)
            urza = await build_urza(Config(), context)
            async with serve(urza) as (_other, to_urza):
                stub = urza_service_pb2_grpc.UrzaServiceStub(to_urza)
                ir = make_ir().canonical_json().encode()
                submitted = (await stub.SubmitBlueprint(pb.SubmitBlueprintRequest(ir=ir))).blueprint
                async with asyncio.timeout(30), BusSubscriber(channel, TOPIC, group="test") as subscriber:
                    delivery = await anext(aiter(subscriber))
                    delivery.ack()
            event = delivery.event
            message = pb.WatchLibraryResponse.FromString(event.payload)
            submitted.ClearField("ir")
            assert (1, submitted) == (message.sequence, message.blueprint)
            assert (submitted.id, "esper.v1.WatchLibraryResponse", "urza") == (event.key, event.type, event.source)
            assert event.id.endswith("-1")

    async def test_a_dead_bus_harms_nothing(self, tmp_path: Path) -> None:
        """With nobody at the other end the library serves as ever, and counts what it could not announce."""
        channel = open_channel("127.0.0.1:1")
        async with open_world(sqlite_url(tmp_path / "library.db"), tmp_path) as world:
            announcer = Announcer(world.library, BusPublisher(channel))
            announcer.start()
            for number in range(5):
                await world.submit(f"b{number}")
            async with asyncio.timeout(10):
                while announcer.stats.offered < 5:  # noqa: ASYNC110  # counts have no event
                    await asyncio.sleep(0.005)
            await announcer.close()
            assert 5 == announcer.stats.lost
        await channel.close()

    async def test_a_burst_is_announced_whole(self, tmp_path: Path) -> None:
        """More changes at once than a watcher may be behind: the announcer begins again and misses none."""
        rules = Rules(watcher_queue=2)
        channel = open_channel("127.0.0.1:1")
        async with open_world(sqlite_url(tmp_path / "library.db"), tmp_path, rules=rules) as world:
            announcer = Announcer(world.library, BusPublisher(channel))
            announcer.start()
            blueprint_id = await world.submit()
            widths = [Signature(Layout.VECTOR, width, 8) for width in range(1, 40)]
            orders = [
                BuildOrder(blueprint_id=blueprint_id, signature=signature, target="", tier=Tier.PORTABLE)
                for signature in widths
            ]
            await world.library.request_builds(orders, retry=False)  # one transaction, 39 changes
            async with asyncio.timeout(30):
                while announcer.stats.offered < 40:  # noqa: ASYNC110  # counts have no event
                    await asyncio.sleep(0.005)
            await announcer.close()
            assert 40 == announcer.stats.offered
        await channel.close()

    async def test_what_a_crash_kept_from_the_bus_is_announced_at_the_next_start(self, tmp_path: Path) -> None:
        """Changes of a library whose announcer never saw them reach the bus; those that did are not stored again."""
        oona = await build_oona(OonaConfig(partitions=1), service_context("oona", tmp_path / "oona"))
        url = sqlite_url(tmp_path / "library.db")
        async with serve(oona) as (_server, channel):
            for number, announced in enumerate((True, False, True)):
                async with open_world(url, tmp_path) as world:
                    await world.submit(f"b{number}")
                    if announced:
                        announcer = Announcer(world.library, BusPublisher(channel))
                        announcer.start()
                        async with asyncio.timeout(30):
                            while announcer.stats.stored < number + 1:  # noqa: ASYNC110  # counts have no event
                                await asyncio.sleep(0.005)
                        await announcer.close()
            async with asyncio.timeout(30), BusSubscriber(channel, TOPIC, group="test") as subscriber:
                deliveries = aiter(subscriber)
                events = [(await anext(deliveries)).event for _ in range(3)]
            topic = oona_service_pb2.GetTopicRequest(name=TOPIC)
            (extent,) = (await oona_service_pb2_grpc.OonaServiceStub(channel).GetTopic(topic)).topic.partition_statuses
            assert 3 == extent.next_offset
            assert [1, 2, 3] == [pb.WatchLibraryResponse.FromString(event.payload).sequence for event in events]

    @pytest.mark.parametrize("failure", [Unavailable("away", reason="DATABASE_UNAVAILABLE"), ZeroDivisionError("bug")])
    async def test_a_change_log_that_cannot_be_read_is_tried_again_after_a_pause(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
    ) -> None:
        """The announcer neither spins nor ends while its library's store fails, and goes on afterwards."""
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def slept(seconds: float) -> None:
            if seconds == announce.RETRY_S:
                pauses.append(seconds)
                seconds = 0.0
            await sleep(seconds)

        monkeypatch.setattr(announce.asyncio, "sleep", slept)
        channel = open_channel("127.0.0.1:1")
        async with open_world(sqlite_url(tmp_path / "library.db"), tmp_path) as world:
            watch, failures = world.library.watch, [failure] * 3

            def failing(after: int | None) -> Any:
                if failures:
                    raise failures.pop()
                return watch(after)

            monkeypatch.setattr(world.library, "watch", failing)
            announcer = Announcer(world.library, BusPublisher(channel))
            announcer.start()
            await world.submit()
            async with asyncio.timeout(30):
                while announcer.stats.offered < 1:  # counts have no event
                    await sleep(0.005)
            await announcer.close()
        assert [announce.RETRY_S] * 3 == pauses
        await channel.close()

    async def test_a_library_without_a_way_to_the_bus_serves(self, tmp_path: Path) -> None:
        """Where no channel can be had, the service starts all the same."""
        async with serve_library(tmp_path, Config()) as served:
            assert await served.submit()
