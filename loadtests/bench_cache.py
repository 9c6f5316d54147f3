"""The kernel cache: what a hit costs, and which share of requests is a hit, against LRU and against the optimum.

    python -m loadtests.bench_cache

Latencies are those of a real cache with a real kernel. Hit ratios replay traces through the policy of the cache, sizes
as the cache accounts for them: traces/digits.jsonl was recorded in real runs (see traces/README.md); the others are
synthetic and named so. Only requests that could be hits are counted: the first for each kernel never is one.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from esper.kasmina.blueprints import get
from esper.kasmina.cache import LOADED_OVERHEAD_BYTES, Fetched, KernelCache
from esper.kasmina.kernels import SigningKey, Statement, Target, Tier, TrustStore, kernel_id_of
from esper.kasmina.kernels.build import build
from esper.kasmina.signature import Layout, Signature
from loadtests._policies import Lru, Ours, S3Fifo, hits, most_hits
from loadtests._report import Report
from loadtests._report import Target as Goal

TRACES = Path(__file__).parent / "traces"
SHARES = (0.1, 0.25, 0.5, 0.75)
"""Room, as a share of all kernels of a trace together; with room for all there is nothing to decide."""
CALLS = 50_000
DEFAULT_BYTES = 512 << 20


class Trace(NamedTuple):
    """Requests in order."""

    name: str
    keys: list[str]
    sizes: dict[str, int]

    @property
    def footprint(self) -> int:
        """Bytes of all kernels in it."""
        return sum(self.sizes[key] for key in set(self.keys))

    @property
    def repeats(self) -> int:
        """Requests that are not the first for their kernel."""
        return len(self.keys) - len(set(self.keys))


# What is replayed


def recorded() -> tuple[list[Trace], list[dict[str, Any]]]:
    """Traces of real runs, one a run and one of all in turn, and the recordings themselves."""
    first, *runs = map(json.loads, (TRACES / "digits.jsonl").read_text(encoding="utf-8").splitlines())
    sizes = {str(i): size + LOADED_OVERHEAD_BYTES for i, size in enumerate(first["bundle_bytes"])}
    asked = [[str(kernel) for ask in run["asks"] for kernel in ask["kernels"]] for run in runs]
    traces = [Trace(f"digits, run {number}", keys, sizes) for number, keys in enumerate(asked, 1)]
    traces.append(Trace("digits, all runs in turn", [key for keys in asked for key in keys], sizes))
    return traces, runs


def synthetic() -> Iterator[Trace]:
    """Stress that no recorded run shows; two kernels of three are small and portable, one is compiled and large."""
    dice = random.Random(1)
    keys = [f"k{number}" for number in range(120)]
    sizes = {key: dice.randrange(14_000, 40_000) if n % 3 else dice.randrange(2 << 20, 4 << 20)
             for n, key in enumerate(keys)}  # fmt: skip
    sizes = {key: size + LOADED_OVERHEAD_BYTES for key, size in sizes.items()}
    weights = [1 / rank**0.9 for rank in range(1, len(keys) + 1)]
    dice.shuffle(keys)
    yield Trace("synthetic Zipf", dice.choices(keys, weights, k=1500), sizes)
    scanned: list[str] = []
    for key in dice.choices(keys, weights, k=900):
        scanned.append(key)
        if len(scanned) % 250 == 0:
            once = [f"once {len(scanned)} {number}" for number in range(60)]
            sizes |= dict.fromkeys(once, (1 << 20) + LOADED_OVERHEAD_BYTES)
            scanned += once
    yield Trace("synthetic Zipf with scans", scanned, sizes)
    phases = [dice.choices(keys[start : start + 40], weights[:40], k=500) for start in (0, 40, 80)]
    yield Trace("synthetic, demand moves on twice", [key for phase in phases for key in phase], sizes)
    yield Trace("synthetic loop", [keys[n % 40] for n in range(1200)], sizes)


# What is timed


class Library:
    """One kernel, signed."""

    def __init__(self) -> None:
        self.bundle = build(get("low_rank"), Signature(Layout.VECTOR, 8, 8), Tier.PORTABLE)
        self.id = kernel_id_of(self.bundle)
        key = SigningKey.generate()
        self.trust = TrustStore([key.public])
        self.verdict = key.sign(
            Statement(
                kernel_id=self.id,
                passed=True,
                target=str(Target.here()),
                gauntlet_version="1",
                issued_at=datetime.now(UTC),
            )
        )

    def fetch(self, _kernel_id: str) -> Fetched:
        """The kernel."""
        return Fetched(self.bundle, self.verdict)


def _single(action: Callable[[], object]) -> list[float]:
    """Seconds of single calls, the reading of the clock included, sorted."""
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return sorted(times)


def latencies(report: Report) -> None:
    """Times of a real cache."""
    library = Library()
    with TemporaryDirectory() as folder:
        cache = KernelCache(Path(folder), library.fetch, lambda: library.trust)
        cache.obtain(library.id)
        for name, kernel_id in (("hit", library.id), ("nothing there", "sha256:none")):
            times = _single(partial(cache.get, kernel_id))
            for rank, title in ((50, "median"), (99, "99th percentile")):
                report.add(f"{name}, {title}", times[CALLS * rank // 100] * 1e6, unit="us", target=Goal.below(10),
                           calls=CALLS)  # fmt: skip
        for tier, memory_bytes in (("compressed memory", 1 << 20), ("disk", 0)):
            lower = KernelCache(Path(folder), library.fetch, lambda: library.trust, loaded_bytes=0,
                                memory_bytes=memory_bytes, target=Target.here())  # fmt: skip
            lower.obtain(library.id)
            report.measure(f"verified and loaded from {tier}", _timed(lower, library.id), unit="ms", scale=1e3,
                           bundle_bytes=len(library.bundle))  # fmt: skip
            if memory_bytes:
                report.add("compressed / bundle", lower.compressed_nbytes / len(library.bundle), unit="ratio",
                           bundle_bytes=len(library.bundle))  # fmt: skip


def _timed(cache: KernelCache, kernel_id: str) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        cache.obtain(kernel_id)
        return time.perf_counter() - begin

    return run


# What is printed


def steady(report: Report, runs: list[dict[str, Any]], traces: list[Trace]) -> None:
    """The recorded runs at the default size, which has room for all of their kernels."""
    repeats = repeats_found = seeds = seeds_found = asked = 0
    for run, trace in zip(runs, traces, strict=False):
        policy, known = Ours(DEFAULT_BYTES), set()
        for ask in run["asks"]:
            for key in map(str, ask["kernels"]):
                there = policy.ask(key, trace.sizes[key])
                asked += 1
                repeats, repeats_found = repeats + (key in known), repeats_found + (key in known and there)
                seeds, seeds_found = seeds + (not ask["ahead"]), seeds_found + (not ask["ahead"] and there)
                known.add(key)
    sizes: dict[str, Any] = {"runs_recorded": len(runs), "room_mib": DEFAULT_BYTES >> 20}
    report.add("recorded runs: hits / requests for kernels asked for before", repeats_found / repeats, unit="ratio",
               target=Goal.above(0.99), requests=repeats, **sizes)  # fmt: skip
    report.add("recorded runs: hits / requests for seeds, first ones included", seeds_found / seeds, unit="ratio",
               target=Goal.above(0.99), requests=seeds, **sizes)  # fmt: skip
    counted = {name: sum(run["counted"][name] for run in runs) for name in ("hits", "misses")}
    report.add("recorded runs: hits / requests as their own caches counted, filling included",
               counted["hits"] / sum(counted.values()), unit="ratio", requests=asked, **counted)  # fmt: skip


def compare(report: Report, trace: Trace) -> tuple[int, int, float]:
    """One trace at several sizes; hits of ours, of LRU, and the bound, over all sizes."""
    total_ours, total_lru, total_best = 0, 0, 0.0
    for share in SHARES:
        room = int(share * trace.footprint)
        ours, lru, fifo = (hits(policy(room), trace.keys, trace.sizes) for policy in (Ours, Lru, S3Fifo))
        best = most_hits(trace.keys, trace.sizes, room)
        total_ours, total_lru, total_best = total_ours + ours, total_lru + lru, total_best + best
        report.add(f"{trace.name}, room for {share:.0%}: hits / possible hits", ours / trace.repeats, unit="ratio",
                   lru=round(lru / trace.repeats, 3), s3_fifo=round(fifo / trace.repeats, 3),
                   optimum_at_most=round(best / trace.repeats, 3), requests=len(trace.keys),
                   kernels=len(set(trace.keys)))  # fmt: skip
    return total_ours, total_lru, total_best


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    report = Report("cache", ["torch", "zstandard"])
    latencies(report)
    traces, runs = recorded()
    steady(report, runs, traces)
    for group, members in (("recorded", traces), ("synthetic", list(synthetic()))):
        totals = [compare(report, trace) for trace in members]
        ours, lru, best = (sum(column) for column in zip(*totals, strict=True))
        report.add(f"{group} traces, all sizes: hits / hits of LRU", ours / lru, unit="ratio",
                   target=Goal.above(1.0), hits=ours, lru=lru)  # fmt: skip
        report.add(f"{group} traces, all sizes: hits / bound of the optimum", ours / best, unit="ratio")


if __name__ == "__main__":
    main()
