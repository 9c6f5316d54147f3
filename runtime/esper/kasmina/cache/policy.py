"""Who stays when there is no room for all: Greedy-Dual-Size-Frequency. Pure: keys and sizes, no kernels, no locks.

The algorithm is GDSF (Cherkasova: "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy",
HP Laboratories HPL-98-69R1, 1998; after Cao, Irani: "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997). Each key
has the priority ``clock + frequency / size``, set anew whenever it is asked for; the lowest priority leaves first and
becomes the clock, so that what was popular long ago is overtaken by what is asked for now. Three additions:

- A newcomer takes part at once: where its own priority is the lowest it is the one that leaves. This is the admission.
- Frequencies are remembered for keys that left, end at three (as in S3-FIFO: Yang et al., SOSP 2023; more makes a
  cache slow to follow a demand that moves on), and are halved after ten requests for each key that is there (the ageing
  of TinyLFU: Einziger, Friedman, Manes, ACM Transactions on Storage 13(4), 2017).
- What is pinned never leaves, and is taken in even where that exceeds the capacity.

Why this one: kernels are small and many (portable graphs, tens of kilobytes) or large and few (compiled for a machine,
megabytes), and a miss costs about the same for both. ``make bench-cache`` compares it with others and with the optimum.

    policy = GreedyDual(capacity=1 << 20)
    policy.touch("a")                  # somebody asks for it
    gone = policy.put("a", 70_000)     # it was loaded: who has to leave for it, perhaps "a" itself
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

__all__ = ["GreedyDual"]

_TOP = 3
_REQUESTS_PER_KEY = 10
_FEWEST_REQUESTS = 160


class _Standing(NamedTuple):
    priority: float
    size: int


class GreedyDual:
    """Keys and sizes that fit a capacity; not thread-safe.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._clock = 0.0
        # In the order of the last use, which decides between equal priorities.
        self._standings: dict[str, _Standing] = {}
        self._pinned: set[str] = set()
        self._frequencies: Counter[str] = Counter()
        self._requests = 0

    @property
    def size(self) -> int:
        """Bytes of all keys."""
        return self._size

    @property
    def capacity(self) -> int:
        """What `size` stays within, but for what is pinned."""
        return self._capacity

    def __contains__(self, key: str) -> bool:
        return key in self._standings

    def __len__(self) -> int:
        return len(self._standings)

    def touch(self, key: str) -> None:
        """Count a request, whether the key is there or not."""
        self._frequencies[key] = min(_TOP, self._frequencies[key] + 1)
        self._requests += 1
        if self._requests >= max(_FEWEST_REQUESTS, _REQUESTS_PER_KEY * len(self._standings)):
            self._fade()
        found = self._standings.pop(key, None)
        if found is not None:
            self._place(key, found.size)

    def put(self, key: str, size: int) -> list[str]:
        """Take a key in, or in again with another size; the keys that leave, itself included where not admitted."""
        self.remove(key)
        self._place(key, size)
        self._size += size
        return self.settle()

    def remove(self, key: str) -> None:
        """The key is gone; its frequency is remembered. Nothing happens when it was not there."""
        found = self._standings.pop(key, None)
        if found is not None:
            self._size -= found.size

    def pin(self, key: str) -> None:
        """From now on the key does not leave; it need not be there yet."""
        self._pinned.add(key)

    def unpin(self, key: str) -> None:
        """From now on the key is like any other; `settle` makes the room that its pin denied."""
        self._pinned.discard(key)

    def settle(self, capacity: int | None = None) -> list[str]:
        """Make room, within a new capacity where one is given; the keys that leave."""
        if capacity is not None:
            self._capacity = capacity
        gone: list[str] = []
        while self._size > self._capacity:
            key = min(
                (key for key in self._standings if key not in self._pinned),
                key=lambda key: self._standings[key].priority,
                default=None,
            )
            if key is None:
                break
            self._clock = self._standings[key].priority
            self.remove(key)
            gone.append(key)
        return gone

    def _place(self, key: str, size: int) -> None:
        # A frequency that has faded away is no reason to go before a key that was asked for once.
        frequency = max(1, self._frequencies.get(key, 0))
        self._standings[key] = _Standing(self._clock + frequency / max(1, size), size)

    def _fade(self) -> None:
        self._requests //= 2
        self._frequencies = Counter({key: count // 2 for key, count in self._frequencies.items() if count > 1})
