"""The contract of OonaService, over a real server."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import grpc
import pytest

from esper.mesh.errors import AlreadyExists, EsperError, InvalidInput, NotFound, Unavailable, from_rpc_error
from esper.mesh.identity import Role
from esper.mesh.testing import channel_as
from esper.oona.service import DEFAULT_TOPICS
from esper.v1 import event_pb2, oona_service_pb2
from esper.v1.oona_service_pb2_grpc import OonaServiceStub
from tests.services.oona.conftest import eventually, make_event, receive, running

Ack, Nack = oona_service_pb2.SubscribeAck, oona_service_pb2.SubscribeNack


async def error_of(call) -> EsperError:
    """What a call or a read ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def nack(call, *deliveries, reason="", delay_s=None):
    """Refuse deliveries."""
    message = Nack(delivery_ids=[d.delivery_id for d in deliveries], reason=reason)
    if delay_s is not None:
        message.delay.FromNanoseconds(int(delay_s * 1e9))
    await call.write(oona_service_pb2.SubscribeRequest(nack=message))


async def grant(call, credit):
    """Allow further deliveries."""
    await call.write(oona_service_pb2.SubscribeRequest(credit=oona_service_pb2.SubscribeCredit(credit=credit)))


class TestTopics:
    """CreateTopic, GetTopic, ListTopics."""

    async def test_defaults_exist_from_the_start(self, bus):
        """Every mesh has the five topics and their dead-letter topics; telemetry alone is INTERVAL and forgets."""
        listed = (await bus.stub.ListTopics(oona_service_pb2.ListTopicsRequest())).topics
        assert sorted([*DEFAULT_TOPICS, *(f"{name}.dead" for name in DEFAULT_TOPICS)]) == [t.name for t in listed]
        interval = {t.name for t in listed if t.durability == event_pb2.DURABILITY_INTERVAL}
        assert {"telemetry"} == interval == {t.name for t in listed if t.retention_seconds}
        assert {4} == {t.partitions for t in listed} == {len(t.partition_statuses) for t in listed}

    async def test_creating_is_idempotent(self, bus):
        """The same settings give the topic that exists; others are refused; zeros mean the server's defaults."""
        made = await bus.make("mine", partitions=3, max_attempts=2, retention_bytes=10)
        assert made == await bus.make("mine", partitions=3, max_attempts=2, retention_bytes=10)
        assert made == await bus.topic("mine")
        error = await error_of(bus.make("mine", partitions=4, max_attempts=2, retention_bytes=10))
        assert (AlreadyExists, "TOPIC_DIFFERS") == (type(error), error.reason)
        plain = await bus.make("plain")
        assert (4, 5, event_pb2.DURABILITY_SYNC) == (plain.partitions, plain.max_attempts, plain.durability)
        assert abs(plain.create_time.ToDatetime(UTC) - datetime.now(UTC)).total_seconds() < 60

    async def test_dead_names_are_the_servers(self, bus):
        """Clients neither make nor fill dead-letter topics."""
        error = await error_of(bus.make("mine.dead"))
        assert (InvalidInput, "TOPIC_RESERVED") == (type(error), error.reason)
        answer = await bus.publish("decisions.dead", [make_event(1)])
        assert (3, "TOPIC_RESERVED") == (answer.error.code, answer.error.reason)

    async def test_unknown_topic(self, bus):
        """GetTopic and Subscribe name what is missing."""
        for call in (bus.topic("nope"), bus.open("nope"), bus.open("nope", group="g")):
            error = await error_of(call)
            assert (NotFound, "TOPIC_NOT_FOUND") == (type(error), error.reason)
            assert "no topic nope" in error.public

    async def test_pages(self, bus):
        """Pages follow each other by name and end with an empty token."""
        names, token = [], ""
        while True:
            request = oona_service_pb2.ListTopicsRequest(page_size=3, page_token=token)
            page = await bus.stub.ListTopics(request)
            names += [t.name for t in page.topics]
            if not (token := page.next_page_token):
                break
            assert len(page.topics) == 3
        assert sorted(names) == names
        assert len(set(names)) == len(names) == 10

    async def test_number_of_topics_is_bounded(self, bus):
        """A client cannot fill the bus with topics."""
        bus.service.broker.options = replace(bus.service.broker.options, max_topics=5)
        error = await error_of(bus.make("one-more"))
        assert "TOO_MANY_TOPICS" == error.reason


