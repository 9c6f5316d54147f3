"""Every number that the controller decides by, with its default, its bound and its reason; see docs/tamiyo.md."""

from typing import Annotated, Literal

from pydantic import Field

from esper.mesh.settings import Section

__all__ = ["Rules"]

Count = Annotated[int, Field(ge=0, le=1_000_000)]
Some = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Rules(Section):
    """Rules of the safety shield and of the heuristic policy. A boundary is one validation of the run."""

    warmup_boundaries: Count = 1
    """Boundaries before the first germination. One, because a graft captures 0.73 of its gain at a tenth of the
    schedule and 0.25 at half of it: what is not yet measured at boundary 1 is the only reason to wait."""

    saturation_threshold: Fraction = 0.5
    """Effective rank over narrowest width from which a width counts as used up: grow without waiting for a plateau."""

    saturation_floor: Fraction = 0.2
    """Below it a site has no deficit and is left alone even on a plateau: on a healthy host grafting is neutral."""

    place_by: Literal["width", "bottleneck"] = "width"
    """What ranks sites: the narrowest width, or the bottleneck score, after which sites that have none follow by width.
    Both chose equally well where that was measured (regret 0.8 points); the width is known before anything is."""

    plateau_window: Annotated[int, Field(ge=3, le=64)] = 5
    """Boundaries over which the slope of the validation loss is fitted."""

    plateau_noise: Weight = 2.0
    """A plateau: the fitted change over the window is less than this many standard errors of the fit. A loss that rises
    by more is no plateau, and opens nothing."""

    plateau_relative: Weight = 0.005
    """... or less than this part of the loss per boundary, however small the noise."""

    min_spacing_boundaries: Some = 1
    """Boundaries between two germinations; several seeds are told apart by their paired counterfactuals."""

    probation_epochs: Annotated[float, Field(gt=0, le=1000)] = 2.0
    """Length of the probation: a probe of half an epoch chooses wrongly by 2.2 points, of two epochs by 0.55."""

    probation_boundaries: Some = 2
    """The same where the run does not count epochs."""

    probation_extensions: Count = 1
    """Further boundaries for a seed whose mean gain is above its price while the lower bound is not."""

    measure_patience: Count = 1
    """Boundaries after the probation for a counterfactual that is missing."""

    benefit_boundaries: Count = 2
    """Boundaries that must remain after the probation for the growth to pay."""

    loading_boundaries: Some = 1
    """Boundaries that a kernel needs from GERMINATED into the host."""

    loading_patience: Some = 3
    """Boundaries for a kernel to arrive; then the seed is cancelled."""

    training_patience: Some = 3
    """Boundaries in isolation without the learning gate opening; then the seed is cancelled."""

    graft_patience: Some = 4
    """Boundaries in GRAFTING, STABILIZING or EVALUATING with a closed gate; then the seed is culled."""

    price_parameters: Weight = 0.002
    """lambda: part of the validation loss that a growth by as many parameters as the host has must be worth."""

    price_flops: Weight = 0.002
    """mu: part of the validation loss that a doubling of the host's floating-point operations must be worth."""

    embargo_boundaries: Some = 4
    """Boundaries for which the site of a culled seed stays closed."""

    kernel_rest_boundaries: Some = 10
    """Boundaries for which a kernel is not chosen again that the runtime refused or found at fault."""

    lock_boundaries: Some = 10
    """Boundaries after which the lock of a rolled-back seed expires."""

    rollback_cooldown: Count = 2
    """Boundaries without any germination after the runtime took a seed out by itself."""

    site_attempts: Some = 2
    """Seeds that may fail at one site; then it is left alone."""

    learning_rate_scale: Annotated[float, Field(gt=0, le=100)] = 3.0
    """Rate of a zero-output newborn over the host's: x3 gave +2.2 points over x1, x10 nothing more, x0.3 cost 3.6."""

    ramped_learning_rate_scale: Annotated[float, Field(gt=0, le=100)] = 1.0
    """The same for a seed that was trained in isolation and is blended in: it is no newborn any more."""

    random_birth_weight: Fraction = 0.8
    """Expected gain of a random birth over that of a zero birth: isolation and ramp cost boundaries."""

    prior_weight: Weight = 2.0
    """Outcomes of this run that the prior of a blueprint outweighs."""

    prefetch: Annotated[int, Field(ge=0, le=64)] = 3
    """Kernels named for the runtime's cache ahead of time."""
