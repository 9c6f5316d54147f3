"""Work and leases: the pure steps, and the whole machine in random order against a model."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import Conflict, Stale
from esper.urza.builds import BuildState
from esper.urza.leases import Built, Failed, Request, Work, WorkKind, WorkState
from esper.urza.store import sqlite_url
from tests.services.urza.urza_world import FORGE, OPERATOR, World, make_ir, open_world

Q, L, D, F = WorkState.QUEUED, WorkState.LEASED, WorkState.DONE, WorkState.FAILED
_STEPS: dict[str, Callable[[Work], Work]] = {
    "succeed": lambda work: work.succeed(),
    "fail": lambda work: work.fail("broken", retryable=False, max_attempts=3),
    "fail retryably": lambda work: work.fail("broken", retryable=True, max_attempts=3),
    "expire": lambda work: work.expire("me", max_attempts=3),
    "give up": lambda work: work.give_up("pointless"),
    "retry": lambda work: work.retry(),
}
_LAW = {
    ("succeed", L): {D},
    ("fail", L): {F},
    ("fail retryably", L): {Q, F},
    ("expire", L): {Q, F},
    ("give up", Q): {F},
    ("retry", F): {Q},
}


@given(step=st.sampled_from(sorted(_STEPS)), state=st.sampled_from(sorted(WorkState)), attempts=st.integers(1, 5))
def test_every_step_from_every_state(step: str, state: WorkState, attempts: int) -> None:
    """A step leads where the table says, from where it says, and attempts bound what is queued again."""
    work = Work(kind=WorkKind.COMPILE, subject_id="sha256:0", state=state, attempts=attempts, error="")
    lawful = _LAW.get((step, state))
    if lawful is None:
        with pytest.raises(Conflict) as caught:
            _STEPS[step](work)
        assert "UNLAWFUL_TRANSITION" == caught.value.reason
        return
    after = _STEPS[step](work)
    assert after.state in lawful
    if lawful == {Q, F}:
        assert (Q if attempts < 3 else F) == after.state
    assert bool(after.error) == (step in {"fail", "fail retryably", "expire", "give up"})


def test_errors_are_bounded_and_never_empty() -> None:
    """What is kept of an error fits its column; a failure without words says so."""
    work = Work(kind=WorkKind.COMPILE, subject_id="sha256:0", state=L, attempts=1)
    assert 8192 == len(work.fail("x" * 10_000, retryable=True, max_attempts=3).error)
    assert "no reason given" == work.fail("", retryable=True, max_attempts=3).error


def test_what_is_given_up_keeps_what_was_said_before() -> None:
    """The reason comes first, then the error of the last attempt."""
    work = Work(kind=WorkKind.COMPILE, subject_id="sha256:0", state=Q, attempts=1, error="no such operation")
    assert "archived; before that: no such operation" == work.give_up("archived").error


@dataclass
class _Piece:
    """What the model knows of a build."""

    state: BuildState = BuildState.QUEUED
    attempts: int = 0
    lease: str = ""
    expires: float = 0.0


class LeaseMachine(RuleBasedStateMachine):
    """Forges that take, keep, lose, complete and drop work in any order; a plain model says what must come of it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="esper-leases-"))
        self.opened: Any = open_world(sqlite_url(self.directory / "library.db"), self.directory)
        self.world: World = self.do(self.opened.__aenter__())
        self.now = 0.0
        self.pieces: dict[str, _Piece] = {}
        self.builds: dict[str, Any] = {}
        self.over: list[str] = []
        self.blueprint_id = ""
        self.archived = False

    def do(self, work: Any) -> Any:
        """Run something of the library."""
        return self.loop.run_until_complete(work)

    @initialize(count=st.integers(1, 4))
    def order(self, count: int) -> None:
        """There is some work."""
        self.blueprint_id = self.do(self.world.submit())
        for width in range(1, count + 1):
            build = self.do(self.world.order(self.blueprint_id, signature=Signature(Layout.VECTOR, width, 8)))
            self.builds[build.id], self.pieces[build.id] = build, _Piece()

    def held(self) -> list[str]:
        """Builds whose lease is alive."""
        return [
            one for one, piece in self.pieces.items() if piece.state is BuildState.LEASED and piece.expires > self.now
        ]

    def again(self, piece: _Piece) -> bool:
        """Whether another attempt may follow."""
        return piece.attempts < 3 and not self.archived

    @rule(limit=st.integers(1, 3), length=st.sampled_from([1.0, 5.0]))
    def claim(self, limit: int, length: float) -> None:
        """Somebody asks for work and gets the oldest that is queued."""
        request = Request(kind=WorkKind.COMPILE, holder="machine", limit=limit, lease_time_s=length)
        leases = self.do(self.world.library.desk.lease(request, FORGE))
        queued = [one for one, piece in self.pieces.items() if piece.state is BuildState.QUEUED]
        assert queued[:limit] == [lease.subject_id for lease in leases]
        for lease in leases:
            piece = self.pieces[lease.subject_id]
            assert piece.attempts + 1 == lease.attempt
            piece.state, piece.attempts = BuildState.LEASED, lease.attempt
            piece.lease, piece.expires = lease.id, self.now + length

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        """Time passes; what ran out is queued again or given up."""
        self.world.clock.advance(seconds)
        self.now += seconds
        expired = [
            piece for piece in self.pieces.values() if piece.state is BuildState.LEASED and piece.expires <= self.now
        ]
        assert len(expired) == self.do(self.world.library.desk.expire_due())
        for piece in expired:
            self.over.append(piece.lease)
            piece.state = BuildState.QUEUED if self.again(piece) else BuildState.FAILED

    @precondition(lambda self: self.held())
    @rule(data=st.data(), length=st.sampled_from([1.0, 5.0]))
    def renew(self, data: st.DataObject, length: float) -> None:
        """A holder keeps its lease."""
        piece = self.pieces[data.draw(st.sampled_from(self.held()))]
        self.do(self.world.library.desk.renew(piece.lease, length, FORGE))
        piece.expires = self.now + length

    @precondition(lambda self: self.held())
    @rule(data=st.data(), retryable=st.booleans())
    def fail(self, data: st.DataObject, retryable: bool) -> None:
        """A holder reports a failure."""
        piece = self.pieces[data.draw(st.sampled_from(self.held()))]
        self.do(self.world.library.desk.complete(piece.lease, Failed("broken", retryable=retryable), FORGE))
        piece.state = BuildState.QUEUED if retryable and self.again(piece) else BuildState.FAILED
        self.over.append(piece.lease)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        """A holder delivers."""
        chosen = data.draw(st.sampled_from(self.held()))
        kernel = self.do(self.world.upload(self.builds[chosen], chosen.encode()))
        self.do(self.world.library.desk.complete(self.pieces[chosen].lease, Built(kernel.id), FORGE))
        self.pieces[chosen].state = BuildState.SUCCEEDED

    @precondition(lambda self: self.over)
    @rule(data=st.data())
    def come_too_late(self, data: st.DataObject) -> None:
        """Whoever lost a lease cannot use it any more."""
        lease = data.draw(st.sampled_from(self.over))
        with pytest.raises(Stale):
            self.do(self.world.library.desk.renew(lease, None, FORGE))
        with pytest.raises(Stale):
            self.do(self.world.library.desk.complete(lease, Failed("late", retryable=True), FORGE))

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """Somebody asks again for what failed; what did not fail stays as it is."""
        chosen = data.draw(st.sampled_from(sorted(self.builds)))
        asking = self.world.order(self.blueprint_id, signature=self.builds[chosen].signature, retry=True)
        if self.archived:
            with pytest.raises(Conflict, match="archived"):
                self.do(asking)
            return
        self.do(asking)
        piece = self.pieces[chosen]
        if piece.state is BuildState.FAILED:
            piece.state, piece.attempts = BuildState.QUEUED, 0

    @precondition(lambda self: not self.archived)
    @rule()
    def archive(self) -> None:
        """An operator takes the blueprint out of use: what waits is given up, and nothing of it is queued again."""
        self.do(self.world.library.archive_blueprint(self.blueprint_id, OPERATOR))
        self.archived = True
        for piece in self.pieces.values():
            if piece.state is BuildState.QUEUED:
                piece.state = BuildState.FAILED

    @precondition(lambda self: self.archived)
    @rule()
    def take_back(self) -> None:
        """An operator brings it back; what was given up waits for somebody to ask again."""
        data = make_ir().canonical_json().encode()
        self.do(self.world.library.submit_blueprint(data, (), OPERATOR))
        self.archived = False

    @invariant()
    def states_agree(self) -> None:
        """The library and the model say the same of every build."""
        for one, piece in self.pieces.items():
            build = self.do(self.world.library.get_build(one))
            assert (piece.state, piece.attempts) == (build.state, build.attempts)

    def teardown(self) -> None:
        """Close the library."""
        self.do(self.opened.__aexit__(None, None, None))
        self.loop.close()
        shutil.rmtree(self.directory)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
