"""Which: the kernel that fits a site and promises most for what it costs.

    score = nature * record * p / (p + c) / (p + s)

``p / (p + c)`` is the expected gain of p parameters beside the c that the site has: it saturates. ``p + s`` is what
they cost: themselves, and the share s of the budget that a seed's place in the run is worth. The best size is the
geometric mean of c and s. *Nature* is the prior of the blueprint's tags, *record* what the blueprint did in this run.
Equal scores are told apart by what the gauntlet measured: time over plain torch's first, since of one blueprint the
fastest variant is wanted, and then latency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina.control import BlendStrategy, KernelChoice
from esper.kasmina.signature import Layout
from esper.tamiyo.placement import repairs
from esper.tamiyo.shield import fits

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.kasmina.control import SiteDescriptor
    from esper.tamiyo.domain import KernelFacts, Situation

__all__ = ["Choice", "choose", "nature"]

_FACTORS: dict[str, float] = {
    "adapter": 0.7,  # thinner than its place: corrects a map, adds little width
    "linear": 0.8,  # no new non-linear features
    "dilated": 0.8,  # sees far, and at low resolution nothing new
    "attention": 0.85,  # relations pay at lengths that small hosts do not have; quadratic cost
    "separable": 0.95,
}
_POINTWISE_ON_IMAGE = 0.85  # no neighbourhood: on images the convolutions of equal size do better
_NARROW_AROUND_NARROW = 0.7  # a thin branch around a thin part is as thin


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel for a site."""

    kernel: KernelFacts
    score: float
    rivals: int
    """Kernels that fitted."""

    def __str__(self) -> str:
        latency = "" if self.kernel.latency_us is None else f", {self.kernel.latency_us:.3g} us"
        return (
            f"{self.kernel.blueprint_name} ({self.kernel.parameters} parameters{latency}) "
            f"scores {self.score:.3g}, best of {self.rivals} that fit"
        )


def nature(tags: Iterable[str], site: SiteDescriptor) -> float:
    """Prior of a blueprint at a site, 0 to 1, from its tags."""
    held = frozenset(tags)
    value = math.prod(_FACTORS.get(tag, 1.0) for tag in sorted(held))
    if site.signature.layout is Layout.IMAGE and not held & {"conv", "attention"}:
        value *= _POINTWISE_ON_IMAGE
    if repairs(site) and "adapter" in held:
        value *= _NARROW_AROUND_NARROW
    return value


def choose(situation: Situation, site: SiteDescriptor) -> Choice | None:
    """The best kernel for a site, or None where none fits."""
    hello, left = situation.hello, situation.parameters_left
    fitting = [
        kernel
        for kernel in situation.shelf.of(site.signature)
        if not fits(hello, site, kernel, left) and situation.memory.chosen_again(kernel.kernel_id)
    ]
    if not fitting:
        return None
    scored = [(_score(situation, site, kernel), kernel) for kernel in fitting]
    score, kernel = min(
        scored,
        key=lambda entry: (
            -round(entry[0], 12),
            entry[1].pace,
            math.inf if entry[1].latency_us is None else entry[1].latency_us,
            not entry[1].portable,
            entry[1].kernel_id,
        ),
    )
    return Choice(kernel, score, len(fitting))


def _score(situation: Situation, site: SiteDescriptor, kernel: KernelFacts) -> float:
    rules, hello = situation.rules, situation.hello
    share = max(1.0, hello.parameter_budget / (2 * hello.max_active_seeds))
    size = max(1, kernel.parameters)
    kept, lost = situation.memory.outcomes(kernel.blueprint_name)
    # 1 without experience; a blueprint that was kept once counts 4/3, one that was lost once 2/3.
    record = (rules.prior_weight + 2 * kept) / (rules.prior_weight + kept + lost) if rules.prior_weight else 1.0
    birth = 1.0 if kernel.zero_birth else rules.random_birth_weight
    # A thousandfold, so that scores are numbers that people read.
    return 1000 * nature(kernel.tags, site) * birth * record * size / (size + max(1, site.parameters)) / (size + share)


def blended(situation: Situation, kernel: KernelFacts) -> KernelChoice:
    """How a kernel is brought in: at once where it is born at zero, by a ramp over one boundary otherwise."""
    rules = situation.rules
    return KernelChoice(
        kernel_id=kernel.kernel_id,
        blueprint_name=kernel.blueprint_name,
        blend=BlendStrategy.IMMEDIATE if kernel.zero_birth else BlendStrategy.FIXED_RAMP,
        blend_steps=0 if kernel.zero_birth else max(1, round(situation.steps_per_boundary)),
        learning_rate_scale=rules.learning_rate_scale if kernel.zero_birth else rules.ramped_learning_rate_scale,
    )
