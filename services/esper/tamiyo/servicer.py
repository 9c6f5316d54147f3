"""The RPCs of the controller: convert, ask the core, convert."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from esper.kasmina.convert import advice_to_proto, boundary_state_from_proto, run_hello_from_proto
from esper.mesh.bus import new_event
from esper.mesh.context import spawn, time_remaining
from esper.mesh.errors import EsperError, InvalidInput, Stale, Unavailable
from esper.mesh.logging import get_logger
from esper.mesh.streams import race_drain
from esper.tamiyo.controller import Conversation
from esper.tamiyo.convert import recorded_to_proto
from esper.tamiyo.shield import growable
from esper.tamiyo.store import Entry
from esper.v1 import event_pb2, policy_pb2
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime

    from esper.kasmina.control import Advice, RunHello
    from esper.mesh.bus import BusPublisher
    from esper.tamiyo.domain import Policy, Shelf
    from esper.tamiyo.library import LibraryView
    from esper.tamiyo.rules import Rules
    from esper.tamiyo.store import DecisionStore

__all__ = ["TamiyoServicer"]

_log = get_logger("esper.tamiyo")
_PAGE = 100
_MAX_LISTED = 4096
_MARGIN_S = 0.5
DESCRIPTION = (
    "Grows the narrowest, most saturated site first, early, and keeps what pays: germinates when a width is used up "
    "or the validation loss is on a plateau, at most one kernel a boundary, never in the last decay; keeps a seed when "
    "the lower confidence bound of its counterfactual gain exceeds the price of its parameters and FLOPs after about "
    "two epochs."
)


class TamiyoServicer(TamiyoServiceServicer):
    """See the contract.

    Args:
        policy: who proposes.
        rules: numbers of policy and shield.
        view: of the library.
        store: of decisions given.
        drain: set when the server drains.
        clock: aware UTC time.
        publisher: gives the bus's publisher; None while there is none.
        wait_s: time that PrepareRun gives an empty library.
    """

    def __init__(
        self,
        policy: Policy,
        rules: Rules,
        *,
        view: LibraryView,
        store: DecisionStore,
        drain: asyncio.Event,
        clock: Callable[[], datetime],
        publisher: Callable[[], BusPublisher | None],
        wait_s: float,
    ) -> None:
        self._policy = policy
        self._rules = rules
        self._view = view
        self._store = store
        self._drain = drain
        self._clock = clock
        self._publisher = publisher
        self._wait_s = wait_s
        self._open: dict[str, asyncio.Event] = {}
        self._requests: set[asyncio.Task[None]] = set()

    async def Advise(  # the contract's name
        self, request_iterator: AsyncIterator[pb.AdviseRequest], context: Any
    ) -> AsyncIterator[pb.AdviseResponse]:
        """Advise one run."""
        taken = asyncio.Event()
        run_id = ""
        talk: Conversation | None = None
        shelf: _CachedShelf | None = None
        requests = race_drain(race_drain(request_iterator, self._drain), taken)
        try:
            async with contextlib.aclosing(requests):
                async for request in requests:
                    kind = request.WhichOneof("kind")
                    if talk is None or shelf is None:
                        if kind != "hello":
                            raise _order("hello first", kind)
                        talk = Conversation(run_hello_from_proto(request.hello), self._policy, self._rules)
                        shelf = _CachedShelf(self._view, talk.hello)
                        run_id = talk.hello.run_id
                        self._take_over(run_id, taken)
                        self._ask_for_builds(talk.hello)
                        yield pb.AdviseResponse(
                            ready=pb.AdviseReady(policy=self._policy.name, policy_version=self._policy.version)
                        )
                        continue
                    if kind != "state":
                        raise _order("a state after the hello", kind)
                    advice = talk.advise(boundary_state_from_proto(request.state), shelf.now())
                    yield pb.AdviseResponse(advice=advice_to_proto(advice))
                    self._keep(run_id, advice)
            if taken.is_set():
                raise Stale(
                    f"run {run_id}: a newer stream of it was opened",
                    reason="RUN_TAKEN_OVER",
                    metadata={"run_id": run_id},
                )
            if self._drain.is_set():
                raise Unavailable(
                    "the controller drains: open another stream with the last controller_state", reason="DRAINING"
                )
        finally:
            if self._open.get(run_id) is taken:
                del self._open[run_id]

    async def PrepareRun(self, request: pb.PrepareRunRequest, context: Any) -> pb.PrepareRunResponse:
        """Ask for builds; tell what is there and what is to come."""
        hello = run_hello_from_proto(request.hello)
        left = time_remaining()
        patience = self._wait_s if left is None else min(self._wait_s, max(0.0, left - _MARGIN_S))
        if not await self._view.blueprints_within(patience):
            raise Unavailable(
                "the library holds no blueprint yet: expected the forge to submit its own when it starts",
                reason="LIBRARY_EMPTY",
                retry_after_s=1.0,
            )
        prepared = await self._view.prepare(hello)
        kernels = growable(hello, _CachedShelf(self._view, hello).now())
        return pb.PrepareRunResponse(kernel_ids=kernels[:_MAX_LISTED], pending=prepared.pending, failed=prepared.failed)

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        """The policy in force."""
        policy = policy_pb2.Policy(name=self._policy.name, version=self._policy.version, description=DESCRIPTION)
        policy.parameters.update(self._rules.model_dump())
        return pb.GetPolicyResponse(policy=policy)

    async def ListDecisions(self, request: pb.ListDecisionsRequest, context: Any) -> pb.ListDecisionsResponse:
        """Decisions given to a run, newest first."""
        page = await self._store.page(request.run_id, request.page_size or _PAGE, request.page_token)
        return pb.ListDecisionsResponse(
            decisions=[pb.RecordedDecision.FromString(entry.decision) for entry in page.entries],
            next_page_token=page.next_token,
        )

    async def close(self) -> None:
        """Give up requests for builds that are under way."""
        for task in self._requests:
            task.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)

    def _take_over(self, run_id: str, taken: asyncio.Event) -> None:
        if (older := self._open.get(run_id)) is not None:
            _log.info("run_taken_over", run_id=run_id)
            older.set()
        self._open[run_id] = taken

    def _ask_for_builds(self, hello: RunHello) -> None:
        """In the background: `ready` must not wait for the library."""
        task = spawn(self._request_builds(hello), name=f"builds-{hello.run_id}")
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _request_builds(self, hello: RunHello) -> None:
        try:
            if await self._view.blueprints_within(self._wait_s):
                await self._view.prepare(hello)
        except EsperError as error:
            _log.warning("builds_not_requested", run_id=hello.run_id, reason=error.reason, detail=error.public)

    def _keep(self, run_id: str, advice: Advice) -> None:
        policy = f"{self._policy.name}/{self._policy.version}"
        now = self._clock()
        publisher = self._publisher()
        for decision in advice.decisions:
            encoded = recorded_to_proto(decision, policy, now).SerializeToString()
            self._store.keep(
                Entry(run_id=run_id, decision_id=decision.decision_id, decision=encoded, policy=policy, decided=now)
            )
            _log.info(
                "decided",
                run_id=run_id,
                decision=decision.decision_id,
                action=decision.action.value,
                reason=decision.reason,
            )
            if publisher is not None:
                event = new_event(
                    "esper.v1.RecordedDecision",
                    encoded,
                    key=run_id,
                    source="tamiyo",
                    priority=event_pb2.PRIORITY_HIGH,
                    attributes={"run_id": run_id, "action": decision.action.value, "reason": decision.reason},
                )
                publisher.offer("decisions", event)


class _CachedShelf:
    """The shelf of one run, made again only when the library changed."""

    def __init__(self, view: LibraryView, hello: RunHello) -> None:
        self._view = view
        self._signatures = frozenset(site.signature for site in hello.sites)
        self._revision = -1
        self._shelf: Shelf | None = None

    def now(self) -> Shelf:
        """The shelf as the library stands now."""
        revision = self._view.catalogue.revision
        if self._shelf is None or revision != self._revision:
            self._shelf, self._revision = self._view.catalogue.shelf(self._signatures), revision
        return self._shelf


def _order(expected: str, found: str | None) -> InvalidInput:
    return InvalidInput(f"Advise: expected {expected}, found {found or 'an empty message'}", reason="ADVISE_ORDER")
