"""What the controller remembers of a run: from hello and states alone, carried by the run in ``controller_state``.

A memory is a value: `observe` gives the next one from a state, `noted` the one after the decisions that were let pass.
`dump` is canonical JSON, so that equal memories are equal bytes; `load` refuses what it did not write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from esper.kasmina.control import Action, Stage
from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from esper.kasmina.control import BoundaryState, SeedState
    from esper.tamiyo.domain import KernelFacts, Proposal

__all__ = ["MAX_STATE_BYTES", "VERSION", "Life", "Memory", "SiteMark", "dump", "load", "observe"]

VERSION = 1
MAX_STATE_BYTES = 1 << 20
_HISTORY = 64
_LARGEST = 1e30  # its square still fits a float; beyond it, and for NaN, nothing was measured
_OUT = frozenset({Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING, Stage.CANCELLED, Stage.ROLLED_BACK})


@dataclass(frozen=True, slots=True)
class Life:
    """One seed from its germination until its site is dormant again."""

    seed: int
    kernel_id: str
    blueprint: str
    zero_birth: bool
    born: int
    """Boundary of the germination."""
    flops_before: float | None
    """Of the whole model per sample, at that boundary."""
    seen: bool = False
    """The runtime has shown it: the germination took place."""
    ended: bool = False
    """Kept or lost: its outcome is counted."""
    embargo: int = 0
    """Boundaries that the controller closed the site for; 0 when it did not."""
    out_since: int = 0
    """Boundary at which it was first seen out of the host; 0 while it is in."""


@dataclass(frozen=True, slots=True)
class SiteMark:
    """What is known of one site."""

    site: int
    effective_rank: float | None = None
    saturation: float | None = None
    failures: int = 0
    closed_until: int = 0
    """No germination before this boundary."""
    bottleneck: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """See the module."""

    boundary: int = 0
    losses: tuple[float, ...] = ()
    """Latest validation losses that were measured, oldest first."""
    lives: tuple[Life, ...] = ()
    """By seed."""
    sites: tuple[SiteMark, ...] = ()
    """By site; only those of which something is known."""
    kept: tuple[tuple[str, int, int], ...] = ()
    """(blueprint, kept, lost) of this run, by name."""
    last_germination: int = 0
    """Boundary; 0 for never."""
    last_rollback: int = 0
    """Boundary at which the runtime last took a seed out by itself; 0 for never."""
    kernels: tuple[tuple[str, int], ...] = ()
    """(kernel, boundary before which it is not chosen again) of those that a runtime refused or took out, by id."""

    def chosen_again(self, kernel_id: str) -> bool:
        """False while a kernel that failed in this run rests."""
        return all(kernel_id != resting or until <= self.boundary for resting, until in self.kernels)

    def life(self, seed: int) -> Life | None:
        """The life of a seed, or None."""
        return next((life for life in self.lives if life.seed == seed), None)

    def marks(self) -> dict[int, SiteMark]:
        """What is known of sites, by index."""
        return {mark.site: mark for mark in self.sites}

    def outcomes(self, blueprint: str) -> tuple[int, int]:
        """(kept, lost) of a blueprint in this run."""
        return next(((kept, lost) for name, kept, lost in self.kept if name == blueprint), (0, 0))

    def noted(
        self, boundary: int, proposals: Iterable[Proposal], kernels: Mapping[str, KernelFacts], flops: float | None
    ) -> Memory:
        """The memory after these commands were given."""
        lives = {life.seed: life for life in self.lives}
        last = self.last_germination
        for proposal in proposals:
            if proposal.action is Action.GERMINATE and proposal.kernel is not None:
                facts = kernels[proposal.kernel.kernel_id]
                lives[proposal.seed] = Life(
                    proposal.seed, facts.kernel_id, facts.blueprint_name, facts.zero_birth, boundary, _sane(flops)
                )
                last = boundary
            elif proposal.action is Action.CULL and proposal.seed in lives:
                lives[proposal.seed] = replace(lives[proposal.seed], embargo=proposal.embargo_boundaries)
        return replace(self, lives=tuple(lives[seed] for seed in sorted(lives)), last_germination=last)


def _rounded(value: float | None) -> float | None:
    """Four significant digits are all that statistics deserve, and keep the state small."""
    return None if (value := _sane(value)) is None else float(f"{value:.4g}")


def _sane(value: float | None) -> float | None:
    return None if value is None or not abs(value) < _LARGEST else value


@dataclass(slots=True)
class _Draft:
    """A memory being rewritten for one boundary."""

    marks: dict[int, SiteMark]
    kept: dict[str, tuple[int, int]]
    rollback: int
    kernels: dict[str, int]
    lives: dict[int, Life] = field(default_factory=dict)

    def count(self, life: Life, *, success: bool) -> None:
        kept, lost = self.kept.get(life.blueprint, (0, 0))
        self.kept[life.blueprint] = (kept + success, lost + (not success))

    def rest(self, kernel_id: str, until: int) -> None:
        self.kernels[kernel_id] = max(self.kernels.get(kernel_id, 0), until)

    def fail(self, site: int, closed_until: int) -> None:
        mark = self.marks.get(site, SiteMark(site))
        self.marks[site] = replace(mark, failures=mark.failures + 1, closed_until=max(mark.closed_until, closed_until))


def observe(memory: Memory, state: BoundaryState, *, embargo: int, rest: int = 10) -> Memory:
    """The memory after a boundary was seen.

    Args:
        memory: before.
        state: of a later boundary.
        embargo: boundaries for which a site stays closed after the runtime or a gate refused a seed there.
        rest: boundaries for which a kernel is not chosen again that the runtime refused or took out.
    """
    resting = {kernel_id: until for kernel_id, until in memory.kernels if until > state.boundary}
    kept = {name: (kept, lost) for name, kept, lost in memory.kept}
    draft = _Draft(memory.marks(), kept, memory.last_rollback, resting)
    for health in state.sites:
        draft.marks[health.index] = replace(
            draft.marks.get(health.index, SiteMark(health.index)),
            effective_rank=_rounded(health.effective_rank),
            saturation=_rounded(health.saturation),
            bottleneck=_rounded(health.bottleneck),
        )
    seeds = {seed.index: seed for seed in state.seeds}
    known = {life.seed: life for life in memory.lives}
    for index in sorted({*known, *seeds}):
        before, seed = known.get(index), seeds.get(index)
        life = _follow(draft, before, seed, index, state.boundary, embargo)
        _rest(draft, before, seed, state.boundary + rest)
        if life is not None:
            draft.lives[index] = life
    loss = state.validation_loss
    losses = memory.losses if (loss := _sane(loss)) is None else (*memory.losses, loss)[-_HISTORY:]
    return replace(
        memory,
        boundary=state.boundary,
        losses=losses,
        lives=tuple(draft.lives.values()),
        sites=tuple(draft.marks[site] for site in sorted(draft.marks)),
        kept=tuple((name, *draft.kept[name]) for name in sorted(draft.kept)),
        last_rollback=draft.rollback,
        kernels=tuple(sorted(draft.kernels.items())),
    )


def _rest(draft: _Draft, before: Life | None, seed: SeedState | None, until: int) -> None:
    """Let a kernel rest: the runtime refused to germinate it, or found it at fault. It would do the same elsewhere."""
    if before is None or before.ended or not before.kernel_id:
        return
    refused = seed is None and not before.seen
    # A loss that rose is the place's doing as much as the kernel's.
    at_fault = seed is not None and seed.failure and seed.stage in _OUT - {Stage.ROLLED_BACK}
    if refused or at_fault:
        draft.rest(before.kernel_id, until)


def _follow(
    draft: _Draft, life: Life | None, seed: SeedState | None, index: int, boundary: int, embargo: int
) -> Life | None:
    """One seed, one boundary on; None when nothing of it has to be remembered any longer."""
    if seed is None:
        # Dormant. A seed that was never shown had its germination refused: another attempt at once would be refused
        # too.
        if life is not None and not life.ended and not (life.seen and life.out_since):
            draft.fail(index, boundary + embargo)
            draft.count(life, success=False)
        return None
    if life is None:
        # Grown by somebody else, or before a memory that was lost: followed all the same.
        life = Life(index, seed.kernel_id, "", True, boundary, None)  # noqa: FBT003  # a birth that is unknown
    life = replace(life, seen=True)
    if seed.stage is Stage.FOSSILIZED and not life.ended:
        draft.count(life, success=True)
        return replace(life, ended=True)
    if seed.stage in _OUT and not life.out_since:
        # A kernel that could not be had is cancelled: it never touched the host, and nobody has to calm down.
        harmed = seed.failure and seed.stage in {Stage.CULLED, Stage.EMBARGOED}
        if harmed or seed.stage is Stage.ROLLED_BACK:
            draft.rollback = boundary
        if not life.ended:
            draft.fail(index, boundary + (life.embargo or embargo))
            draft.count(life, success=False)
        return replace(life, ended=True, out_since=boundary)
    return life


# Serialisation


def dump(memory: Memory) -> bytes:
    """Canonical JSON of a memory: lists in the order of the fields, no spaces."""
    document = {name: _plain(getattr(memory, name)) for name in (f.name for f in fields(Memory))}
    return json.dumps([VERSION, document], separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    # Not `asdict`, which copies deeply and took half of a decision's time.
    kind = type(value)
    return _COLUMNS[kind](value) if kind in _COLUMNS else value


_COLUMNS = {kind: attrgetter(*(f.name for f in fields(kind))) for kind in (Life, SiteMark)}


def load(data: bytes) -> Memory:
    """Read what `dump` wrote; empty bytes are a fresh memory.

    Raises:
        InvalidInput: reason CONTROLLER_STATE: not written by this controller; CONTROLLER_STATE_VERSION: by another
            version of it.
    """
    if not data:
        return Memory()
    try:
        version, document = json.loads(data)
        if version != VERSION:
            raise InvalidInput(
                f"controller state: expected version {VERSION}, found {version!r:.20}",
                reason="CONTROLLER_STATE_VERSION",
            )
        return Memory(
            boundary=int(document["boundary"]),
            losses=tuple(float(loss) for loss in document["losses"]),
            lives=tuple(Life(*entry) for entry in document["lives"]),
            sites=tuple(SiteMark(*entry) for entry in document["sites"]),
            kept=tuple((str(name), int(kept), int(lost)) for name, kept, lost in document["kept"]),
            last_germination=int(document["last_germination"]),
            last_rollback=int(document["last_rollback"]),
            # Written since runtimes tell of kernels at fault.
            kernels=tuple((str(kernel_id), int(until)) for kernel_id, until in document.get("kernels", ())),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(
            f"controller state: expected what version {VERSION} of this controller wrote, found {error!s:.80}",
            reason="CONTROLLER_STATE",
        ) from error
