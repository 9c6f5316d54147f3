"""What single parts of the runtime cost: transitions, state, a health sample.

    python -m loadtests.bench_growth

Prints JSON lines (`_report.py`), in processor time of the training thread, so that a load of the machine counts little.
"""

import statistics
import time
import tracemalloc

import numpy as np
import torch
from torch import nn

from esper.kasmina.control import Stage
from esper.kasmina.health import HealthSampler, Worker
from esper.kasmina.layout import STATE, STATISTICS, SeedLayout
from esper.kasmina.sites import discover, observe
from examples.dormant_equality import HOSTS
from loadtests import _bottleneck as _bottlenecks
from loadtests._report import Report, Target

SEEDS = 1000
REPEATS = 10
"""Of each output."""


def _transitions(report: Report) -> None:
    way = [Stage.GERMINATED, Stage.LOADING, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZING]
    everyone = np.arange(SEEDS)

    def bulk() -> float:
        layout = SeedLayout(SEEDS)
        start = time.thread_time()
        for stage in way:
            layout.transition_many(everyone, stage)
        return (time.thread_time() - start) / (SEEDS * len(way))

    def single() -> float:
        layout = SeedLayout(SEEDS)
        start = time.thread_time()
        for stage in way:
            for seed in range(SEEDS):
                layout.transition(seed, stage)
        return (time.thread_time() - start) / (SEEDS * len(way))

    report.measure("transition in bulk", bulk, unit="us", scale=1e6, target=Target.below(1.0), seeds=SEEDS)

    def snapshot() -> float:
        layout = SeedLayout(SEEDS)
        start = time.thread_time()
        for _ in range(SEEDS):
            layout.snapshot()
        return (time.thread_time() - start) / SEEDS

    report.measure("single transition", single, unit="us", scale=1e6, target=Target.below(1.0), seeds=SEEDS)
    report.measure("snapshot for a reader in another thread", snapshot, unit="us", scale=1e6, seeds=SEEDS)
    tracemalloc.start()
    layout = SeedLayout(SEEDS)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report.add(
        "state and statistics of 1,000 seeds",
        size / 1e6,
        unit="MB",
        target=Target.below(1.0),
        seeds=len(layout),
        columns=len(STATE) + len(STATISTICS),
        columns_mb=layout.nbytes / 1e6,
    )


def _health(report: Report) -> None:
    """A sample of one output measures the output, the next one its gradient and a branch: the mean of two counts."""
    for name in ("mlp", "resnet", "transformer"):
        make, batch = HOSTS[name]
        model, x = make(), batch(0)[0]
        sites = discover(model, observe(model, (x,))).sites
        bare, two, worked = [], [], []
        for place in {site.target for site in sites}:
            worker = Worker()
            sampler = HealthSampler(model, [site for site in sites if site.target == place], worker)
            for _ in range(REPEATS):
                bare.append(_forward(model, x))
                two.append(_sampled(model, x, sampler) + _sampled(model, x, sampler))
                start = time.process_time()
                worker.drain(30.0)
                worked.append(1000 * (time.process_time() - start) / 2)
            worker.close()
        gaps = [1000 * (both / 2 - once) for both, once in zip(two, bare, strict=True)]
        report.add(
            f"health sample on the training thread, {name}",
            statistics.median(gaps),
            unit="ms",
            target=Target.below(0.1),
            runs=gaps,
            outputs=len({site.target for site in sites}),
        )
        report.add(
            f"health sample on the worker's thread, rank or score, {name}",
            statistics.median(worked),
            unit="ms",
            runs=worked,
        )


def _forward(model: nn.Module, x: torch.Tensor) -> float:
    start = time.thread_time()
    model(x).sum().backward()
    return time.thread_time() - start


def _sampled(model: nn.Module, x: torch.Tensor, sampler: HealthSampler) -> float:
    start = time.thread_time()
    handles = sampler.install()
    model(x).sum().backward()
    for handle in handles:
        handle.remove()
    sampler.collect()
    return time.thread_time() - start


def _bottleneck(report: Report) -> None:
    """How often a signal leads around a planted narrow layer; by chance it would in four cases of ten."""
    for name, activation in (("relu", nn.ReLU), ("tanh", nn.Tanh)):
        hosts = list(_bottlenecks.right(activation, range(5)))
        for signal in _bottlenecks.SIGNALS:
            share = sum(host[signal] for host in hosts) / len(hosts)
            report.add(f"{signal} leads around a planted bottleneck, {name}", share, unit="share", hosts=len(hosts))


def main() -> None:
    """Print the figures of this machine."""
    torch.set_num_threads(1)
    report = Report("growth", packages=("torch", "numpy"))
    for part in (_transitions, _health, _bottleneck):
        part(report)


if __name__ == "__main__":
    main()
