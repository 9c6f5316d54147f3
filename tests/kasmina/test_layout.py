"""State of all seeds as arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina import seeds
from esper.kasmina.control import Stage
from esper.kasmina.layout import SeedLayout
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
    layout.alpha[1] = 0.5
    layout.closed_boundaries[2] = 7
    document = layout.document()
    assert document == SeedLayout.from_document(document).document()
    assert 3 == len(SeedLayout.from_document(document))
    with pytest.raises(InvalidInput, match="known stages"):
        SeedLayout.from_document({**document, "stage": [1, 2, 99]})
    with pytest.raises(InvalidInput, match="one length"):
        SeedLayout.from_document({**document, "alpha": [0.0]})
