"""`OonaService`: convert, call the broker, convert."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

from esper.mesh.errors import EsperError, InvalidInput, Unavailable
from esper.mesh.streams import race_drain
from esper.oona.broker import Broker
from esper.oona.convert import (
    answer_to_proto,
    deliveries_to_proto,
    event_from_proto,
    failure_to_proto,
    seconds,
    start_from_proto,
    topic_from_proto,
    topic_to_proto,
)
from esper.oona.records import DEAD_SUFFIX, Appended, TopicSpec
from esper.oona.subscriptions import Subscription
from esper.v1 import event_pb2, oona_service_pb2, oona_service_pb2_grpc

__all__ = ["OonaServicer"]

_DEFAULT_CREDIT = 256
_DEFAULT_ACK_TIMEOUT_S = 30.0
_DEFAULT_PAGE = 100
_UNANSWERED = 64
"""Batches of one stream that may await their answer; it is not read beyond them, so gRPC holds the client back."""

_Answer = tuple[int, "asyncio.Future[Appended]"]


class _Answers:
    """Batches of one stream that await their answer, between the task that reads and the one that writes.

    Bounded: `room` waits. Ending never waits, so that it works in the middle of a cancellation.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Answer] = deque()
        self._free = asyncio.Semaphore(_UNANSWERED)
        self._news = asyncio.Event()
        self._ended = False

    async def room(self) -> None:
        """Wait for a place; `add` takes it."""
        await self._free.acquire()

    def add(self, number: int, future: "asyncio.Future[Appended]") -> None:
        """A batch that was accepted."""
        self._waiting.append((number, future))
        self._news.set()

    def end(self) -> None:
        """No further batch follows."""
        self._ended = True
        self._news.set()

    async def next(self) -> _Answer | None:
        """The oldest batch; None when all are answered and none follows."""
        while not self._waiting:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        self._free.release()
        return self._waiting.popleft()

    def abandon(self) -> None:
        """Nobody is there to hear the rest; what was accepted is stored all the same."""
        for _, future in self._waiting:
            future.cancel()


