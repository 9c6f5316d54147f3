"""What growth costs a training loop: transitions, dormant sites, an active seed, a health sample, wrapping.

    python -m loadtests.bench_growth

Prints JSON lines (`_report.py`). Overheads are medians of the ratio over pairs of runs that alternate between the bare
and the wrapped host, in processor time of the training thread, so that a load of the machine counts little. A dormant
run of 20 steps holds two sampled ones.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from esper.kasmina.attach import Attachment, SeedModule
from esper.kasmina.blueprints import get
from esper.kasmina.control import Stage
from esper.kasmina.growth import wrap
from esper.kasmina.health import HealthSampler, Worker
from esper.kasmina.kernels import Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.build import build
from esper.kasmina.layout import SeedLayout
from esper.kasmina.seeds import Execution
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
    report.measure("single transition", single, unit="us", scale=1e6, seeds=SEEDS)
    layout = SeedLayout(SEEDS)
    size = sum(getattr(layout, name).nbytes for name in ("stage", "steps_in_stage", "boundaries_in_stage", "alpha"))
    report.add("state of 1,000 seeds", size / 1e6, unit="MB", target=Target.below(1.0), seeds=SEEDS)


def _step_time(name: str, *, wrapped: bool, count: int = STEPS) -> Callable[[], float]:
    make, batch = HOSTS[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    growth = wrap(model, optimizer) if wrapped else None
    x, labels = batch(0)

    def run() -> float:
        start = time.thread_time()
        for _ in range(count):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            if growth is not None:
                growth.step(loss)
        return (time.thread_time() - start) / count

    run()
    return run


def _paired(bare: Callable[[], float], other: Callable[[], float]) -> list[float]:
    return [other() / first for first in (bare() for _ in range(PAIRS))]


def _dormant(report: Report) -> None:
    for name in HOSTS:
        ratios = _paired(_step_time(name, wrapped=False), _step_time(name, wrapped=True))
        value = 100 * (statistics.median(ratios) - 1)
        report.add(f"dormant step overhead, {name}", value, unit="%", target=Target.below(5.0), runs=ratios, batch=16)


def _active(report: Report) -> None:
    make, batch = HOSTS["resnet"]
    x = batch(0)[0]
    model, by_hand = make().eval(), make().eval()
    site = next(s for s in discover(model, observe(model, (x,))).sites if s.descriptor.name == "3")
    bundle = build(
        get("bottleneck_mlp" if site.y.layout.rank < 4 else "low_rank"), site.descriptor.signature, Tier.PORTABLE
    )
    kernel = load_candidate(bundle, kernel_id_of(bundle))
    seed = SeedModule(kernel.instantiate(), site)
    Attachment.attach(model, site, seed)
    seed.mode = Execution.BLENDED
    seed.alpha.fill_(1.0)

    class ByHand(nn.Module):
        """The same branch, written by its author."""

        def __init__(self, inner: nn.Module, delta: nn.Module) -> None:
            super().__init__()
            self.inner, self.delta = inner, delta

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            """(N, C, H, W) -> (N, C, H, W)."""
            y: torch.Tensor = self.inner(inputs)
            branch: torch.Tensor = self.delta(inputs if site.descriptor.kind.value == "parallel" else y)
            return y + branch

    assert isinstance(by_hand, nn.Sequential)
    by_hand[3] = ByHand(by_hand[3], kernel.instantiate())

    def forward(host: nn.Module) -> Callable[[], float]:
        def run() -> float:
            start = time.thread_time()
            for _ in range(STEPS):
                host(x).sum().backward()
            return (time.thread_time() - start) / STEPS

        run()
        return run

    ratios = _paired(forward(by_hand), forward(model))
    value = statistics.median(ratios)
    report.add("active seed over by hand", value, unit="ratio", target=Target.below(1.05), runs=ratios, host="resnet")


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


def _wrap(report: Report) -> None:
    layers = [nn.Linear(256, 256) for _ in range(200)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 256)

    def run() -> float:
        start = time.thread_time()
        growth = wrap(model, optimizer, example_inputs=(x,))
        took = time.thread_time() - start
        growth.close()
        return took

    report.measure("wrap, 200 layers", run, unit="s", target=Target.below(1.0), layers=200, parameters=200 * 256 * 257)


def main() -> None:
    """Print the figures of this machine."""
    torch.set_num_threads(1)
    report = Report("growth", packages=("torch", "numpy"))
    for part in (_transitions, _dormant, _active, _health, _wrap):
        part(report)


if __name__ == "__main__":
    main()
