"""Whether a signal leads around a planted bottleneck: perceptrons of four layers of 24, one of them of 3 only.

A signal ranks the spans; it is right where the narrow layer lies inside the span that it ranks first. The narrowest
width, which here is right by construction, is what a signal has to come near without knowing any width.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from esper.kasmina.control import SiteHealth
from esper.kasmina.health import HealthSampler, Worker
from esper.kasmina.sites import Site, discover, observe

__all__ = ["SIGNALS", "right"]

Signal = Callable[[SiteHealth], float | None]

SIGNALS: dict[str, Signal] = {
    "bottleneck score": lambda health: None if health.bottleneck is None else -health.bottleneck,
    "lowest effective rank": lambda health: health.effective_rank,
}
"""Smaller grows sooner; None comes last."""

BATCH = 256
WIDTH, NARROW, INPUTS, CLASSES = 24, 3, 20, 10
STEPS = 200


def right(activation: type[nn.Module], seeds: range) -> Iterator[dict[str, bool]]:
    """For each seed and each place of the narrow layer, whether each signal leads around it."""
    for seed, narrow in itertools.product(seeds, range(4)):
        model, x, labels = _trained(activation, seed, narrow)
        sites = [s for s in discover(model, observe(model, (x[:4],))).sites if s.source != s.target]
        found = _measured(model, sites, x, labels)
        if found:
            yield {name: _around(_best(signal, sites, found), 2 * narrow) for name, signal in SIGNALS.items()}


def _trained(activation: type[nn.Module], seed: int, narrow: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    widths = [INPUTS, *(NARROW if layer == narrow else WIDTH for layer in range(4)), CLASSES]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    model = nn.Sequential(*layers[:-1])
    teacher = nn.Sequential(nn.Linear(INPUTS, 2 * INPUTS), nn.Tanh(), nn.Linear(2 * INPUTS, CLASSES))
    x = torch.randn(16 * BATCH, INPUTS)
    labels = (3 * teacher(x)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        part = slice(BATCH * (step % 16), BATCH * (step % 16 + 1))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[part]), labels[part])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    return model, x[:BATCH], labels[:BATCH]


def _measured(model: nn.Module, sites: list[Site], x: torch.Tensor, labels: torch.Tensor) -> dict[int, SiteHealth]:
    worker = Worker()
    sampler = HealthSampler(model, sites, worker, per_sample=len(sites))
    for _ in range(2 * len(sites)):
        handles = sampler.install()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for handle in handles:
            handle.remove()
        sampler.collect()
        worker.drain(60.0)
    worker.close()
    found = {health.index: health for health in sampler.take()}
    # A narrow layer whose units all died passes nothing, and there is nothing to measure.
    return found if all(health.effective_rank is not None for health in found.values()) else {}


def _best(signal: Signal, sites: list[Site], found: dict[int, SiteHealth]) -> Site:
    def key(site: Site) -> tuple[bool, float, int]:
        value = signal(found[site.index])
        return value is None, value or 0.0, int(site.target) - int(site.source)

    return min(sites, key=key)


def _around(site: Site, layer: int) -> bool:
    return int(site.source) <= layer < int(site.target)
