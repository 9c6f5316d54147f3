"""The conversation with the controller: one `Advise` stream in the background, one waiting question in the foreground.

The training thread calls `Advisor.ask` and waits at most its deadline. Everything else happens on the link's event
loop: opening the stream with the state that was last handed out, sending the question, and opening the stream again
when it broke or when an answer came too late. A late answer is thrown away together with the stream that bore it,
because the controller behind that stream now remembers an answer that the run never heard; the next stream begins
with what the run did hear.

The circuit: ``CONNECTING`` (an answer may still come: wait) -> ``READY`` -> ... -> ``AWAY`` (no answer is expected:
do not wait). A broken stream gets one attempt at once, in which a waiting question goes along; when that fails too,
or when too many answers in a row came too late, the controller is away and is probed with growing pauses until it
says ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from esper.kasmina.convert import advice_from_proto, boundary_state_to_proto, run_hello_to_proto
from esper.mesh.errors import Cancelled, DeadlineMissed, EsperError, Stale, Unavailable, from_rpc_error
from esper.mesh.logging import get_logger
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.control import Advice, BoundaryState, RunHello
    from esper.kasmina.link import LinkSettings

__all__ = ["Advisor", "Standing"]

_log = get_logger("esper.kasmina.link")
_TRANSIENT = (Unavailable, Cancelled, DeadlineMissed)
_INBOX = 16
_SLOW_SERVER = 4
_ENDED = "the stream of the controller ended"
_TAKEN_OVER = "RUN_TAKEN_OVER"


class Standing(StrEnum):
    """What the training thread may expect of the controller."""

    CONNECTING = "connecting"
    """A stream is being opened: an answer may come in time."""
    READY = "ready"
    """The controller said that it is ready."""
    AWAY = "away"
    """No answer is expected; probed in the background."""
    ENDED = "ended"
    """Another stream took this run over, or the link was closed: for good."""


class Question:
    """One boundary that waits for its advice; settled exactly once, by whichever thread comes first."""

    def __init__(self, state: BoundaryState, deadline_s: float) -> None:
        self.state = state
        self.deadline = time.monotonic() + deadline_s
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._advice: Advice | None = None

    def wait(self) -> Advice | None:
        """Training side: block until settled or the deadline; afterwards nothing can answer any more."""
        self._settled.wait(max(0.0, self.deadline - time.monotonic()))
        with self._lock:
            self._settled.set()
            return self._advice

    def answer(self, advice: Advice | None) -> bool:
        """Loop side: settle. False when the asker is gone, so that the answer was never heard."""
        with self._lock:
            if self._settled.is_set():
                return False
            self._advice = advice
            self._settled.set()
            return True

    @property
    def open(self) -> bool:
        """Whether an answer would still be heard."""
        return not self._settled.is_set() and time.monotonic() < self.deadline


class _Reopen(Exception):
    """This stream is of no more use although nothing is broken."""


class _Missed(Exception):
    """The answer did not come in time."""


class Advisor:
    """Both ends of the conversation of one run.

    Args:
        settings: patience and pauses.
        channel: gives the link's channel; called on the loop.
    """

    def __init__(self, settings: LinkSettings, channel: Callable[[], grpc.aio.Channel]) -> None:
        self._settings = settings
        self._channel = channel
        self._lock = threading.Lock()
        self._standing = Standing.CONNECTING
        self._hello: RunHello | None = None
        self._question: Question | None = None
        self._inbox: asyncio.Queue[object] | None = None
        self._opened = asyncio.Event()
        self._misses = 0
        self._strikes = 0
        self._failures = 0
        self._complaint = ""
        self._generation = 0

    @property
    def standing(self) -> Standing:
        """What may be expected now."""
        return self._standing

    # Training thread

    def ask(self, question: Question, submit: Callable[[Question], object]) -> Advice | None:
        """Hand a question over by `submit` and wait for its answer; None at once where none is expected."""
        if self._standing in {Standing.AWAY, Standing.ENDED}:
            return None
        submit(question)
        advice = question.wait()
        if advice is not None:
            with self._lock:
                if self._hello is not None:
                    self._hello = replace(self._hello, controller_state=advice.controller_state)
        return advice

    def introduce(self, hello: RunHello) -> None:
        """Set who the run is; a stream that is open begins again with it once `restart` runs on the loop."""
        with self._lock:
            self._hello = hello
        if self._standing is Standing.ENDED:
            self._standing = Standing.CONNECTING

    # Event loop

    def restart(self) -> None:
        """Open the stream, or open it again."""
        self._generation += 1
        self._opened.set()
        self._put(_Reopen())

    def submit(self, question: Question) -> None:
        """Take a question of the training thread."""
        self._question = question
        if self._standing in {Standing.AWAY, Standing.ENDED}:
            question.answer(None)
        else:
            self._put(question)

    def _put(self, item: object) -> None:
        if self._inbox is not None:
            with contextlib.suppress(asyncio.QueueFull):  # one question at a time: a full inbox is a dead stream's
                self._inbox.put_nowait(item)

    async def run(self) -> None:
        """Keep the conversation alive until cancelled."""
        try:
            while True:
                await self._opened.wait()
                await self._attempt()
        finally:
            self._become(Standing.ENDED)

    async def _attempt(self) -> None:
        try:
            await self._converse()
        except _Reopen:
            return
        except _Missed:
            self._misses += 1
            _log.warning("advice_missed", missed_in_a_row=self._misses)
            if self._misses < self._settings.misses_allowed:
                self._become(Standing.CONNECTING)
                return
            self._strikes += 1
            # A server that opens streams gladly and answers too late must not cost a deadline at every boundary.
            self._failures = _SLOW_SERVER + self._strikes
        except EsperError as error:
            if isinstance(error, Stale) and error.reason == _TAKEN_OVER:
                _log.error("run_taken_over", reason=error.reason, detail=error.public)
                self._opened.clear()
                self._become(Standing.ENDED)
                return
            self._failures += 1
            self._complain(error)
            if self._failures == 1 and isinstance(error, _TRANSIENT):
                # Most breaks are restarts and hand-overs: one attempt at once, while a question may still be answered.
                self._become(Standing.CONNECTING)
                return
        self._become(Standing.AWAY)
        await self._pause()

    async def _pause(self) -> None:
        settings = self._settings
        wait_s = min(settings.probe_max_s, settings.probe_initial_s * 2 ** min(self._failures - 1, 16))
        self._opened.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._opened.wait()  # a new hello is a reason to try at once
        self._opened.set()

    def _become(self, standing: Standing) -> None:
        if standing is not self._standing:
            _log.info("control_plane", standing=standing.value, before=self._standing.value)
        self._standing = standing
        if standing in {Standing.AWAY, Standing.ENDED} and self._question is not None:
            self._question.answer(None)

    def _complain(self, error: EsperError) -> None:
        text = f"{type(error).__name__} {error.reason}"
        if text != self._complaint:
            self._complaint = text
            _log.warning("control_plane_lost", reason=error.reason, detail=error.public)

    async def _converse(self) -> None:
        """One stream, until it breaks.

        Raises:
            EsperError: the stream ended or was refused.
            _Reopen, _Missed: see there.
        """
        with self._lock:
            hello = self._hello
        generation = self._generation
        assert hello is not None  # `restart` follows `introduce`
        stub = TamiyoServiceStub(self._channel())
        call: Any = stub.Advise()
        inbox: asyncio.Queue[object] = asyncio.Queue(_INBOX)
        reader: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await self._exchange(call, pb.AdviseRequest(hello=run_hello_to_proto(hello)))
            if generation != self._generation:
                raise _Reopen  # another hello was said meanwhile
            self._welcome()
            # Only now: a question that came earlier still stands in `_question`, and must not be asked twice.
            self._inbox = inbox
            reader = asyncio.create_task(_read(call, inbox))
            if self._question is not None and self._question.open:
                inbox.put_nowait(self._question)
            await self._answer_questions(call, inbox)
        except TimeoutError as error:
            limit = self._settings.connect_timeout_s
            raise DeadlineMissed(f"the controller did not say ready within {limit} s") from error
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.InvalidStateError as error:  # writing to a call that ended in that moment
            raise Unavailable(_ENDED) from error
        finally:
            self._inbox = None
            call.cancel()
            if reader is not None:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _exchange(self, call: Any, request: pb.AdviseRequest) -> None:
        await call.write(request)
        answer = await call.read()
        if answer is grpc.aio.EOF:
            raise Unavailable(_ENDED)
        if answer.WhichOneof("kind") != "ready":
            raise Unavailable(f"expected `ready` of the controller first, found {answer.WhichOneof('kind')}")
        _log.info("controller_ready", policy=answer.ready.policy, version=answer.ready.policy_version)

    def _welcome(self) -> None:
        # Half open after missed answers: one more miss and it is away again, one answer and it is whole.
        self._misses = min(self._misses, self._settings.misses_allowed - 1)
        self._failures = 0
        self._complaint = ""
        self._become(Standing.READY)

    async def _answer_questions(self, call: Any, inbox: asyncio.Queue[object]) -> None:
        waiting: Question | None = None
        last = 0
        while True:
            item = await _next(inbox, waiting)
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Question):
                if waiting is not None:
                    raise _Missed  # its asker has gone on to the next boundary
                if item.state.boundary <= last:
                    raise _Reopen  # the run went back to a checkpoint
                waiting, last = item, item.state.boundary
                await call.write(pb.AdviseRequest(state=boundary_state_to_proto(item.state)))
            elif isinstance(item, pb.AdviseResponse) and item.WhichOneof("kind") == "advice":
                advice = advice_from_proto(item.advice)
                if waiting is None or advice.boundary != waiting.state.boundary:
                    continue
                if not waiting.answer(advice):
                    raise _Missed
                waiting, self._misses, self._strikes = None, 0, 0


async def _next(inbox: asyncio.Queue[object], waiting: Question | None) -> object:
    if waiting is None:
        return await inbox.get()
    try:
        async with asyncio.timeout(max(0.0, waiting.deadline - time.monotonic())):
            return await inbox.get()
    except TimeoutError:
        raise _Missed from None


async def _read(call: Any, inbox: asyncio.Queue[object]) -> None:
    """Put what the controller says, and at last why it ended, into the inbox."""
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            await inbox.put(message)
        await inbox.put(Unavailable(_ENDED))
    except grpc.RpcError as error:
        await inbox.put(from_rpc_error(error))
