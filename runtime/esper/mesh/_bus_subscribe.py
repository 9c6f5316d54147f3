"""The subscribing side of `esper.mesh.bus`."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self, cast

import grpc.aio

from esper.mesh.errors import Code, EsperError, from_rpc_error
from esper.mesh.logging import get_logger
from esper.v1 import event_pb2, oona_service_pb2, oona_service_pb2_grpc

__all__ = ["BusDelivery", "BusSubscriber"]

_log = get_logger("esper.mesh.bus")
_FATAL = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.PERMISSION_DENIED,
        Code.UNAUTHENTICATED,
        Code.UNIMPLEMENTED,
        Code.FAILED_PRECONDITION,
        Code.OUT_OF_RANGE,
    }
)
"""Codes that another attempt would meet again."""
_MAX_LAST = 10_000
_MOST = 10_000
"""Ids or credit in one message."""
_MAX_DELAY_S = 3600.0
_MAX_REASON = 1024
_LAST_WORDS_S = 1.0
"""Seconds for the server to end a stream after our side was closed."""
_MARGIN = 1_000
"""Events that may be published between asking for the ends and subscribing, before a second attempt is needed."""


@dataclass(slots=True, eq=False)
class BusDelivery:
    """One event to handle. In a group: answer it with `ack` or `nack`, once; later answers do nothing."""

    event: event_pb2.Event
    partition: int
    offset: int
    attempt: int
    """From 1; 0 without a group."""
    store_time: datetime
    """When the bus stored it, aware UTC."""
    _id: int
    _session: "_Session"
    _answered: bool = False

    def ack(self) -> None:
        """The event was handled."""
        if not self._answered:
            self._answered = True
            self._session.ack(self._id)

    def nack(self, reason: str = "", *, delay_s: float | None = None) -> None:
        """The event was not handled: deliver it again after `delay_s` (at most 3,600 s) or the server's backoff."""
        if not self._answered:
            self._answered = True
            self._session.nack(self._id, reason, delay_s)