class TestPublish:
    """Batches and their answers."""

    async def test_positions_are_where_the_events_are(self, bus):
        """Each position names the place at which a reader finds that very event."""
        events = [make_event(n, key=f"k{n % 5}") for n in range(20)]
        positions = (await bus.publish("decisions", events)).positions
        call = await bus.open("decisions")
        found = {(d.position.partition, d.position.offset): d.event for d in await receive(call, 20, ack=False)}
        assert events == [found[p.partition, p.offset] for p in positions]

    async def test_answers_come_in_order_and_errors_leave_the_stream_open(self, bus):
        """A batch for a topic that nobody made fails alone."""
        call = bus.stub.Publish()
        topics = ["decisions", "nope", "telemetry", "decisions"]
        for number, topic in enumerate(topics):
            event = make_event(number)
            await call.write(oona_service_pb2.PublishRequest(topic=topic, events=[event], batch=100 + number))
        await call.done_writing()
        answers = [answer async for answer in call]
        assert [100, 101, 102, 103] == [a.batch for a in answers]
        assert [0, 5, 0, 0] == [a.error.code for a in answers]
        assert "TOPIC_NOT_FOUND" == answers[1].error.reason
        assert not answers[1].error.HasField("retry_delay")

    async def test_publishing_again_is_acknowledged_and_not_stored(self, bus):
        """The same ids get the same positions and are counted."""
        events = [make_event(n) for n in range(3)]
        first, second = await bus.publish("decisions", events), await bus.publish("decisions", events)
        assert first.positions == second.positions
        assert (0, 3) == (first.duplicates, second.duplicates)
        assert 3 == sum(s.next_offset for s in (await bus.topic("decisions")).partition_statuses)

    async def test_a_batch_that_breaks_the_contract_ends_the_stream(self, bus):
        """An event without an id is INVALID_ARGUMENT with the field's path; batches before it are answered."""
        call = bus.stub.Publish()
        await call.write(oona_service_pb2.PublishRequest(topic="decisions", events=[make_event(1)]))
        assert 1 == len((await call.read()).positions)
        await call.write(oona_service_pb2.PublishRequest(topic="decisions", events=[event_pb2.Event()]))
        error = await error_of(call.read())
        assert isinstance(error, InvalidInput)
        assert "events[0].id" == error.violations[0].field

    async def test_many_batches_without_reading_answers(self, bus):
        """A client that writes ahead is not read beyond 64 batches, loses nothing, and gets every answer in order."""
        log, stored, accepted = bus.service.broker.log, asyncio.Event(), []
        append = log.append

        async def slowly(appended):
            await stored.wait()
            return await appended

        def held(topic, events):
            accepted.append(asyncio.ensure_future(slowly(append(topic, events))))
            return accepted[-1]

        log.append = held
        call = bus.stub.Publish()

        async def write():
            for number in range(500):
                events = [make_event(number * 10 + n, key="k") for n in range(10)]
                await call.write(oona_service_pb2.PublishRequest(topic="decisions", events=events, batch=number))
            await call.done_writing()

        writing = asyncio.create_task(write())
        async with asyncio.timeout(30):
            while len(accepted) < 64:  # noqa: ASYNC110  # counts have no event
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(accepted) <= 64 + 1  # one more is out of the queue, awaiting its answer
        stored.set()
        answers = [answer async for answer in call]
        await writing
        assert list(range(500)) == [a.batch for a in answers]
        assert list(range(5000)) == [p.offset for a in answers for p in a.positions]

    async def test_a_publisher_that_goes_away(self, bus):
        """A cancelled stream leaves nothing behind that hinders others."""
        call = bus.stub.Publish()
        for number in range(100):
            await call.write(oona_service_pb2.PublishRequest(topic="decisions", events=[make_event(number)]))
        call.cancel()
        assert 1 == len((await bus.publish("decisions", [make_event(1000)])).positions)

    async def test_drain_answers_what_was_accepted_then_ends(self, tmp_path):
        """At the drain a stream ends with UNAVAILABLE, after the answers to what was taken."""
        async with running(tmp_path) as bus:
            call = bus.stub.Publish()
            await call.write(oona_service_pb2.PublishRequest(topic="decisions", events=[make_event(1)]))
            assert 1 == len((await call.read()).positions)
            bus.drain.set()
            error = await error_of(call.read())
            assert (Unavailable, "DRAINING") == (type(error), error.reason)


