"""State of all seeds as arrays."""

import queue
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.kasmina import seeds
from esper.kasmina.control import Stage
from esper.kasmina.layout import STATISTICS, SeedLayout
from esper.mesh.errors import Conflict, InvalidInput


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(list(Stage))), max_size=80))
def test_arrays_follow_the_table(wishes: list[tuple[int, Stage]]) -> None:
    """Single transitions over arrays accept and refuse exactly what the table does, and refusals change nothing."""
    layout, model = SeedLayout(5), [Stage.DORMANT] * 5
    for seed, to in wishes:
        if seeds.lawful(model[seed], to):
            layout.transition(seed, to)
            model[seed] = to
        else:
            with pytest.raises(Conflict, match="seed transition"):
                layout.transition(seed, to)
        assert model == [layout.stage_of(i) for i in range(5)]
    assert sum(stage in seeds.LIVING for stage in model) == layout.living


def test_bulk_is_all_or_nothing() -> None:
    """A bulk transition with one unlawful seed names it and moves none."""
    layout = SeedLayout(4)
    layout.transition(3, Stage.GERMINATED)
    with pytest.raises(Conflict, match=r"found 1 others: 3 \(GERMINATED\)"):
        layout.transition_many(np.arange(4), Stage.GERMINATED)
    assert [3] == layout.at(Stage.GERMINATED).tolist()
    layout.transition_many(np.arange(3), Stage.GERMINATED)
    assert 4 == layout.living


def test_counters() -> None:
    """Steps and boundaries count within a stage and start anew with the next."""
    layout = SeedLayout(2)
    layout.tick()
    layout.tick_boundary()
    layout.transition(0, Stage.GERMINATED)
    layout.tick()
    assert ([1, 2], [0, 1]) == (layout.steps_in_stage.tolist(), layout.boundaries_in_stage.tolist())


def test_document_round_trip() -> None:
    """Every column survives; a document with a stage of the future is refused."""
    layout = SeedLayout(3)
    layout.transition(1, Stage.GERMINATED)
    layout.set_alpha(1, 0.5)
    layout.close(2, 7)
    document = layout.document()
    assert document == SeedLayout.from_document(document).document()
    assert 3 == len(SeedLayout.from_document(document))
    with pytest.raises(InvalidInput, match="known stages"):
        SeedLayout.from_document({**document, "stage": [1, 2, 99]})
    with pytest.raises(InvalidInput, match="one length"):
        SeedLayout.from_document({**document, "alpha": [0.0]})


class LayoutMachine(RuleBasedStateMachine):
    """Arrays against the scalar table of `seeds`: one seed, several, clocks, in any order."""

    SEEDS = 4

    def __init__(self) -> None:
        super().__init__()
        self.layout = SeedLayout(self.SEEDS)
        self.stages = [Stage.DORMANT] * self.SEEDS
        self.counts = [[0, 0] for _ in range(self.SEEDS)]

    def _enter(self, seed: int, to: Stage) -> None:
        self.stages[seed], self.counts[seed] = to, [0, 0]

    @rule(seed=st.integers(0, SEEDS - 1), to=st.sampled_from(list(Stage)))
    def any_move(self, seed: int, to: Stage) -> None:
        """Mostly unlawful."""
        if seeds.lawful(self.stages[seed], to):
            self.layout.transition(seed, to)
            self._enter(seed, to)
        else:
            with pytest.raises(Conflict):
                self.layout.transition(seed, to)

    @rule(seed=st.integers(0, SEEDS - 1), which=st.integers(0, 20))
    def lawful_move(self, seed: int, which: int) -> None:
        """So that late stages are reached."""
        ways = [to for to in Stage if seeds.lawful(self.stages[seed], to)]
        if ways:
            self.layout.transition(seed, ways[which % len(ways)])
            self._enter(seed, ways[which % len(ways)])

    @rule(chosen=st.sets(st.integers(0, SEEDS - 1), min_size=1), to=st.sampled_from(list(Stage)))
    def bulk(self, chosen: set[int], to: Stage) -> None:
        """All or none."""
        index = np.array(sorted(chosen))
        if all(seeds.lawful(self.stages[seed], to) for seed in chosen):
            self.layout.transition_many(index, to)
            for seed in chosen:
                self._enter(seed, to)
        else:
            with pytest.raises(Conflict):
                self.layout.transition_many(index, to)

    @rule(boundary=st.booleans())
    def tick(self, boundary: bool) -> None:
        """Time passes for all."""
        (self.layout.tick_boundary if boundary else self.layout.tick)()
        for count in self.counts:
            count[boundary] += 1

    @rule()
    def restore(self) -> None:
        """A checkpoint is exact."""
        self.layout = SeedLayout.from_document(self.layout.document())

    @invariant()
    def agree(self) -> None:
        """Columns, single readings and a snapshot tell the same."""
        layout, seen = self.layout, self.layout.snapshot()
        for seed, (stage, (steps, boundaries)) in enumerate(zip(self.stages, self.counts, strict=True)):
            assert (stage, steps, boundaries) == (
                layout.stage_of(seed),
                layout.steps_of(seed),
                layout.boundaries_of(seed),
            )
            assert (stage, steps, boundaries) == (
                seen.stage[seed],
                seen.steps_in_stage[seed],
                seen.boundaries_in_stage[seed],
            )
        assert seen.steps_in_stage.tolist() == layout.steps_in_stage.tolist()
        assert sum(stage in seeds.LIVING for stage in self.stages) == layout.living


