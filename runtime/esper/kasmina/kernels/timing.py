"""Times of small pieces of work beside one another: interleaved, so that a disturbance of the machine hits all sides.

Counted on a CPU is processor time of the process, on one thread the same as wall time of an idle machine: a build or a
gauntlet that shares its machine with a trainer would otherwise measure the trainer. On a GPU it is wall time until the
device is done.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

__all__ = ["Paired", "Step", "interleaved", "paired"]


class Paired(NamedTuple):
    """Two series of times, pair by pair."""

    ratio: float
    """Median of the first over the second: what slowed the machine for a while slowed both of a pair."""
    noise: float
    """Half the distance between the quartiles of these ratios, as a share of their median."""


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two series of `interleaved`, of at least two repeats."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Paired(middle, (high - low) / 2 / middle)


def interleaved(
    works: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    least: int,
    most: int,
    clock: Callable[[], int] = time.process_time_ns,
) -> dict[str, list[float]]:
    """Times of each work in microseconds, one repeat of each in turn.

    Args:
        works: by name.
        budget_s: time after which no further repeat begins.
        least: repeats that are done in any case.
        most: repeats at most.
        clock: in nanoseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(2):
        for work in works.values():
            work()
    end = time.perf_counter() + budget_s
    for repeat in range(most):
        if repeat >= least and time.perf_counter() >= end:
            break
        for name, work in works.items():
            began = clock()
            work()
            times[name].append((clock() - began) / 1e3)
    return times


class Step:
    """Forward and backward of one module on one input.

    Args:
        module: whose parameters want gradients.
        x: a leaf that wants one.
        cotangent: gradient of the output.
    """

    def __init__(self, module: nn.Module, x: Tensor, cotangent: Tensor) -> None:
        self.module = module
        self.x = x
        self.cotangent = cotangent

    def __call__(self) -> None:
        """Once, leaving no gradient behind."""
        torch.autograd.backward(self.module(self.x), self.cotangent)
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        if self.x.is_cuda:
            torch.cuda.synchronize()

    def infer(self) -> None:
        """The forward alone, without gradients."""
        with torch.no_grad():
            self.module(self.x)