class OonaServicer(oona_service_pb2_grpc.OonaServiceServicer):
    """Answers the RPCs of the bus.

    Args:
        broker: the bus.
        drain: set when the server drains.
        partitions: of topics that do not say how many.
        max_attempts: of topics that do not say how many.
        clock: aware UTC time.
    """

    def __init__(
        self,
        broker: Broker,
        drain: asyncio.Event,
        *,
        partitions: int,
        max_attempts: int,
        clock: Callable[[], datetime],
    ) -> None:
        self._broker = broker
        self._drain = drain
        self._partitions = partitions
        self._max_attempts = max_attempts
        self._clock = clock

    async def CreateTopic(  # the contract's name
        self,
        request: oona_service_pb2.CreateTopicRequest,
        context: Any,  # gRPC passes it
    ) -> oona_service_pb2.CreateTopicResponse:
        """Make a topic."""
        spec = topic_from_proto(
            request.topic, partitions=self._partitions, max_attempts=self._max_attempts, now=self._clock()
        )
        return oona_service_pb2.CreateTopicResponse(topic=self._topic(await self._broker.create_topic(spec)))

    async def GetTopic(  # the contract's name
        self,
        request: oona_service_pb2.GetTopicRequest,
        context: Any,  # gRPC passes it
    ) -> oona_service_pb2.GetTopicResponse:
        """Show a topic."""
        return oona_service_pb2.GetTopicResponse(topic=self._topic(self._broker.topic(request.name)))

    async def ListTopics(  # the contract's name
        self,
        request: oona_service_pb2.ListTopicsRequest,
        context: Any,  # gRPC passes it
    ) -> oona_service_pb2.ListTopicsResponse:
        """Show topics by name; a page token is the last name of the page before."""
        size = request.page_size or _DEFAULT_PAGE
        names = sorted(name for name in self._broker.topics() if name > request.page_token)
        page = names[:size]
        return oona_service_pb2.ListTopicsResponse(
            topics=[self._topic(self._broker.topic(name)) for name in page],
            next_page_token=page[-1] if len(names) > size else "",
        )

    async def Publish(  # the contract's name
        self,
        request_iterator: AsyncIterator[oona_service_pb2.PublishRequest],
        context: Any,  # gRPC passes it
    ) -> AsyncIterator[oona_service_pb2.PublishResponse]:
        """Store batches; answer in order."""
        answers = _Answers()
        reading = asyncio.create_task(self._read_batches(request_iterator, answers))
        try:
            while (answer := await answers.next()) is not None:
                number, future = answer
                try:
                    appended = await future
                except EsperError as error:
                    yield failure_to_proto(number, error)
                else:
                    yield answer_to_proto(number, appended)
            await reading  # raises what ended the requests
            if self._drain.is_set():
                raise _draining()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            answers.abandon()

    async def _read_batches(
        self, requests: AsyncIterator[oona_service_pb2.PublishRequest], answers: "_Answers"
    ) -> None:
        try:
            async for request in race_drain(requests, self._drain):
                await answers.room()
                answers.add(request.batch, self._append(request))
                await self._broker.room()
        finally:
            answers.end()

    def _append(self, request: oona_service_pb2.PublishRequest) -> "asyncio.Future[Appended]":
        if request.topic.endswith(DEAD_SUFFIX):
            refused: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
            refused.set_exception(
                InvalidInput(
                    f"topic {request.topic} is a dead-letter topic: expected another; the server fills these by itself",
                    reason="TOPIC_RESERVED",
                )
            )
            return refused
        return self._broker.append(request.topic, [event_from_proto(event) for event in request.events])

    async def Subscribe(  # the contract's name
        self,
        request_iterator: AsyncIterator[oona_service_pb2.SubscribeRequest],
        context: Any,  # gRPC passes it
    ) -> AsyncIterator[oona_service_pb2.SubscribeResponse]:
        """Deliver events."""
        requests = race_drain(request_iterator, self._drain)
        subscription = await self._open(requests)
        listening = asyncio.create_task(self._listen(requests, subscription))
        try:
            yield oona_service_pb2.SubscribeResponse(
                opened=oona_service_pb2.SubscribeOpened(partitions=subscription.partitions)
            )
            while batch := await subscription.next_batch():
                yield deliveries_to_proto(batch)
            await listening  # raises what ended the requests
            if self._drain.is_set():
                raise _draining()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            subscription.close()

    async def _open(self, requests: AsyncIterator[oona_service_pb2.SubscribeRequest]) -> Subscription:
        first = await anext(requests, None)
        if first is None and self._drain.is_set():
            raise _draining()
        if first is None or first.WhichOneof("kind") != "open":
            raise InvalidInput(
                f"first message of Subscribe: expected `open`, found {first and first.WhichOneof('kind')}",
                reason="OPEN_MISSING",
            )
        opened = first.open
        return await self._broker.subscribe(
            opened.topic,
            opened.group,
            member=opened.member,
            start=start_from_proto(opened),
            credit=opened.credit or _DEFAULT_CREDIT,
            ack_timeout_s=seconds(opened.ack_timeout) if opened.HasField("ack_timeout") else _DEFAULT_ACK_TIMEOUT_S,
        )

    @staticmethod
    async def _listen(requests: AsyncIterator[oona_service_pb2.SubscribeRequest], subscription: Subscription) -> None:
        try:
            async for request in requests:
                kind = request.WhichOneof("kind")
                if kind == "ack":
                    subscription.ack(request.ack.delivery_ids)
                elif kind == "credit":
                    subscription.credit(request.credit.credit)
                elif kind == "nack":
                    nack = request.nack
                    delay_s = seconds(nack.delay) if nack.HasField("delay") else None
                    subscription.nack(nack.delivery_ids, reason=nack.reason, delay_s=delay_s)
                else:
                    raise InvalidInput("`open` may only be the first message of Subscribe", reason="OPEN_REPEATED")
        finally:
            subscription.end()

    def _topic(self, spec: TopicSpec) -> event_pb2.Topic:
        name = spec.name
        return topic_to_proto(spec, self._broker.extents(name), self._broker.group_readings(name))


def _draining() -> Unavailable:
    return Unavailable("the server is draining: connect again", reason="DRAINING", retry_after_s=0.5)