TestLayoutMachine = LayoutMachine.TestCase
TestLayoutMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_columns_can_only_be_looked_at() -> None:
    """A stage that is assigned past the table is refused by the array itself."""
    layout = SeedLayout(2)
    for column in (layout.stage, layout.closed_boundaries, layout.alpha, layout.snapshot().stage):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 3


def test_statistics_are_missing_until_measured() -> None:
    """Not zero, not healthy; and 1,000 seeds with all of them stay far below a megabyte."""
    layout = SeedLayout(1000)
    seen = layout.statistics.snapshot()
    assert all(np.isnan(seen[name]).all() for name in STATISTICS if name not in {"rows", "sample"})
    assert layout.nbytes < 100_000


CYCLE = (Stage.GERMINATED, Stage.CANCELLED, Stage.RESETTING, Stage.DORMANT)


def test_readers_see_whole_writes_without_a_lock() -> None:
    """One thread writes without a pause, others read: every snapshot is of one moment, and none of an earlier one."""
    layout, everyone = SeedLayout(300), np.arange(300)
    broken: list[str] = []
    seen = [0] * 3
    stop = threading.Event()

    def read(reader: int) -> None:
        last = 0
        while not stop.is_set():
            now = layout.snapshot()
            table = layout.statistics.snapshot()
            whole = len(set(now.stage.tolist())) == len(set(now.steps_in_stage.tolist())) == 1
            # As the writer has it: alpha tells the stage, every statistic the number of the sample.
            whole &= bool((now.alpha == now.stage).all())
            whole &= bool((table["effective_rank"][1:] == table["sample"][1:]).all())
            if not whole or now.version < last:
                broken.append(f"{now.stage} {now.steps_in_stage} {now.alpha} {table['sample']}")
                return
            last = now.version
            seen[reader] += 1

    def measure() -> None:
        sample = 0
        while not stop.is_set():
            sample += 1
            with layout.statistics.writing():
                layout.statistics["effective_rank"][1:] = sample
                layout.statistics["sample"][1:] = sample

    with layout.statistics.writing():
        layout.statistics["effective_rank"][:] = 0.0
    with layout.state.writing():
        layout.state["alpha"][:] = Stage.DORMANT
    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)] + [threading.Thread(target=measure)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        rounds = 0
        while (min(seen) < 100 or rounds < 200) and not broken and rounds < 100_000:
            for to in CYCLE:
                layout.tick()
                with layout.state.writing():
                    layout.state["stage"][everyone] = to
                    layout.state["entered_step"][everyone] = layout.state.header[0]
                    layout.state["alpha"][everyone] = to
            rounds += 1
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert [] == broken
    assert min(seen) >= 100


def test_a_reader_does_not_take_half_a_write() -> None:
    """One that comes in the middle of a write gets all of it, also when the write fails."""
    layout, found = SeedLayout(2), queue.Queue()
    reader = threading.Thread(target=lambda: found.put(layout.snapshot()))

    def write() -> None:
        with layout.state.writing():
            layout.state["alpha"][0] = 0.5
            reader.start()
            with pytest.raises(queue.Empty):
                found.get(timeout=0.05)
            layout.state["alpha"][1] = 0.5
            layout.state["alpha"][2] = 0.5

    with pytest.raises(IndexError):
        write()
    assert [0.5, 0.5] == found.get(timeout=30).alpha.tolist()
    reader.join()