class TestSubscribe:
    """Deliveries with and without a group."""

    async def test_open_comes_first_and_once(self, bus):
        """Anything else first, and `open` twice, end the stream with INVALID_ARGUMENT."""
        call = bus.stub.Subscribe()
        await grant(call, 1)
        error = await error_of(call.read())
        assert (InvalidInput, "OPEN_MISSING") == (type(error), error.reason)
        call = bus.stub.Subscribe()
        await call.done_writing()
        assert "OPEN_MISSING" == (await error_of(call.read())).reason
        call = await bus.open("decisions", group="g")
        opening = oona_service_pb2.SubscribeOpen(topic="decisions")
        await call.write(oona_service_pb2.SubscribeRequest(open=opening))
        assert "OPEN_REPEATED" == (await error_of(call.read())).reason

    async def test_group_goes_on_where_it_acknowledged(self, bus):
        """A second member of the same group, later, gets only what the first did not acknowledge; counts agree."""
        await bus.publish("decisions", [make_event(n) for n in range(10)])
        call = await bus.open("decisions", group="g", member="one")
        assert [0, 1, 2, 3] == call.partitions
        first = await receive(call, 10, ack=False)
        ack = Ack(delivery_ids=[d.delivery_id for d in first[:6]])
        await call.write(oona_service_pb2.SubscribeRequest(ack=ack))
        await eventually(lambda: self.group_is(bus, lag=4, in_flight=4, members=1))
        await call.done_writing()
        assert grpc.aio.EOF is await call.read()
        assert await self.group_is(bus, lag=4, in_flight=0, members=0)
        call = await bus.open("decisions", group="g")
        again = await receive(call, 4)
        assert {d.event.id for d in first[6:]} == {d.event.id for d in again}
        assert {2} == {d.attempt for d in again}
        await eventually(lambda: self.group_is(bus, lag=0, in_flight=0, members=1))

    @staticmethod
    async def group_is(bus, *, topic="decisions", **expected):
        (group,) = (await bus.topic(topic)).groups
        return {name: getattr(group, name) for name in expected} == expected

    async def test_members_share_partitions(self, bus):
        """Two members get every event once between them, each its own partitions; groups do not disturb each other."""
        one = await bus.open("decisions", group="g", credit=1000)
        two = await bus.open("decisions", group="g", credit=1000)
        other = await bus.open("decisions", group="h", credit=1000)
        assert 2 == len(two.partitions)
        await bus.publish("decisions", [make_event(n, key=f"k{n}") for n in range(100)])
        counts = [s.next_offset for s in (await bus.topic("decisions")).partition_statuses]
        for call, partitions in ((one, {0, 1, 2, 3} - set(two.partitions)), (two, set(two.partitions))):
            found = await receive(call, sum(counts[p] for p in partitions))
            assert partitions == {d.position.partition for d in found}
        assert 100 == len(await receive(other, 100))

    async def test_redelivery_keeps_the_key_in_order(self, bus):
        """After a refusal the event comes again before any later one of its key; other keys go on meanwhile."""
        await bus.make("narrow", partitions=1)
        call = await bus.open("narrow", group="g", credit=1)
        await bus.publish("narrow", [make_event(n, key=key) for n, key in enumerate("aaba")])
        (first,) = await receive(call, 1, ack=False)
        await nack(call, first, delay_s=3600)
        await grant(call, 3)
        (other,) = await receive(call, 1)
        assert ("event-2", 1) == (other.event.id, other.attempt)
        await eventually(lambda: self.group_is(bus, topic="narrow", in_flight=0))
        broker, now = bus.service.broker, bus.service.broker.now
        broker.now = lambda: now() + 3600
        order = [(d.event.id, d.attempt) for d in await receive(call, 2)]
        assert [("event-0", 2), ("event-1", 1)] == order

    @pytest.mark.parametrize("delay_s", [-1.0, 3601.0])
    async def test_delay_of_a_refusal_is_bounded(self, bus, delay_s):
        """A delay below nothing or above an hour ends the stream with INVALID_ARGUMENT."""
        call = await bus.open("decisions", group="g")
        await nack(call, delay_s=delay_s)
        error = await error_of(call.read())
        assert isinstance(error, InvalidInput)
        assert "nack.delay" == error.violations[0].field

    async def test_unanswered_event_comes_again(self, bus):
        """The acknowledgement timeout that the subscriber asked for is kept (to a tenth of a second)."""
        settings = {"group": "g", "credit": 2}
        opening = oona_service_pb2.SubscribeOpen(topic="decisions", **settings)
        opening.ack_timeout.FromSeconds(1)
        call = bus.stub.Subscribe()
        await call.write(oona_service_pb2.SubscribeRequest(open=opening))
        await call.read()
        begun = asyncio.get_running_loop().time()
        await bus.publish("decisions", [make_event(1)])
        (first,) = await receive(call, 1, ack=False)
        (second,) = await receive(call, 1)
        assert 1.0 <= asyncio.get_running_loop().time() - begun
        assert (2, first.event) == (second.attempt, second.event)

    async def test_a_member_that_hangs_keeps_nothing_from_the_others(self, bus):
        """What a member without a word or credit left took with it comes to another one after the timeout."""
        opening = oona_service_pb2.SubscribeOpen(topic="decisions", group="g", credit=4)
        opening.ack_timeout.FromSeconds(1)
        hung = bus.stub.Subscribe()
        await hung.write(oona_service_pb2.SubscribeRequest(open=opening))
        await hung.read()
        await bus.publish("decisions", [make_event(n, key=f"k{n}") for n in range(20)])
        lost = {d.event.id for d in await receive(hung, 4, ack=False)}
        call = await bus.open("decisions", group="g", credit=100)
        found = await receive(call, 20)
        assert 20 == len({d.event.id for d in found})
        assert lost == {d.event.id for d in found if d.attempt == 2}

    async def test_dead_letter_tells_its_story(self, bus):
        """After its last attempt an event stands in the dead-letter topic with cause, origin and its own content."""
        await bus.make("frail", partitions=1, max_attempts=2)
        call = await bus.open("frail", group="g")
        events = [make_event(0, key="a"), make_event(1, key="a")]
        events[0].attributes.update({f"own-{n:02}": "x" for n in range(16)})
        await bus.publish("frail", events)
        reason = "disk on fire: " + "x" * 600
        for _ in range(2):
            found = await receive(call, 2 if _ == 0 else 1, ack=False)
            failing = next(d for d in found if d.event.id == "event-0")
            await nack(call, failing, reason=reason, delay_s=0.0)
        dead = await bus.open("frail.dead")
        (letter,) = await receive(dead, 1, ack=False)
        assert (b"0", "a") == (letter.event.payload, letter.event.key)
        story = dict(letter.event.attributes)
        assert reason == story["dead-cause"] + story["dead-cause-2"] + story["dead-cause-3"]
        assert ("frail", "0/0", "g", "2", "event-0") == tuple(
            story[f"dead-{name}"] for name in ("topic", "position", "group", "attempts", "id")
        )
        assert 16 == len(story)
        assert {f"own-{n:02}" for n in range(8)} == {name for name in story if name.startswith("own")}
        assert 1 == bus.service.broker.counters.dead["frail", "g"]

    async def test_a_dead_event_frees_its_key(self, bus):
        """Later events of the key are delivered once the dead letter is stored."""
        await bus.make("frail", partitions=1, max_attempts=1)
        call = await bus.open("frail", group="g", credit=1)
        await bus.publish("frail", [make_event(0, key="a"), make_event(1, key="a")])
        await nack(call, *await receive(call, 1, ack=False))
        await grant(call, 1)
        (second,) = await receive(call, 1)
        assert "event-1" == second.event.id

    async def test_dead_letters_can_be_worked_off(self, bus):
        """A group on a dead-letter topic is tried without end: it has no dead letters of its own."""
        await bus.make("frail", partitions=1, max_attempts=1)
        call = await bus.open("frail", group="g")
        await bus.publish("frail", [make_event(0)])
        await nack(call, *await receive(call, 1, ack=False))
        dead = await bus.open("frail.dead", group="repair")
        for attempt in range(1, 5):
            (letter,) = await receive(dead, 1, ack=False)
            assert attempt == letter.attempt
            await nack(dead, letter, delay_s=0.0)

    async def test_credit_bounds_what_is_under_way(self, bus):
        """No more than the credit is delivered, whatever is acknowledged; each grant brings exactly that many."""
        await bus.publish("decisions", [make_event(n) for n in range(20)])
        call = await bus.open("decisions", group="g", credit=3)
        await receive(call, 3)
        reading = asyncio.create_task(call.read())
        await asyncio.sleep(0.2)
        assert not reading.done()
        await grant(call, 2)
        assert 2 >= len((await reading).deliveries.deliveries) > 0

    async def test_reader_without_group_sees_everything_and_keeps_nothing(self, bus):
        """Two readers see all events with attempt 0; their acks and nacks change nothing."""
        await bus.publish("decisions", [make_event(n) for n in range(10)])
        for _ in range(2):
            call = await bus.open("decisions", credit=100)
            assert [0, 1, 2, 3] == call.partitions
            found = await receive(call, 10)
            await nack(call, found[0])
            assert {0} == {d.attempt for d in found}
            assert len({d.delivery_id for d in found}) == 10
            call.cancel()
        assert 0 == len((await bus.topic("decisions")).groups)

    @pytest.mark.parametrize("group", ["", "g"])
    async def test_starts(self, bus, group):
        """EARLIEST, LATEST, LAST and TIME begin where the contract says, with and without a group."""
        await bus.make("line", partitions=1)
        for n in range(5):
            await bus.publish("line", [make_event(n)])
        stored = [d.store_time for d in await receive(await bus.open("line"), 5, ack=False)]
        assert stored == sorted(stored, key=lambda t: t.ToNanoseconds())
        P = oona_service_pb2  # noqa: N806  # short for the table below
        table = [
            ({}, 0),
            ({"start": P.START_POSITION_EARLIEST}, 0),
            ({"start": P.START_POSITION_LATEST}, 5),
            ({"start": P.START_POSITION_LAST, "last": 2}, 3),
            ({"start": P.START_POSITION_LAST, "last": 99}, 0),
            ({"start": P.START_POSITION_TIME, "start_time": stored[2]}, 2),
        ]
        for number, (settings, _) in enumerate(table):
            settings["call"] = await bus.open("line", group=group and f"{group}{number}", **settings)
        await bus.publish("line", [make_event(5)])
        for settings, begin in table:
            found = await receive(settings["call"], 6 - begin)
            assert list(range(begin, 6)) == [int(d.event.payload) for d in found]

    @pytest.mark.parametrize("group", ["", "g"])
    async def test_large_events_come_in_messages_that_a_client_takes(self, bus, group):
        """Many events of the largest payload reach an ordinary client, each at its first attempt."""
        await bus.make("large", partitions=2)
        for n in range(10):
            await bus.publish("large", [make_event(n, key=f"k{n}", payload=bytes(1 << 20))])
        found = await receive(await bus.open("large", group=group), 10)
        assert {f"event-{n}" for n in range(10)} == {d.event.id for d in found}
        assert {1 if group else 0} == {d.attempt for d in found}

    async def test_time_without_a_time(self, bus):
        """TIME needs a moment."""
        for group in ("", "g"):
            error = await error_of(bus.open("decisions", group=group, start=oona_service_pb2.START_POSITION_TIME))
            assert "START_TIME_MISSING" == error.reason

    async def test_long_backlog_from_the_file(self, tmp_path):
        """A group and a reader far behind get everything in order, though little of it is in memory."""
        async with running(tmp_path, cache_bytes=1 << 16, partitions=1) as bus:
            for n in range(30):
                await bus.publish(
                    "decisions",
                    [make_event(n * 100 + i, key="k", payload=b"%d" % (n * 100 + i) + bytes(500)) for i in range(100)],
                )
            for group in ("g", ""):
                call = await bus.open("decisions", group=group, credit=10_000)
                found = await receive(call, 3000)
                assert [f"event-{n}" for n in range(3000)] == [d.event.id for d in found]

    async def test_drain_ends_streams(self, tmp_path):
        """At the drain a subscription ends with UNAVAILABLE, and the server does not wait for its client."""
        async with running(tmp_path) as bus:
            calls = [await bus.open("decisions", group=group) for group in ("g", "")]
            bus.drain.set()
            for call in calls:
                error = await error_of(call.read())
                assert (Unavailable, "DRAINING") == (type(error), error.reason)
            assert "DRAINING" == (await error_of(bus.open("decisions"))).reason

    async def test_group_survives_a_restart(self, tmp_path):
        """After a clean stop nothing that was acknowledged comes again, with no wait for positions to be saved."""
        async with running(tmp_path, position_interval_s=3600) as bus:
            await bus.publish("decisions", [make_event(n) for n in range(10)])
            call = await bus.open("decisions", group="g", credit=7)
            await receive(call, 7)
            await call.done_writing()
            await call.read()
        async with running(tmp_path) as bus:
            assert 3 == (await bus.topic("decisions")).groups[0].lag
            call = await bus.open("decisions", group="g")
            assert {1} == {d.attempt for d in await receive(call, 3)}

    async def test_retention_ahead_of_a_group(self, tmp_path):
        """A group that was too slow goes on at the oldest event kept, and what it missed is counted."""
        async with running(tmp_path, cache_bytes=1 << 16) as bus:
            await bus.make("short", partitions=1, retention_bytes=3000)
            call = await bus.open("short", group="g", credit=1)
            await call.done_writing()
            assert grpc.aio.EOF is await call.read()
            for n in range(100):
                await bus.publish("short", [make_event(n, payload=bytes(1000))])
            await bus.service.broker.log.sweep()
            first = (await bus.topic("short")).partition_statuses[0].first_offset
            assert 90 < first < 100
            for group, missed in (("g", first), ("late", 0)):
                call = await bus.open("short", group=group)
                assert list(range(first, 100)) == [d.position.offset for d in await receive(call, 100 - first)]
                assert missed == bus.service.broker.counters.expired_unread["short", group]

    async def test_number_of_groups_is_bounded(self, bus):
        """A client cannot fill a topic with groups."""
        bus.service.broker.options = replace(bus.service.broker.options, max_groups=1)
        await bus.open("decisions", group="one")
        assert "TOO_MANY_GROUPS" == (await error_of(bus.open("decisions", group="two"))).reason


class TestPolicy:
    """Who may call."""

    async def test_strangers_may_not(self, bus):
        """Every method refuses a caller without a known role, and every method has a policy."""
        methods = {m.name for m in oona_service_pb2.DESCRIPTOR.services_by_name["OonaService"].methods}
        assert {f"/esper.v1.OonaService/{name}" for name in methods} == set(bus.service.policy)
        async with channel_as(bus.server, Role.ANONYMOUS) as channel:
            error = await error_of(OonaServiceStub(channel).ListTopics(oona_service_pb2.ListTopicsRequest()))
            assert error.code.name in {"UNAUTHENTICATED", "PERMISSION_DENIED"}
