"""Other ways to decide what stays in a cache, and the best that any could do: what `bench_cache` compares with.

All see the same requests: a list of keys, and a size for each key. A key that is not there is loaded, and offered.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from esper.kasmina.cache.policy import GreedyDual

__all__ = ["Ask", "Lru", "Ours", "S3Fifo", "hits", "most_hits"]

Trace = Sequence[str]
Sizes = Mapping[str, int]


class Ask(Protocol):
    """A policy as the replay sees it."""

    def ask(self, key: str, size: int) -> bool:
        """Ask for a key, loading it when it is not there; whether it was."""


class Ours:
    """`GreedyDual`, used as the cache uses it."""

    def __init__(self, capacity: int) -> None:
        self._policy = GreedyDual(capacity)

    def ask(self, key: str, size: int) -> bool:
        """See `Ask`."""
        there = key in self._policy
        self._policy.touch(key)
        if not there:
            self._policy.put(key, size)
        return there


class Lru:
    """What was used longest ago leaves."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._keys: OrderedDict[str, int] = OrderedDict()

    def ask(self, key: str, size: int) -> bool:
        """See `Ask`."""
        if key in self._keys:
            self._keys.move_to_end(key)
            return True
        if size <= self._capacity:
            self._keys[key] = size
            self._size += size
        while self._size > self._capacity:
            self._size -= self._keys.popitem(last=False)[1]
        return False


class S3Fifo:
    """Three queues (Yang et al.: "FIFO queues are all you need for cache eviction", SOSP 2023), sizes in bytes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._small: OrderedDict[str, int] = OrderedDict()
        self._main: OrderedDict[str, int] = OrderedDict()
        self._ghosts: OrderedDict[str, None] = OrderedDict()
        self._seen: dict[str, int] = {}

    def ask(self, key: str, size: int) -> bool:
        """See `Ask`."""
        if key in self._small or key in self._main:
            self._seen[key] = min(3, self._seen[key] + 1)
            return True
        if size > self._capacity:
            return False
        known = key in self._ghosts
        self._ghosts.pop(key, None)
        (self._main if known else self._small)[key] = size
        self._seen[key] = 0
        while sum(self._small.values()) + sum(self._main.values()) > self._capacity:
            self._evict()
        return False

    def _evict(self) -> None:
        if self._small and (sum(self._small.values()) > 0.1 * self._capacity or not self._main):
            key, size = self._small.popitem(last=False)
            if self._seen[key]:
                self._main[key], self._seen[key] = size, 0
            else:
                self._ghosts[key] = None
                while len(self._ghosts) > max(1, len(self._main)):
                    self._ghosts.popitem(last=False)
            return
        key, size = self._main.popitem(last=False)
        if self._seen[key]:
            self._main[key] = size
            self._seen[key] -= 1


def hits(policy: Ask, trace: Trace, sizes: Sizes) -> int:
    """How many requests found their key there."""
    return sum(policy.ask(key, sizes[key]) for key in trace)


def most_hits(trace: Trace, sizes: Sizes, capacity: int) -> float:
    """A bound that no policy can exceed, although it knew the future and the sizes.

    A hit needs its key to stay from one request to the next, and at no time may all that stays exceed the capacity:
    the most of that is a linear programme (flow-based offline optimum: Berger, Beckmann, Harchol-Balter, SIGMETRICS
    2018), solved for fractions of keys. For equal sizes it is what Belady's algorithm reaches when it may decline.
    """
    last: dict[str, int] = {}
    stays = []
    for time, key in enumerate(trace):
        if key in last and sizes[key] <= capacity:
            stays.append((last[key], time, sizes[key]))
        last[key] = time
    if not stays:
        return 0.0
    columns = np.concatenate([np.full(end - begin, index) for index, (begin, end, _) in enumerate(stays)])
    rows = np.concatenate([np.arange(begin, end) for begin, end, _ in stays])
    weights = np.concatenate([np.full(end - begin, size / capacity) for begin, end, size in stays])
    usage = csr_matrix((weights, (rows, columns)), shape=(len(trace), len(stays)))
    solved = linprog(-np.ones(len(stays)), A_ub=usage, b_ub=np.ones(len(trace)), bounds=(0, 1), method="highs")
    return float(-solved.fun)
