"""Subscribing clients against a real bus, with the bus going away in the middle."""

import asyncio
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import pytest

from esper.mesh.bus import BusPublisher, BusSubscriber, PublisherOptions, new_event
from esper.mesh.channel import open_channel
from esper.mesh.errors import InvalidInput, NotFound
from esper.mesh.settings import ChannelOptions
from esper.mesh.testing import serve, service_context, settings_with
from esper.oona.service import Config, build
from esper.v1 import oona_service_pb2
from esper.v1.oona_service_pb2_grpc import OonaServiceStub

QUICK = PublisherOptions(linger_s=0.001, backoff_s=0.01, backoff_max_s=0.05)
EARLIEST = oona_service_pb2.START_POSITION_EARLIEST
LATEST = oona_service_pb2.START_POSITION_LATEST
LAST = oona_service_pb2.START_POSITION_LAST
TIME = oona_service_pb2.START_POSITION_TIME


@asynccontextmanager
async def bus_at(path, *, port=0, **config):
    """A bus, on a port that a later one can take again."""
    context = service_context("oona", path)
    service = await build(Config(backoff_s=0.02, position_interval_s=0.05, **config), context)
    settings = settings_with(port=port, drain_grace_s=0.2)
    async with serve(service, settings=settings, drain=context.drain) as (server, channel):
        yield server, channel


async def put(channel, numbers, topic="decisions"):
    """Publish numbered events."""
    async with BusPublisher(channel, QUICK) as publisher:
        for number in numbers:
            publisher.publish(topic, new_event("n", b"%d" % number, key=f"k{number % 7}"))
        assert await publisher.flush(20)


async def take(subscriber, count, *, ack=True):
    """Read some deliveries, acknowledging each."""
    found = []
    async with asyncio.timeout(20):
        async for delivery in subscriber:
            found.append(delivery)
            if ack:
                delivery.ack()
            if len(found) == count:
                break
    return found


def numbers_of(deliveries):
    """The numbers that the events say."""
    return [int(d.event.payload) for d in deliveries]


async def lag(channel, group, topic="decisions"):
    """(lag, members) of a group, or None."""
    shown = await OonaServiceStub(channel).GetTopic(oona_service_pb2.GetTopicRequest(name=topic))
    return {g.group: (g.lag, g.members) for g in shown.topic.groups}.get(group)


async def test_group_acknowledges_what_it_handled(tmp_path):
    """The last acknowledgements before the end are heard; a later member goes on behind them."""
    async with bus_at(tmp_path) as (_, channel):
        await put(channel, range(1000))
        async with BusSubscriber(channel, "decisions", group="g", member="one", credit=10) as subscriber:
            first = await take(subscriber, 600)
        assert (400, 0) == await lag(channel, "g")
        async with BusSubscriber(channel, "decisions", group="g") as subscriber:
            second = await take(subscriber, 400)
        assert set(range(1000)) == set(numbers_of(first)) | set(numbers_of(second))
        assert (0, 0) == await lag(channel, "g")
        assert abs((datetime.now(UTC) - second[0].store_time).total_seconds()) < 60


async def test_refused_events_come_again(tmp_path):
    """A nack brings the event back with the next attempt; its delay is kept; answering twice does nothing."""
    async with bus_at(tmp_path) as (_, channel):
        await put(channel, range(2))
        async with BusSubscriber(channel, "decisions", group="g") as subscriber:
            seen = []
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(10):
                async for delivery in subscriber:
                    seen.append((int(delivery.event.payload), delivery.attempt))
                    if delivery.attempt == 1 and delivery.event.payload == b"1":
                        refused_at = loop.time()
                        delivery.nack("not yet", delay_s=0.3)
                        delivery.ack()
                    elif delivery.attempt == 2 and delivery.event.payload == b"1":
                        assert loop.time() - refused_at >= 0.3
                        delivery.nack()
                    else:
                        delivery.ack()
                    if delivery.attempt == 3:
                        break
        assert [(0, 1), (1, 1), (1, 2), (1, 3)] == sorted(seen)
        assert (0, 0) == await lag(channel, "g")


async def test_a_delay_beyond_the_bound_is_the_longest_one(tmp_path):
    """A refusal for days waits for the longest time that the contract has; it does not break the stream."""
    async with bus_at(tmp_path) as (_, channel):
        await put(channel, range(2))
        async with BusSubscriber(channel, "decisions", group="g") as subscriber:
            seen = []
            async with asyncio.timeout(10):
                async for delivery in subscriber:
                    seen.append((int(delivery.event.payload), delivery.attempt))
                    delivery.nack("another day", delay_s=1e6)
                    if len(seen) == 2:
                        await put(channel, [2])
                    elif len(seen) == 3:
                        break
            assert [(0, 1), (1, 1), (2, 1)] == sorted(seen)


async def test_group_outlives_the_bus(tmp_path):
    """The bus stops and starts while a group works: every event is handled, what was acknowledged is not repeated."""
    async with bus_at(tmp_path) as (server, channel):
        port = server.port
        await put(channel, range(500))
    channel = open_channel(f"127.0.0.1:{port}", options=ChannelOptions(reconnect_max_s=0.1))
    handled = []
    async with BusSubscriber(channel, "decisions", group="g", credit=20, backoff_max_s=0.1) as subscriber:

        async def work():
            async for delivery in subscriber:
                await asyncio.sleep(0.001)
                handled.append(int(delivery.event.payload))
                delivery.ack()

        working = asyncio.create_task(work())
        for life in range(3):
            async with bus_at(tmp_path, port=port) as (_, other):
                await put(other, range(500 + life * 10, 510 + life * 10))
                await asyncio.sleep(0.3)
        async with bus_at(tmp_path, port=port) as (_, other):
            async with asyncio.timeout(20):
                while await lag(other, "g") != (0, 1):  # noqa: ASYNC110  # the condition is behind an RPC
                    await asyncio.sleep(0.02)
            subscriber.close()
            await asyncio.wait_for(working, 5)
        assert subscriber.reconnects >= 2
    assert set(range(530)) == set(handled)
    assert len(handled) - 530 <= 3 * 20, "only what was under way at a stop may come again"
    await channel.close()


