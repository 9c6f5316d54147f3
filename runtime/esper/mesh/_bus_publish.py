"""The publishing side of `esper.mesh.bus`."""

import asyncio
import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any, Self, cast

import grpc.aio
import protovalidate

from esper.mesh import context as ambient
from esper.mesh._bus_lanes import Batch, Entry, Lane, size_of
from esper.mesh._bus_terms import (
    MAX_PAYLOAD,
    PublisherOptions,
    PublisherStats,
    StoredAt,
    buffer_full,
    bus_closed,
    event_shed,
    payload_too_large,
)
from esper.mesh.errors import Code, EsperError, Unavailable, error_class, from_rpc_error
from esper.mesh.logging import get_logger
from esper.v1 import event_pb2, oona_service_pb2, oona_service_pb2_grpc

__all__ = ["BusPublisher"]

_log = get_logger("esper.mesh.bus")
_REMEMBER_S = 600.0
"""Seconds for which a server's bound on messages is believed: it may be another server by then."""
_HOPELESS = frozenset({Code.INVALID_ARGUMENT, Code.OUT_OF_RANGE})
"""Codes by which the server says that a message of ours can never be taken."""


class BusPublisher:
    """Publishes events in the background.

    Events of one topic keep the order in which they were offered (LOW events and others: each among themselves), also
    through broken streams. An event is taken or refused at once; what was taken is sent until the bus stores it or
    refuses it for good, except LOW events, which are shed oldest first when room is short.

    Args:
        channel: to the bus; stays open.
        options: bounds and times.
    """

    def __init__(self, channel: grpc.aio.Channel, options: PublisherOptions | None = None) -> None:
        self.options = PublisherOptions() if options is None else options
        self._stub = oona_service_pb2_grpc.OonaServiceStub(channel)
        self._lanes: dict[tuple[str, bool], Lane] = {}
        self._lock = threading.Lock()
        self._stats = PublisherStats()
        self._events = 0
        self._bytes = 0
        self._numbers = 0
        self._limit = 0
        self._limit_until = 0.0
        self._suspects: set[Batch] = set()
        """Batches of which one was too large for the server: they are sent one at a time until it is known which."""
        self._signalled = False
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._warned: set[str] = set()

    def start(self) -> None:
        """Begin to send, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._task = ambient.spawn(self._run(), name="bus-publisher")
        self._wake.set()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    # --- any thread ---

    def offer(self, topic: str, event: event_pb2.Event) -> bool:
        """Hand an event over; never blocks, from any thread. An event without an id gets one.

        The event belongs to the publisher from now on and must not be changed.

        Returns:
            False when it was refused: no room, a payload above 1 MiB, or the publisher is closed.
        """
        return self._take(topic, event, None) is None

    def publish(self, topic: str, event: event_pb2.Event) -> None:
        """As `offer`, but a refusal is an error.

        Raises:
            LimitExceeded: BUS_BUFFER_FULL.
            InvalidInput: PAYLOAD_TOO_LARGE.
            Unavailable: BUS_CLOSED.
        """
        refusal = self._take(topic, event, None)
        if refusal is not None:
            raise refusal()

    @property
    def stats(self) -> PublisherStats:
        """A copy of the counts."""
        with self._lock:
            return PublisherStats(**{f.name: getattr(self._stats, f.name) for f in fields(PublisherStats)})

    def _take(
        self, topic: str, event: event_pb2.Event, future: "asyncio.Future[StoredAt] | None"
    ) -> Callable[[], EsperError] | None:
        """Queue the event, or say (cheaply) how the refusal would be worded."""
        if not event.id:
            event.id = uuid.uuid4().hex
        size, payload = size_of(event), len(event.payload)
        low = event.priority == event_pb2.PRIORITY_LOW
        options, stats = self.options, self._stats
        with self._lock:
            stats.offered += 1
            if self._closed:
                stats.refused += 1
                return bus_closed
            if payload > MAX_PAYLOAD:
                stats.refused += 1
                return lambda: payload_too_large(topic, payload)
            if not low and (self._events >= options.max_events or self._bytes + size > options.max_bytes):
                stats.refused += 1
                return lambda: buffer_full(topic, options)
            lane = self._lanes.get((topic, low))
            if lane is None:
                lane = self._lanes[topic, low] = Lane(topic, low)
            if low:
                while lane.waiting and (
                    len(lane.waiting) >= options.max_low_events or lane.size + size > options.max_low_bytes
                ):
                    self._drop(lane)
            else:
                self._events += 1
                self._bytes += size
            lane.waiting.append(Entry(event, size, future))
            lane.size += size
            signal, self._signalled = not self._signalled, True
        if signal and self._loop is not None:
            # Once per wake-up, not per event: it costs a system call. A closed loop has nobody to wake.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake.set)
        return None

    def _drop(self, lane: Lane) -> None:
        oldest = lane.waiting.popleft()
        lane.size -= oldest.size
        self._stats.shed += 1
        if oldest.future is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(_refuse, oldest.future, event_shed(lane.topic))

    # --- the loop's thread ---

    async def send(self, topic: str, event: event_pb2.Event) -> StoredAt:
        """Publish an event and wait until the bus has stored it.

        Raises:
            LimitExceeded: BUS_BUFFER_FULL, or SHED for a LOW event.
            NotFound: TOPIC_NOT_FOUND.
            InvalidInput: the event breaks a bound.
            Unavailable: BUS_CLOSED, before it was stored.
        """
        future: asyncio.Future[StoredAt] = asyncio.get_running_loop().create_future()
        refusal = self._take(topic, event, future)
        if refusal is not None:
            raise refusal()
        return await future

    async def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits; False when that took longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._busy():
                    self._idle.clear()
                    self._wake.set()
                    await self._idle.wait()
        return not self._busy()

    async def close(self, timeout_s: float = 5.0) -> PublisherStats:
        """Take nothing more, send what waits for at most `timeout_s`, stop; return the final counts."""
        with self._lock:
            self._closed = True
        if self._task is not None:
            await self.flush(timeout_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for lane in self._lanes.values():
            left = [*(lane.batch.entries if lane.batch else ()), *lane.waiting]
            self._finish(lane, left, error=bus_closed())
            lane.batch = None
            with self._lock:
                self._stats.lost += len(left)
                lane.waiting.clear()
        if self._stats.lost:
            _log.warning("events not published", count=self._stats.lost)
        return self.stats

    def _busy(self) -> bool:
        with self._lock:
            return any(lane.waiting or lane.batch for lane in self._lanes.values())

    async def _run(self) -> None:
        attempt = 0
        while True:
            await self._wait()
            if not self._busy():
                continue
            stored = self._stats.stored
            try:
                await self._session()
            except Exception as failure:  # noqa: BLE001  # a publisher that died would drop all that comes, and say nothing
                error = self._understood(failure)
                self._broken(error)
                attempt = 0 if self._stats.stored > stored else attempt + 1
                _log.info("publish stream broken", code=error.code.name, reason=error.reason, attempt=attempt)
                await asyncio.sleep(self._backoff(attempt, error))

    def _understood(self, failure: Exception) -> EsperError:
        """What broke a stream, as one of our errors."""
        if isinstance(failure, grpc.aio.AioRpcError):
            return from_rpc_error(failure)
        what = f"{type(failure).__name__}: {failure}"
        if self._first(what):
            _log.warning("publisher cannot send; it goes on trying", error=what, exc_info=failure)
        return Unavailable("the publisher cannot send", reason="PUBLISHER_FAILED", private=what)

    def _backoff(self, attempt: int, error: EsperError) -> float:
        longest = min(self.options.backoff_max_s, self.options.backoff_s * 2.0 ** min(attempt, 16))
        return (error.retry_after_s or 0.0) + longest * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, no secret

    async def _wait(self) -> None:
        await self._wake.wait()
        self._wake.clear()
        with self._lock:
            self._signalled = False

    async def _session(self) -> None:
        """One stream: send batches until it breaks."""
        call = cast("Any", self._stub.Publish())
        reading = asyncio.create_task(self._read(call))
        reading.add_done_callback(lambda _done: self._wake.set())
        try:
            while not reading.done():
                if self._fresh():
                    await asyncio.sleep(self.options.linger_s)
                now = time.monotonic()
                for lane in list(self._lanes.values()):
                    batch = self._ready(lane, now)
                    if batch is not None:
                        await self._write(call, lane, batch)
                await self._wait_or_retry(now)
            await reading  # raises what ended the stream
            raise _ended(await call.code(), await call.details())
        finally:
            reading.cancel()
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _fresh(self) -> bool:
        """Whether waiting for company makes sense: something waits, and no batch is full yet."""
        lanes = list(self._lanes.values())
        most, size = self.options.batch_events, self._most_bytes()
        full = any(len(lane.waiting) >= most or lane.size >= size for lane in lanes)
        return not full and any(lane.waiting and lane.batch is None for lane in lanes)

    def _ready(self, lane: Lane, now: float) -> Batch | None:
        """The batch that a lane has to send now, if any."""
        if not self._may_go(lane):
            return None
        if lane.batch is not None:
            return None if lane.batch.written or lane.not_before > now else lane.batch
        with self._lock:
            entries = lane.fill(self.options.batch_events, self._most_bytes())
        if not entries:
            return None
        self._numbers += 1
        lane.batch = Batch(self._numbers, entries)
        return lane.batch

    def _may_go(self, lane: Lane) -> bool:
        return not self._suspects or (lane.batch in self._suspects and not self._under_way())

    def _most_bytes(self) -> int:
        most = self.options.batch_bytes
        return min(most, self._limit) if time.monotonic() < self._limit_until else most

    def _under_way(self) -> list[tuple[Lane, Batch]]:
        """What was written and not answered."""
        return [(lane, lane.batch) for lane in self._lanes.values() if lane.batch is not None and lane.batch.written]

    async def _write(self, call: Any, lane: Lane, batch: Batch) -> None:
        batch.written = True
        # A stream that broke says so when it is read.
        with suppress(asyncio.InvalidStateError):
            await call.write(lane.request(batch))

    async def _wait_or_retry(self, now: float) -> None:
        lanes = [lane for lane in self._lanes.values() if lane.batch and not lane.batch.written]
        due = [lane.not_before for lane in lanes if self._may_go(lane)]
        if not due:
            await self._wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(due) - now)):
                await self._wait()

    async def _read(self, call: Any) -> None:
        async for answer in call:
            for lane in list(self._lanes.values()):
                if lane.batch is not None and lane.batch.number == answer.batch:
                    self._answered(lane, lane.batch, answer)
            self._wake.set()
            if not self._busy():
                self._idle.set()

    def _answered(self, lane: Lane, batch: Batch, answer: oona_service_pb2.PublishResponse) -> None:
        self._suspects.discard(batch)
        if not answer.HasField("error"):
            lane.batch = None
            places = [StoredAt(p.partition, p.offset) for p in answer.positions]
            self._finish(lane, batch.entries, places=places)
            return
        refusal = answer.error
        if refusal.HasField("retry_delay") or refusal.code == Code.UNAVAILABLE:
            batch.written = False
            lane.not_before = time.monotonic() + max(refusal.retry_delay.ToNanoseconds() / 1e9, self.options.backoff_s)
            self._stats.resent += len(batch.entries)
            self._warn(f"{lane.topic}: {refusal.reason}", refusal.message)
            return
        lane.batch = None
        error = error_class(refusal.code)(refusal.message, reason=refusal.reason or None)
        self._give_up(lane, batch.entries, error)

    def _broken(self, error: EsperError) -> None:
        """Have what was not answered sent again on the next stream, except what broke it."""
        under_way = self._under_way()
        too_large = self._too_large(under_way, error) if error.reason == "MESSAGE_TOO_LARGE" else []
        for lane, batch in under_way:
            batch.written = False
            if batch in too_large:
                self._shrink(lane, batch, error)
            elif error.code in _HOPELESS:
                self._sort_out(lane, batch, error)
            self._stats.resent += len(batch.entries)
            if not batch.entries:
                self._suspects.discard(batch)
                lane.batch = None
        if not self._busy():
            self._idle.set()
        self._wake.set()

    def _too_large(self, under_way: list[tuple[Lane, Batch]], error: EsperError) -> list[Batch]:
        """Which batches the server would not take; those of which one is to blame become suspects."""
        limit = error.metadata.get("max_message_bytes", "")
        if limit.isdecimal():
            self._limit, self._limit_until = int(limit), time.monotonic() + _REMEMBER_S
            if found := [batch for lane, batch in under_way if lane.request(batch).ByteSize() > self._limit]:
                return found
        if len(under_way) > 1:
            self._suspects.update(batch for _, batch in under_way)
            return []
        return [batch for _, batch in under_way]

    def _shrink(self, lane: Lane, batch: Batch, error: EsperError) -> None:
        """Send less of a batch at a time; give up an event that is too large by itself."""
        if len(batch.entries) == 1:
            self._give_up(lane, batch.entries, error)
            batch.entries = []
        else:
            with self._lock:
                lane.split(batch, self._most_bytes())

    def _sort_out(self, lane: Lane, batch: Batch, error: EsperError) -> None:
        """Give up the events that break a bound of the contract."""
        bad = [entry for entry in batch.entries if _violations(lane.topic, entry.event)]
        if not bad and error.reason != "VALIDATION_FAILED":
            bad = batch.entries  # none breaks a bound, yet the server will not have them: it would refuse them for ever
        self._give_up(lane, bad, error)
        given_up = {id(entry) for entry in bad}
        batch.entries = [entry for entry in batch.entries if id(entry) not in given_up]

    def _give_up(self, lane: Lane, entries: list[Entry], error: EsperError) -> None:
        if not entries:
            return
        with self._lock:  # another thread may shed at this moment
            if error.reason == "SHED":
                self._stats.shed += len(entries)
            else:
                self._stats.rejected += len(entries)
        if error.reason != "SHED":
            self._warn(f"{lane.topic}: {error.reason}", error.public)
        self._finish(lane, entries, error=error)

    def _finish(
        self,
        lane: Lane,
        entries: list[Entry],
        *,
        places: list[StoredAt] | None = None,
        error: EsperError | None = None,
    ) -> None:
        with self._lock:
            if not lane.low:
                self._events -= len(entries)
                self._bytes -= sum(entry.size for entry in entries)
            if error is None:
                self._stats.stored += len(entries)
        for number, entry in enumerate(entries):
            if entry.future is None or entry.future.done():
                continue
            if error is not None:
                entry.future.set_exception(error)
            elif places is not None:
                entry.future.set_result(places[number])

    def _warn(self, what: str, message: str) -> None:
        if self._first(what):
            _log.warning("bus refuses events", what=what, message=message)

    def _first(self, what: str) -> bool:
        """Whether this is to be logged: each kind of trouble once; a full disk would write a line per batch."""
        if what in self._warned or len(self._warned) >= 256:
            return False
        self._warned.add(what)
        return True


def _violations(topic: str, event: event_pb2.Event) -> bool:
    request = oona_service_pb2.PublishRequest(topic=topic, events=[event])
    return bool(protovalidate.collect_violations(request))


def _refuse(future: "asyncio.Future[StoredAt]", error: EsperError) -> None:
    if not future.done():
        future.set_exception(error)


def _ended(code: Any, details: Any) -> grpc.aio.AioRpcError:
    """A stream that the server ended without an error is as broken as any other."""
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE if code is grpc.StatusCode.OK else code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(),
        details or "the server ended the stream",
    )
