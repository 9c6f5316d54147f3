"""Circuits: closed, open for a growing number of boundaries, half open for one trial."""

from __future__ import annotations

import json
from threading import Thread

import pytest

from esper.kasmina.breaker import Breakers, CircuitState, Scope

K, KEY = Scope.KERNEL, "sha256:" + "a" * 64


def _breakers(first: int = 2, longest: int = 5) -> Breakers:
    return Breakers(dict.fromkeys(Scope, first), longest)


def _pass(breakers: Breakers, boundaries: int) -> None:
    for _ in range(boundaries):
        breakers.tick()


def test_the_whole_way_of_a_circuit() -> None:
    """Open at the first failure, half open when its boundaries are over, then one trial that decides."""
    breakers = _breakers()
    assert (CircuitState.CLOSED, "") == (breakers.state(K, KEY), breakers.refusal(K, KEY))
    assert 2 == breakers.trip(K, KEY, "it raised")
    assert "circuit open for 2 boundaries, after it raised" in breakers.refusal(K, KEY)
    _pass(breakers, 2)
    assert (CircuitState.HALF_OPEN, "") == (breakers.state(K, KEY), breakers.refusal(K, KEY))
    breakers.begin(K, KEY)
    assert "trial under way" in breakers.refusal(K, KEY)
    breakers.succeed(K, KEY)
    assert (CircuitState.CLOSED, {}) == (breakers.state(K, KEY), breakers.document())


def test_a_trial_that_fails_opens_for_twice_as_long_up_to_a_bound() -> None:
    """Two, four, then the bound; a trial that shows nothing leaves room for another."""
    breakers = _breakers()
    assert [2, 4, 5, 5] == [breakers.trip(K, KEY, "again") for _ in range(4)]
    _pass(breakers, 5)
    breakers.begin(K, KEY)
    breakers.give_up(K, KEY)
    assert "" == breakers.refusal(K, KEY)
    breakers.succeed(K, KEY)
    assert 2 == breakers.trip(K, KEY, "afresh")
    assert 7 == _breakers(longest=9).trip(K, KEY, "locked", first=7)


def test_an_open_circuit_does_not_close_by_a_late_success() -> None:
    """What began before the failure proves nothing; an operator's word does."""
    breakers = _breakers()
    breakers.trip(K, KEY, "it raised")
    breakers.succeed(K, KEY)
    assert CircuitState.OPEN is breakers.state(K, KEY)
    breakers.reset(K, KEY)
    assert CircuitState.CLOSED is breakers.state(K, KEY)


def test_what_took_the_process_down_stays_out() -> None:
    """For good means for good; scopes and keys do not touch one another."""
    breakers = _breakers()
    breakers.trip(Scope.CODE, KEY, "hang", for_good=True)
    _pass(breakers, 50)
    assert CircuitState.OPEN is breakers.state(Scope.CODE, KEY)
    assert "for good" in breakers.refusal(Scope.CODE, KEY)
    assert CircuitState.CLOSED is breakers.state(K, KEY)


def test_state_travels_as_json_and_the_later_word_counts() -> None:
    """Of two documents that know a circuit the last one is believed; a trial under way is over."""
    early, late = _breakers(), _breakers()
    early.trip(K, KEY, "first")
    early.trip(Scope.SITE, "head (series)", "spike")
    early.begin(Scope.SITE, "head (series)")
    late.trip(K, KEY, "first")
    late.trip(K, KEY, "second")
    merged = _breakers()
    merged.replace(json.loads(json.dumps(early.document())), late.document())
    assert "for 4 boundaries, after second" in merged.refusal(K, KEY)
    assert not merged.trying(Scope.SITE, "head (series)")
    assert {"kernel", "site"} == set(merged.document())


@pytest.mark.parametrize("count", [5000])
def test_circuits_are_bounded_and_may_be_tripped_by_several_threads(count: int) -> None:
    """The oldest go first, those for good last."""
    breakers = _breakers()
    breakers.trip(Scope.CODE, KEY, "hang", for_good=True)

    def trip(name: str) -> None:
        for i in range(count // 2):
            breakers.trip(K, f"{name}{i}", "x")

    threads = [Thread(target=trip, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 4096 == sum(len(circuits) for circuits in breakers.document().values())
    assert CircuitState.OPEN is breakers.state(Scope.CODE, KEY)
