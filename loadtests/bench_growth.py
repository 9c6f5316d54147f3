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
from loadtests._report import Report, Target

SEEDS = 1000
PAIRS = 25
STEPS = 20


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
    for name in ("mlp", "resnet"):
        make, batch = HOSTS[name]
        model, x = make(), batch(0)[0]
        sites = discover(model, observe(model, (x,))).sites
        targets = len({site.target for site in sites})

        def step(model: nn.Module = model, x: torch.Tensor = x) -> float:
            start = time.thread_time()
            model(x).sum().backward()
            return time.thread_time() - start

        def sampled(model: nn.Module = model, x: torch.Tensor = x, targets: int = targets) -> float:
            worker = Worker()
            sampler = HealthSampler(model, sites, worker, targets)  # noqa: B023  # used within the iteration
            start = time.thread_time()
            handles = sampler.install()
            model(x).sum().backward()
            for handle in handles:
                handle.remove()
            sampler.collect()
            took = time.thread_time() - start
            worker.drain(5.0)
            worker.close()
            return took

        step()
        gaps = [1000 * (sampled() - step()) / targets for _ in range(4 * PAIRS)]
        report.add(
            f"health signal per site on the training thread, {name}",
            statistics.median(gaps),
            unit="ms",
            target=Target.below(0.1),
            runs=gaps[:10],
            sites=targets,
        )


def main() -> None:
    """Print the figures of this machine."""
    torch.set_num_threads(1)
    report = Report("growth", packages=("torch", "numpy"))
    for part in (_transitions, _health):
        part(report)


if __name__ == "__main__":
    main()
