"""What the runtime costs a training loop: dormant seeds, an active seed, wrapping, memory.

    python -m loadtests.bench_kasmina

Prints JSON lines (`_report.py`). Step times are wall time of forward, backward, optimizer and `growth.step`, with one
torch thread. Both networks take turns step by step, so that a drift of the machine meets both alike; a pair is the sum
of ten steps of each, one of them sampled; the ratio is the median over pairs of several builds. Sampling is dense at
first and one step in ten in the long run: the long run is measured, and apart from it the first hundred steps.
"""

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from esper.kasmina.attach import Attachment, SeedModule
from esper.kasmina.blueprints import get
from esper.kasmina.control import SiteKind
from esper.kasmina.growth import Growth
from esper.kasmina.kernels import Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.build import build
from esper.kasmina.seeds import Execution
from esper.kasmina.signature import Layout
from esper.kasmina.sites import discover, observe
from esper.kasmina.wrapping import wrap
from loadtests._report import Report, Target
from loadtests._step_hosts import HOSTS, StepHost, llama_1b

STEPS = 10
"""Steps of a pair: one round of sampling."""
BUILDS = 3
"""Times that both networks are built anew: where memory happens to lie is worth some percent."""
SECONDS = 4.0
"""For the pairs of one build."""
MIN_PAIRS = 3
SLOW_S = 0.5
"""A step that takes longer is measured in one build, which is minutes as it is."""
FIRST = 100
"""Steps that count as the beginning."""

Step = Callable[[], None]


