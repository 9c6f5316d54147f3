"""What the ranks of a run must know of one another's steps: losses, failed kernels, how loud a newborn is.

While all seeds are dormant nothing is told: the losses are shared at the next boundary. While a seed stands in the
host, each step's numbers are summed over ranks in the background and judged at the following step, at the same one on
every rank. On a device the copies to the host get some steps to arrive, likewise the same on every rank.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.kasmina._losses import Loss, LossReader
from esper.kasmina.control import SiteHealth
from esper.kasmina.distributed import renew_reducers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.kasmina._faults import FaultDesk
    from esper.kasmina._lifecycle import Lifecycle
    from esper.kasmina._seed import SeedRun
    from esper.kasmina.distributed import Ranks, Vote

__all__ = ["Shared", "SharedStep"]

_LAG = 2
"""Steps that a device gets for a copy before the training thread waits for it."""


@dataclass(frozen=True, slots=True)
class SharedStep:
    """One optimizer step, as all ranks saw it."""

    loss: Loss | None
    """Mean over the ranks that had one; skipped where one skipped it."""
    failed: frozenset[int]
    """Seeds whose kernel failed on some rank."""
    drift: dict[int, float]
    """Mean over ranks of ``|alpha * delta| / |y|``, by seed; where it was measured."""


@dataclass(slots=True)
class _Own:
    """One step of this rank that is not told yet."""

    seeds: tuple[int, ...]
    numbers: Tensor
    event: torch.cuda.Event | None

    def ready(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.numbers


class Shared:
    """What the ranks of one run share beside the decisions.

    Args:
        ranks: of the run.
        life: its seeds.
        losses: takes the losses that all ranks know.
        faults: judges what the kernels of this rank do wrong.
    """

    def __init__(self, ranks: Ranks, life: Lifecycle, losses: LossReader, faults: FaultDesk) -> None:
        self._ranks = ranks
        self._life = life
        self._known = losses
        self._faults = faults
        self._dormant = LossReader()
        self._losses: list[Loss] = []
        self._own: deque[_Own] = deque()
        self._under_way: deque[tuple[tuple[int, ...], Vote]] = deque()

    def step(self, loss: Tensor | float | None, skipped: bool | Tensor) -> float | None:
        """After a step: act on what all know of the last one, and tell of this one without waiting.

        Args:
            loss: of this step and rank, one number.
            skipped: as for `LossReader.push`.

        Returns:
            The last loss that became known to all.
        """
        known = None
        for step in self._arrived():
            self._take(step)
            known = None if step.loss is None else step.loss.value
        standing = [run for run in self._life.runs.values() if run.attachment is not None]
        if standing:
            failed = [self._faults.unusable(run) for run in standing]
            self._own.append(_own(loss, skipped, standing, failed))
        elif loss is not None:
            self._dormant.push(loss, skipped)
            self._losses.extend(self._dormant.read())
        while self._own and (self._own[0].event is None or len(self._own) > _LAG):
            self._tell()
        return known

    def finish(self) -> None:
        """Act on everything that is not shared yet; at boundaries, on all ranks."""
        if self._ranks.alone:
            return
        while self._own:
            self._tell()
        for step in self._arrived():
            self._take(step)
        self._losses.extend(self._dormant.read(wait=True))
        losses, self._losses = self._losses, []
        by_rank = self._ranks.together(lambda: losses)
        for place in range(max(map(len, by_rank))):
            found = [told[place] for told in by_rank if place < len(told)]
            self._known.push(sum(loss.value for loss in found) / len(found), any(loss.skipped for loss in found))

    def average_isolated(self) -> None:
        """What each rank taught a seed in isolation, on data of its own, becomes one: the mean."""
        for run in self._life.runs.values():
            if run.isolation is not None:
                self._ranks.average(run.isolation.tensors())

    def health(self, found: tuple[SiteHealth, ...]) -> tuple[SiteHealth, ...]:
        """The mean of what the ranks measured at each site; where one did not, of the others."""
        if self._ranks.alone:
            return found
        by_site: dict[int, list[SiteHealth]] = {}
        for told in self._ranks.together(lambda: found):
            for site in told:
                by_site.setdefault(site.index, []).append(site)
        return tuple(_mean_health(by_site[index]) for index in sorted(by_site))

    def renew(self) -> None:
        """Where parameters began or ceased to learn: have their gradients reduced over ranks, or no longer."""
        if self._life.learners_changed:
            self._life.learners_changed = False
            if not self._ranks.alone:
                renew_reducers(self._life.model)

    def _tell(self) -> None:
        own = self._own.popleft()
        self._under_way.append((own.seeds, self._ranks.vote(own.ready())))

    def _arrived(self) -> Iterator[SharedStep]:
        """What was under way before, oldest first; waits for it."""
        while self._under_way:
            seeds, vote = self._under_way.popleft()
            yield _read(seeds, vote.result())

    def _take(self, step: SharedStep) -> None:
        if step.loss is not None:
            self._known.push(step.loss.value, step.loss.skipped)
        for run in list(self._life.runs.values()):
            if run.attachment is not None and run.index in step.drift:
                run.drift = torch.full_like(run.attachment.seed.alpha, step.drift[run.index])
            if run.attachment is not None and run.index in step.failed:
                self._faults.taken(run)


def _mean_health(found: Sequence[SiteHealth]) -> SiteHealth:
    names = [name for name in SiteHealth.__dataclass_fields__ if name != "index"]
    values = {name: [v for v in (getattr(site, name) for site in found) if v is not None] for name in names}
    means = {name: sum(known) / len(known) for name, known in values.items() if known}
    return SiteHealth(index=found[0].index, **means)


def _own(loss: Tensor | float | None, skipped: bool | Tensor, runs: Sequence[SeedRun], failed: Sequence[bool]) -> _Own:
    """Of the rank: skipped, loss, whether there is one; per seed: whether it failed, ratio, whether there is one."""
    values: list[Tensor | float] = [skipped, *((0.0, 0.0) if loss is None else (loss, 1.0))]
    for run, gone in zip(runs, failed, strict=True):
        assert run.attachment is not None
        ratio = run.attachment.seed.ratio if run.blend is not None and run.blend.needs_drift else None
        values += [gone, *((0.0, 0.0) if ratio is None else (ratio, 1.0))]
    device = next((v.device for v in values if isinstance(v, Tensor) and v.is_cuda), torch.device("cpu"))
    scalars = [v.detach() if isinstance(v, Tensor) else v for v in values]
    numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).reshape(()) for v in scalars])
    event = None
    if device.type == "cuda":
        numbers = numbers.to("cpu", non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves its events untyped
        event.record()
    return _Own(tuple(run.index for run in runs), numbers, event)


def _read(seeds: tuple[int, ...], sums: list[float]) -> SharedStep:
    skipped, loss, losses, *rest = sums
    columns = list(zip(seeds, rest[::3], rest[1::3], rest[2::3], strict=True))
    return SharedStep(
        Loss(loss / losses, bool(skipped)) if losses else None,
        frozenset(seed for seed, failed, _, _ in columns if failed),
        {seed: ratio / count for seed, _, ratio, count in columns if count},
    )
