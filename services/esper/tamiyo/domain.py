"""What a policy sees and says: plain frozen data, without gRPC, contracts or torch.

A policy is pure: equal situations give equal judgements. `Policy` is the seam at which another one (learned, say) is
put in; whatever it says passes the shield.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from esper.kasmina.seeds import LIVING
from esper.tamiyo.overlap import Overlaps

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from esper.kasmina.control import Action, BoundaryState, KernelChoice, RunHello, SeedState, SiteDescriptor, Stage
    from esper.kasmina.signature import Signature
    from esper.tamiyo.memory import Memory, SiteMark
    from esper.tamiyo.rules import Rules

__all__ = ["Judgement", "KernelFacts", "Policy", "Proposal", "Shelf", "Situation"]

_MOST_PER_EPOCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFacts:
    """A validated kernel, as the library describes it."""

    kernel_id: str
    blueprint_id: str
    blueprint_name: str
    signature: Signature
    portable: bool
    """True: runs on every machine. False: compiled for `target` alone."""
    target: str
    zero_birth: bool
    """Exactly zero output at birth; else random."""
    causal: bool
    parameters: int
    flops_per_position: int
    """0: unknown."""
    latency_us: float | None
    """Measured median of the forward; None where the verdict does not say."""
    tags: tuple[str, ...] = ()
    """Of its blueprint."""
    pace: float = 1.0
    """Time of a training step over plain torch's, where it is faster; 1 where plain torch runs."""


class Shelf:
    """The validated kernels at one moment, by signature; immutable."""

    def __init__(self, kernels: Iterable[KernelFacts] = ()) -> None:
        self.kernels: Mapping[str, KernelFacts] = {k.kernel_id: k for k in sorted(kernels, key=lambda k: k.kernel_id)}
        by_signature: dict[Signature, list[KernelFacts]] = {}
        for kernel in self.kernels.values():
            by_signature.setdefault(kernel.signature, []).append(kernel)
        self._by_signature = {signature: tuple(found) for signature, found in by_signature.items()}

    def of(self, signature: Signature) -> tuple[KernelFacts, ...]:
        """Kernels of exactly this signature, by id."""
        return self._by_signature.get(signature, ())


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A run at a boundary, with what is remembered of it and what the library holds."""

    hello: RunHello
    state: BoundaryState
    memory: Memory
    """Everything up to and including this boundary."""
    shelf: Shelf
    rules: Rules
    overlaps: Overlaps | None = None
    """Of the host's sites, where they were worked out before."""

    def around(self, seed: int) -> frozenset[int]:
        """Indices of the sites that cover the same modules as a seed's."""
        return (self._own_overlaps if self.overlaps is None else self.overlaps).around(seed)

    @cached_property
    def _own_overlaps(self) -> Overlaps:
        return Overlaps(self.hello.sites)

    @cached_property
    def sites(self) -> Mapping[int, SiteDescriptor]:
        """By index."""
        return {site.index: site for site in self.hello.sites}

    @cached_property
    def seeds(self) -> Mapping[int, SeedState]:
        """Those that are not dormant, by index."""
        return {seed.index: seed for seed in self.state.seeds}

    @cached_property
    def marks(self) -> Mapping[int, SiteMark]:
        """What is remembered of sites, by index."""
        return self.memory.marks()

    @cached_property
    def steps_per_boundary(self) -> float:
        """Optimizer steps between validations, from the run so far; at least 1."""
        return max(1.0, self.state.step / self.state.boundary)

    @cached_property
    def boundaries_left(self) -> float | None:
        """Boundaries until the schedule ends; None where its length is unknown."""
        total = self.hello.total_steps
        return None if total is None else max(0.0, (total - self.state.step) / self.steps_per_boundary)

    @cached_property
    def probation(self) -> int:
        """Boundaries of a probation: `probation_epochs` where the run counts epochs."""
        epoch, boundary = self.state.epoch, self.state.boundary
        # A counter that has not moved in a thousand boundaries counts something else.
        if epoch is None or not math.isfinite(epoch) or epoch * _MOST_PER_EPOCH < boundary:
            return self.rules.probation_boundaries
        return max(1, math.ceil(self.rules.probation_epochs * boundary / epoch - 1e-6))

    @property
    def in_last_decay(self) -> bool:
        """Whether the learning rate decays for the last time; False where the run did not say."""
        total, start = self.hello.total_steps, self.hello.decay_start
        return total is not None and start is not None and self.state.step >= start * total

    @cached_property
    def parameters_left(self) -> int:
        """Budget of the run minus what has grown and what is on its way, in elements.

        A seed has no parameters until it is attached; those of its kernel are spoken for all the same.
        """
        coming = [seed.kernel_id for seed in self.state.seeds if not seed.parameters and seed.stage in LIVING]
        kernels = self.shelf.kernels
        reserved = sum(kernels[kernel_id].parameters for kernel_id in coming if kernel_id in kernels)
        return self.hello.parameter_budget - self.state.parameters_added - reserved


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One command that a policy would give."""

    seed: int
    action: Action
    reason: str
    """UPPER_SNAKE."""
    explanation: str
    """The numbers that decided, in one short sentence: a decision has some 200 bytes, and fields for all the rest."""
    to_stage: Stage | None = None
    kernel: KernelChoice | None = None
    embargo_boundaries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a policy says to a situation."""

    proposals: tuple[Proposal, ...]
    explanation: str
    """What else was weighed, and why nothing (more) should be done, with the numbers; one sentence."""
    prefetch: tuple[str, ...] = field(default=())
    """Kernels that are likely next."""


class Policy(Protocol):
    """Decides; pure and deterministic."""

    @property
    def name(self) -> str:
        """Like ``heuristic``."""

    @property
    def version(self) -> str:
        """Equal versions decide equally."""

    def decide(self, situation: Situation) -> Judgement:
        """What should be done at this boundary."""