def _stepper(host: StepHost, size: int, model: nn.Module, *, wrapped: bool = False) -> tuple[Step, Growth | None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    growth = wrap(model, optimizer) if wrapped else None
    x, y = host.batch(size)

    def bare() -> None:
        host.step(model, optimizer, x, y)

    def grown() -> None:
        assert growth is not None
        growth.step(host.step(model, optimizer, x, y))

    return (bare if growth is None else grown), growth


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _pairs(bare: Step, other: Step) -> list[tuple[float, float]]:
    """Seconds per step of both, pair by pair."""
    found: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(found) < MIN_PAIRS or time.perf_counter() - began < SECONDS:
        found.append(_pair(bare, other, STEPS))
    return found


def _pair(bare: Step, other: Step, steps: int) -> tuple[float, float]:
    """Seconds per step of both, taking turns; who begins alternates."""
    first = second = 0.0
    for step in range(steps):
        if step % 2:
            second += _seconds(other)
            first += _seconds(bare)
        else:
            first += _seconds(bare)
            second += _seconds(other)
    return first / steps, second / steps


def _settle(growth: Growth, bare: Step, other: Step) -> float:
    """Have the sites found, and go to where sampling has come to its pace of the long run; seconds of a step."""
    for _ in range(3):
        bare()
        other()
    sampler = growth.observation.sampler
    assert sampler is not None
    while not all(sampler.due(step, STEPS) == (step % STEPS == 0) for step in range(STEPS)):
        sampler.position += 1
    return _seconds(bare)


def _ratios(pairs: Sequence[tuple[float, float]]) -> list[float]:
    return [second / first for first, second in pairs]


def _dormant(report: Report) -> None:
    medians = []
    for host in HOSTS:
        for size in host.batches:
            pairs, begin = [], []
            for _ in range(BUILDS):
                bare, _nothing = _stepper(host, size, host.make())
                wrapped, growth = _stepper(host, size, host.make(), wrapped=True)
                assert growth is not None
                if size == 1 and host.site:
                    bare()
                    wrapped()
                    begin.append(_pair(bare, wrapped, FIRST))
                slow = _settle(growth, bare, wrapped) > SLOW_S
                pairs += _pairs(bare, wrapped)
                sites = len(growth.sites)
                growth.close()
                del bare, wrapped, growth
                gc.collect()
                if slow:
                    break
            ratios = _ratios(pairs)
            medians.append(statistics.median(ratios))
            report.add(
                f"dormant step / unwrapped, {host.name}, batch {size}",
                medians[-1],
                unit="ratio",
                target=Target.below(1.05),
                runs=ratios,
                sites=sites,
                step_ms=round(1000 * statistics.median(first for first, _ in pairs), 3),
                pairs=len(pairs),
            )
            if begin:
                report.add(
                    f"the first {FIRST} steps, {host.name}, batch {size}",
                    statistics.median(_ratios(begin)),
                    unit="ratio",
                    runs=_ratios(begin),
                )
    report.add(
        "dormant step / unwrapped, median of these",
        statistics.median(medians),
        unit="ratio",
        target=Target.below(1.01),
        runs=medians,
    )


class _ByHand(nn.Module):
    """A module and its branch, as its author would have written them."""

    def __init__(self, inner: nn.Module, delta: nn.Module, *, parallel: bool) -> None:
        super().__init__()
        self.inner = inner
        self.delta = delta
        self.parallel = parallel

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """What `inner` gives, and the branch's change."""
        y: Tensor = self.inner(x, *args, **kwargs)
        change: Tensor = self.delta(x if self.parallel else y)
        return y + change


_BLUEPRINTS = {Layout.VECTOR: "bottleneck_mlp", Layout.SEQUENCE: "bottleneck_mlp", Layout.IMAGE: "low_rank"}


def _active(report: Report) -> None:
    for host in HOSTS:
        if not host.site:
            continue
        for size in host.batches:
            pairs = []
            for _ in range(BUILDS):
                grown, by_hand = _grown_and_by_hand(host, size)
                ours, theirs = _stepper(host, size, grown)[0], _stepper(host, size, by_hand)[0]
                _pair(theirs, ours, 3)
                pairs += _pairs(theirs, ours)
            ratios = _ratios(pairs)
            report.add(
                f"step with an active seed / module by hand, {host.name}, batch {size}",
                statistics.median(ratios),
                unit="ratio",
                target=Target.below(1.05),
                runs=ratios,
                site=host.site,
                step_ms=round(1000 * statistics.median(first for first, _ in pairs), 3),
                pairs=len(pairs),
            )


def _grown_and_by_hand(host: StepHost, size: int) -> tuple[nn.Module, nn.Module]:
    grown, by_hand = host.make(), host.make()
    sites = discover(grown, observe(grown, (host.batch(size)[0],))).sites
    site = next(s for s in sites if s.descriptor.name == host.site and s.descriptor.kind is SiteKind.SERIES)
    blueprint = get(_BLUEPRINTS[site.y.layout])
    bundle = build(blueprint, site.descriptor.signature, Tier.PORTABLE)
    module = load_candidate(bundle, kernel_id_of(bundle)).instantiate()
    seed = SeedModule(module, site)
    Attachment.attach(grown, site, seed)
    seed.mode = Execution.BLENDED
    seed.alpha.fill_(1.0)
    parent, _, name = host.site.rpartition(".")
    owner = by_hand.get_submodule(parent)
    # What an author would write: plain torch, no kernel.
    setattr(owner, name, _ByHand(owner.get_submodule(name), module.eager(), parallel=False))
    return grown, by_hand


def _wrap(report: Report) -> None:
    with torch.device("meta"):
        model = llama_1b()
        tokens = torch.zeros(1, 8, dtype=torch.long)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [id(p) for p in model.parameters()]

    def run() -> float:
        start = time.perf_counter()
        growth = wrap(model, optimizer, example_inputs=(tokens,))
        took = time.perf_counter() - start
        assert growth.sites
        growth.close()
        return took

    report.measure(
        "wrap with discovery of its sites",
        run,
        unit="s",
        target=Target.below(1.0),
        host="Llama on the meta device",
        parameters=parameters,
    )
    if before != [id(p) for p in model.parameters()]:
        raise RuntimeError("expected the same parameters after wrap, found others")


def _tensor_bytes() -> int:
    """Memory of every tensor that anything refers to, shared memory once."""
    seen: dict[int, int] = {}
    for thing in gc.get_objects():
        # By the type alone: asking a lazy module for its class wakes it, and tensors of other kinds hold no memory.
        if type(thing) in {Tensor, nn.Parameter} and thing.device.type == "cpu" and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _memory(report: Report) -> None:
    """What a wrapped network keeps beyond the bare one: tensors, and objects of Python."""
    for host in HOSTS:
        model = host.make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        x, y = host.batch(1)
        host.step(model, optimizer, x, y)
        optimizer.zero_grad()
        gc.collect()
        original = sum(p.nbytes for p in model.parameters())
        tensors = _tensor_bytes()
        tracemalloc.start()
        growth = wrap(model, optimizer)
        for _ in range(2 * STEPS):
            growth.step(host.step(model, optimizer, x, y))
        optimizer.zero_grad()
        gc.collect()
        kept, _peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        more = _tensor_bytes() - tensors
        report.add(
            f"memory of the wrapped network / original, {host.name}",
            (original + more + kept) / original,
            unit="ratio",
            # A fixed cost of some hundred kilobytes is not one thousandth of a small network.
            target=Target.below(1.001) if original > 100_000_000 else None,
            sites=len(growth.sites),
            original_mb=round(original / 1e6, 2),
            tensors_kb=round(more / 1e3, 1),
            objects_kb=round(kept / 1e3, 1),
        )
        growth.close()
        del growth, model, optimizer


def main() -> None:
    """Print the figures of this machine."""
    torch.set_num_threads(1)
    report = Report("kasmina", packages=("torch", "transformers", "numpy"))
    for part in (_dormant, _active, _wrap, _memory):
        part(report)


if __name__ == "__main__":
    main()