class BusSubscriber:
    """Reads a topic, as a member of a group or on its own, for as long as it is iterated over.

    After a broken stream it subscribes again: a group goes on where its acknowledgements ended; without a group reading
    goes on after the last event seen, none lost and none twice. Answers to deliveries of a broken stream are void:
    those events come again.

    Args:
        channel: to the bus; stays open.
        topic: what to read.
        group: consumer group; empty to see every event and acknowledge none.
        member: name of this member, for people.
        start: where a new group, or a reader without one, begins; default EARLIEST.
        start_time: for TIME; aware.
        last: for LAST: newest events of each partition that come first.
        credit: deliveries under way at most.
        ack_timeout_s: seconds for an answer, 1 to 3,600; without one the event is delivered again.
        backoff_max_s: longest wait before connecting again, in seconds.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        topic: str,
        *,
        group: str = "",
        member: str = "",
        start: "oona_service_pb2.StartPosition.ValueType" = oona_service_pb2.START_POSITION_EARLIEST,
        start_time: datetime | None = None,
        last: int = 0,
        credit: int = 256,
        ack_timeout_s: float = 30.0,
        backoff_max_s: float = 2.0,
    ) -> None:
        self._stub = oona_service_pb2_grpc.OonaServiceStub(channel)
        self._open = oona_service_pb2.SubscribeOpen(
            topic=topic, group=group, member=member, start=start, last=last, credit=credit
        )
        self._open.ack_timeout.FromNanoseconds(int(ack_timeout_s * 1e9))
        if start_time is not None:
            self._open.start_time.FromDatetime(start_time)
        self._grouped = bool(group)
        self._backoff_max_s = backoff_max_s
        self._wanted: dict[int, int] | None = None
        self._closed = False
        self._session: _Session | None = None
        self._iteration: AsyncGenerator[BusDelivery, None] | None = None
        self._thorough = False
        self.reconnects = 0
        """Streams opened beyond the first."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.close()
        if self._iteration is not None:
            # A loop that was left by `break` holds its stream until now. One that runs in another task ends by `close`.
            with suppress(RuntimeError):
                await self._iteration.aclose()

    def close(self) -> None:
        """End the iteration; deliveries without an answer come again, to other members."""
        self._closed = True
        if self._session is not None:
            self._session.stop()

    def _ended(self) -> bool:
        return self._closed

    def __aiter__(self) -> AsyncIterator[BusDelivery]:
        self._iteration = self._deliveries()
        return self._iteration

    async def _deliveries(self) -> AsyncGenerator[BusDelivery, None]:
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                for delivery in batch:
                    yield delivery

    async def batches(self) -> AsyncGenerator[list[BusDelivery], None]:
        """Yield deliveries as they arrive together, in order within each partition.

        Raises:
            NotFound: TOPIC_NOT_FOUND.
            InvalidInput: an argument is out of its bounds.
            Forbidden: the caller may not subscribe.
        """
        attempt = 0
        while not self._ended():
            try:
                async with aclosing(self._stream()) as stream:
                    async for batch in stream:
                        attempt = 0
                        yield batch
                error: EsperError | None = None
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                if error.code in _FATAL and not self._ended():
                    raise error from failure
            except asyncio.CancelledError:
                # grpc raises it for a call that `close` cancelled, too.
                if _cancelling() or not self._ended():
                    raise
                return
            if self._ended():
                return
            self.reconnects += 1
            attempt += 1
            pause = min(self._backoff_max_s, 0.05 * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1)  # noqa: S311  # jitter
            _log.info(
                "subscription broken",
                topic=self._open.topic,
                reason=None if error is None else error.reason,
                attempt=attempt,
            )
            await asyncio.sleep(pause + (0.0 if error is None else error.retry_after_s or 0.0))

    async def _stream(self) -> AsyncGenerator[list[BusDelivery], None]:
        opening = await self._opening()
        session = self._session = _Session(cast("Any", self._stub.Subscribe()), grouped=self._grouped)
        try:
            await session.call.write(oona_service_pb2.SubscribeRequest(open=opening))
            while (response := await session.call.read()) is not grpc.aio.EOF:
                if response.WhichOneof("kind") == "opened":
                    session.start()
                    if self._ended():
                        session.stop()
                    if opening is not self._open and await self._gap(opening):
                        return
                    continue
                deliveries = response.deliveries.deliveries
                batch = [self._delivery(d, session) for d in deliveries if self._is_new(d.position)]
                session.passed(len(deliveries) - len(batch))
                if batch:
                    yield batch
                    session.passed(0 if self._grouped else len(batch))
        finally:
            await session.end()

    # --- reading without a group goes on where it was ---

    async def _opening(self) -> oona_service_pb2.SubscribeOpen:
        """What to open: as asked for at first and in a group; else as many of the newest events as may be missing."""
        if self._grouped or self._open.start == oona_service_pb2.START_POSITION_TIME:
            return self._open
        statuses = await self._statuses()
        if self._wanted is None:
            self._wanted = {s.partition: self._begin(s) for s in statuses}
            return self._open
        behind = max(s.next_offset - self._wanted.get(s.partition, 0) for s in statuses) + _MARGIN
        opening = oona_service_pb2.SubscribeOpen()
        opening.CopyFrom(self._open)
        if behind > _MAX_LAST or self._thorough:
            opening.start = oona_service_pb2.START_POSITION_EARLIEST
        else:
            opening.start = oona_service_pb2.START_POSITION_LAST
            opening.last = behind
        return opening

    async def _gap(self, opening: oona_service_pb2.SubscribeOpen) -> bool:
        """Whether so much was published around the opening that `last` events do not reach back to what is wanted."""
        self._thorough = False
        if opening.start != oona_service_pb2.START_POSITION_LAST or self._wanted is None:
            return False
        for status in await self._statuses():
            if status.next_offset - opening.last > self._wanted.get(status.partition, 0):
                self._thorough = True
        return self._thorough

    async def _statuses(self) -> Sequence[event_pb2.PartitionStatus]:
        answer = await self._stub.GetTopic(oona_service_pb2.GetTopicRequest(name=self._open.topic))
        return answer.topic.partition_statuses

    def _begin(self, status: event_pb2.PartitionStatus) -> int:
        if self._open.start == oona_service_pb2.START_POSITION_LATEST:
            return status.next_offset
        if self._open.start == oona_service_pb2.START_POSITION_LAST:
            return max(status.first_offset, status.next_offset - self._open.last)
        return status.first_offset

    def _is_new(self, position: oona_service_pb2.Position) -> bool:
        if self._grouped:
            return True
        if self._wanted is None:
            self._wanted = {}
        if position.offset < self._wanted.get(position.partition, 0):
            return False
        self._wanted[position.partition] = position.offset + 1
        return True

    @staticmethod
    def _delivery(delivery: oona_service_pb2.Delivery, session: "_Session") -> BusDelivery:
        return BusDelivery(
            delivery.event,
            delivery.position.partition,
            delivery.position.offset,
            delivery.attempt,
            delivery.store_time.ToDatetime(UTC),
            delivery.delivery_id,
            session,
        )


