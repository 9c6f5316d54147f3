"""The table of a session."""

from __future__ import annotations

import torch
from torch import nn

from esper.kasmina import wrap
from esper.kasmina.control import Stage
from tests.kasmina.hosts import small_cnn
from tests.kasmina.loops import Run


def _stack(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(depth)))


def test_sites_seeds_and_totals() -> None:
    """A row per site with type, shapes and host parameters; a living seed adds stage, blueprint, alpha, parameters."""
    run = Run(sites=["first", "second", "head", "first..head"])
    before = run.growth.summary()
    assert "no site is known before the first training forward" in before
    run.germinate(to=Stage.GRAFTING)
    lines = run.growth.summary().splitlines()
    assert ["site", "kind", "type", "input", "output", "parameters", "stage"] == lines[0].split()[:7]
    head = next(line for line in lines if line.startswith("head  ") and "parallel" in line)
    assert ["head", "parallel", "Linear", "8", "x", "1", "8", "x", "4", "8", "DORMANT"] == head.split()
    grown = next(line for line in lines if line.startswith("first..head")).split()
    assert {"GRAFTING", "tiny", "1.00", "96", "-"} <= set(grown)
    assert "1 seeds not dormant: 1 GRAFTING" in lines[-2]
    host = sum(p.numel() for n, p in run.model.named_parameters() if "esper" not in n)
    assert f"parameters: host {host:,}, grown 96 (+{9600 / host:.2f} %), together {host + 96:,}" == lines[-1]
    run.growth.close()


def test_long_models_are_shortened() -> None:
    """Layers of a stack share a row when there are too many; where that is not enough the middle is left out."""
    model = _stack(12)
    growth = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=(torch.randn(2, 4),))
    text = growth.summary()
    assert "*.* (12)" in text
    assert len(text.splitlines()) < 30
    short = growth.summary(max_rows=3).splitlines()
    assert 1 == sum("more dormant rows" in line for line in short)
    assert 3 == sum("DORMANT" in line for line in short)
    assert len(growth.sites) < len(growth.summary(max_rows=1000).splitlines())
    growth.close()


def test_a_living_seed_is_never_left_out() -> None:
    """However short the table, a site whose seed is not dormant has its row."""
    run = Run()
    run.germinate(to=Stage.GRAFTING)
    assert "GRAFTING" in run.growth.summary(max_rows=1)
    run.growth.close()


def test_refusals_are_counted() -> None:
    """What can not grow is told by reason."""
    model = nn.Sequential(small_cnn(), nn.Identity())
    model[1].spare = nn.Linear(2, 2)
    growth = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=(torch.randn(2, 3, 8, 8),))
    assert "modules that can not grow: 1\n  1 x it was not called" in growth.summary()
    growth.close()