@pytest.mark.parametrize(
    ("settings", "before"),
    [
        ({"start": EARLIEST}, range(100)),
        ({"start": LATEST}, range(0)),
        ({"start": LAST, "last": 10}, None),
        ({"start": TIME, "start_time": datetime(2020, 1, 1, tzinfo=UTC)}, range(100)),
    ],
)
async def test_reader_outlives_the_bus(tmp_path, settings, before):
    """Without a group, a reader goes on after the last event seen: none lost and none twice, wherever it began."""
    async with bus_at(tmp_path) as (server, channel):
        port = server.port
        await put(channel, range(100))
    channel = open_channel(f"127.0.0.1:{port}", options=ChannelOptions(reconnect_max_s=0.1))
    seen = []
    async with BusSubscriber(channel, "decisions", backoff_max_s=0.1, **settings) as subscriber:

        async def work():
            async for delivery in subscriber:
                seen.append(int(delivery.event.payload))
                delivery.ack()

        working = asyncio.create_task(work())
        expected = 100
        for life in range(3):
            async with bus_at(tmp_path, port=port) as (_, other):
                async with asyncio.timeout(10):
                    while subscriber.reconnects < life or subscriber._session is None:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.3)
                await put(other, range(expected, expected + 50))
                expected += 50
                async with asyncio.timeout(10):
                    while expected - 1 not in seen:  # noqa: ASYNC110  # the reader is another task
                        await asyncio.sleep(0.01)
                    # Order holds within a partition alone: others may still owe theirs, in this life or in the next.
                    while life == 2 and not set(range(100, expected)) <= set(seen):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
        subscriber.close()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    assert len(seen) == len(set(seen))
    assert set(range(100, expected)) <= set(seen)
    if before is not None:
        assert set(before) == set(seen) - set(range(100, expected))
    await channel.close()


@pytest.mark.parametrize("behind", [500, 12_000])
async def test_reader_catches_up_however_far_behind(tmp_path, behind):
    """What was published while the stream was down comes, be it more than LAST can reach back or less."""
    async with bus_at(tmp_path, partitions=1) as (_, channel):
        await put(channel, range(10))
        subscriber = BusSubscriber(channel, "decisions", start=LATEST, credit=1000)
        opening = await subscriber._opening()
        assert LATEST == opening.start
        await put(channel, range(10, 10 + behind))
        opening = await subscriber._opening()
        assert (LAST if behind == 500 else EARLIEST) == opening.start
        assert not await subscriber._gap(opening)
        found = await take(subscriber, behind)
        assert list(range(10, 10 + behind)) == numbers_of(found)
        await subscriber.__aexit__()


async def test_a_gap_is_noticed(tmp_path):
    """When so much is published around the opening that LAST falls short, the reader begins again from the start."""
    async with bus_at(tmp_path, partitions=1) as (_, channel):
        subscriber = BusSubscriber(channel, "decisions", start=LATEST)
        await subscriber._opening()
        opening = await subscriber._opening()
        assert LAST == opening.start
        await put(channel, range(opening.last + 1))
        assert await subscriber._gap(opening)
        assert EARLIEST == (await subscriber._opening()).start


async def test_unknown_topic_is_an_error_at_once(tmp_path):
    """What another attempt would meet again is raised, not tried again."""
    async with bus_at(tmp_path) as (_, channel):
        for group in ("", "g"):
            with pytest.raises(NotFound, match="no topic nope"):
                await take(BusSubscriber(channel, "nope", group=group), 1)
        with pytest.raises(InvalidInput):
            await take(BusSubscriber(channel, "decisions", group="g" * 101), 1)


async def test_closing_from_another_task_ends_the_iteration(tmp_path):
    """`close` wakes a reader that waits for events."""
    async with bus_at(tmp_path) as (_, channel):
        subscriber = BusSubscriber(channel, "decisions", group="g")
        waiting = asyncio.create_task(take(subscriber, 1))
        await asyncio.sleep(0.2)
        subscriber.close()
        assert [] == await asyncio.wait_for(waiting, 5)
        assert [] == await take(subscriber, 1)


async def test_closing_before_the_stream_stands(tmp_path):
    """`close` in the middle of opening ends it too, and so does cancellation."""
    async with bus_at(tmp_path) as (_, channel):
        subscriber = BusSubscriber(channel, "decisions", group="g")
        waiting = asyncio.create_task(take(subscriber, 1))
        await asyncio.sleep(0)
        subscriber.close()
        assert [] == await asyncio.wait_for(waiting, 5)
        waiting = asyncio.create_task(take(BusSubscriber(channel, "decisions", group="g"), 1))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(5):
            while await lag(channel, "g") not in {None, (0, 0)}:  # noqa: ASYNC110  # behind an RPC
                await asyncio.sleep(0.01)


async def test_credit_holds_the_bus_back(tmp_path):
    """A consumer that does not answer gets no more than its credit."""
    async with bus_at(tmp_path) as (_, channel):
        await put(channel, range(100))
        subscriber = BusSubscriber(channel, "decisions", group="g", credit=5)
        batches = subscriber.batches()
        count = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                async for batch in batches:
                    count += len(batch)
        assert 5 == count
        await batches.aclose()