class _Session:
    """One stream: gathers answers and credit, and writes them from one task, because a stream has one writer."""

    def __init__(self, call: Any, *, grouped: bool) -> None:
        self.call = call
        self._grouped = grouped
        self._acks: list[int] = []
        self._nacks: list[tuple[int, str, float | None]] = []
        self._credit = 0
        self._news = asyncio.Event()
        self._stopping = False
        self._writing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write; the stream is open."""
        self._writing = asyncio.create_task(self._write_loop())

    def ack(self, delivery_id: int) -> None:
        """Handled: its place is free again."""
        self._acks.append(delivery_id)
        self.passed(1)

    def nack(self, delivery_id: int, reason: str, delay_s: float | None) -> None:
        """Not handled: its place is free again."""
        self._nacks.append((delivery_id, reason, delay_s))
        self.passed(1)

    def passed(self, count: int) -> None:
        """Grant credit for deliveries that are no longer under way."""
        if count:
            self._credit += count
            self._news.set()

    def stop(self) -> None:
        """Write what is left, then close our side; the server then ends the stream."""
        self._stopping = True
        self._news.set()

    async def end(self) -> None:
        """Stop, and wait a moment for the server to have heard the last answers."""
        if self._writing is not None:
            self.stop()
            with suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._writing
                    while not self.call.done() and await self.call.read() is not grpc.aio.EOF:
                        pass  # deliveries that were on their way come again
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        self.call.cancel()

    async def _write_loop(self) -> None:
        # A stream that broke says so when it is read; here there is nobody to tell.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._news.wait()
                self._news.clear()
                await self._write_answers()
                if self._stopping and not self._news.is_set():
                    await self.call.done_writing()
                    return

    async def _write_answers(self) -> None:
        acks, self._acks = self._acks, []
        nacks, self._nacks = self._nacks, []
        credit, self._credit = self._credit, 0
        for begin in range(0, len(acks), _MOST):
            await self.call.write(
                oona_service_pb2.SubscribeRequest(
                    ack=oona_service_pb2.SubscribeAck(delivery_ids=acks[begin : begin + _MOST])
                )
            )
        for (reason, delay_s), ids in _alike(nacks).items():
            nack = oona_service_pb2.SubscribeNack(delivery_ids=ids, reason=reason)
            if delay_s is not None:
                # Beyond the contract's bounds the server would end the stream, and all other answers with it.
                nack.delay.FromNanoseconds(int(min(max(delay_s, 0.0), _MAX_DELAY_S) * 1e9))
            await self.call.write(oona_service_pb2.SubscribeRequest(nack=nack))
        while credit:
            part = min(credit, _MOST)
            credit -= part
            await self.call.write(
                oona_service_pb2.SubscribeRequest(credit=oona_service_pb2.SubscribeCredit(credit=part))
            )


def _alike(nacks: list[tuple[int, str, float | None]]) -> dict[tuple[str, float | None], list[int]]:
    together: dict[tuple[str, float | None], list[int]] = {}
    for delivery_id, reason, delay_s in nacks:
        together.setdefault((reason[:_MAX_REASON], delay_s), []).append(delivery_id)
    return together


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
