"""Measures what the gates and blend strategies ask, from the living objects of a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from esper.kasmina import seeds
from esper.kasmina.attach import SeedModule, child_name
from esper.kasmina.blending import Signals
from esper.kasmina.newborn import MARK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.kasmina._gradient import Gradient
    from esper.kasmina._seed import SeedRun
    from esper.kasmina._watch import GraftWatch
    from esper.kasmina.config import Config
    from esper.kasmina.newborn import NewbornGroups
    from esper.kasmina.spikes import SpikeDetector

__all__ = ["graft", "has_statistics", "impact", "interface", "learning", "leftovers", "shapes", "signals"]


def has_statistics(model: nn.Module) -> bool:
    """True where a norm of the host keeps running statistics, which need time to settle after a graft."""
    norms = nn.modules.batchnorm._NormBase  # noqa: SLF001  # the base of batch and instance norms has no public name
    return any(isinstance(module, norms) and module.track_running_stats for module in model.modules())


def shapes(module: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and element type of each parameter."""
    return {name: (tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()}


def learning(run: SeedRun, config: Config) -> seeds.LearningFacts:
    """For G1; measures the held-out objective of a seed in isolation."""
    finite, norm = run.birth_finite, run.birth_gradient
    if run.isolation is not None:
        run.isolation_gain, run.held_out, norm = run.isolation.measure()
        finite = finite and run.isolation.finite
    return seeds.LearningFacts(
        finite=finite,
        gradient_norm=norm,
        gradient_limit=config.gradient_limit,
        needs_isolation=run.isolation is not None,
        isolation_gain=run.isolation_gain,
        held_out=run.held_out,
        min_held_out=config.isolation_min_held_out,
    )


def graft(run: SeedRun, config: Config, steps: int, detector: SpikeDetector) -> seeds.GraftFacts:
    """For G2."""
    assert run.attachment is not None
    assert run.blend is not None
    ratio = run.attachment.seed.ratio
    return seeds.GraftFacts(
        ramp_complete=run.blend.complete,
        steps=steps,
        min_steps=config.min_graft_steps,
        losses=detector.seen - run.losses_before,
        high=detector.high,
        drift=None if ratio is None else float(ratio),
        drift_limit=config.drift_limit,
    )


def interface(run: SeedRun, groups: NewbornGroups, steps: int, settle_steps: int) -> seeds.InterfaceFacts:
    """For G3."""
    now = shapes(run.module)
    return seeds.InterfaceFacts(
        groups_per_parameter=groups.memberships(run.module.parameters()),
        changed=tuple(name for name, form in run.shapes.items() if now.get(name) != form),
        steps=steps,
        settle_steps=settle_steps,
    )


def impact(run: SeedRun, config: Config, steps: int, boundaries: int) -> seeds.ImpactFacts:
    """For G4."""
    price = config.price_per_million_parameters * run.parameters / 1e6 + config.price_per_gigaflop * run.flops / 1e9
    return seeds.ImpactFacts(
        counterfactual=run.counterfactual,
        price=price,
        boundaries=boundaries,
        min_boundaries=config.probation_boundaries,
        steps=steps,
        min_steps=config.probation_steps,
    )


def leftovers(run: SeedRun, model: nn.Module, groups: NewbornGroups, watch: GraftWatch) -> seeds.ResetFacts:
    """For G5: what is still there of a seed, looked for in the model and the optimizer themselves.

    Moments of tensors that are in no group can be nobody's but a newborn's that was taken out.
    """
    name, optimizer = child_name(run.index), groups.optimizer
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    marked = sum(group.get(MARK) == run.index for group in optimizer.param_groups)
    keys: list[object] = list(optimizer.state)
    orphans = sum(isinstance(key, Tensor) and id(key) not in held for key in keys)
    kept = [part is not None for part in (run.attachment, run.isolation, run.blend, run.kernel)]
    return seeds.ResetFacts(
        parameters=sum(name in path.split(".") for path, _ in model.named_parameters()),
        optimizer_entries=marked + orphans,
        hooks=sum(_is_of(hook, run.index) for module in model.modules() for hook in _hooks(module)),
        cache_entries=sum([*kept, run.index in groups, run.index in watch]),
    )


def _hooks(module: nn.Module) -> Iterator[object]:
    yield from module._forward_pre_hooks.values()  # noqa: SLF001  # torch has no other way to see what is registered
    yield from module._forward_hooks.values()  # noqa: SLF001  # likewise


def _is_of(hook: object, seed: int) -> bool:
    owner = getattr(hook, "__self__", None)
    return isinstance(owner, SeedModule) and owner.index == seed


def signals(run: SeedRun, groups: NewbornGroups, loss: Tensor | float | None, gradient: Gradient | None) -> Signals:
    """For a blend strategy after an optimizer step."""
    assert run.attachment is not None
    assert run.blend is not None
    newborn = host = None
    if run.blend.needs_host_gradient:
        norm = groups.gradient_norm(run.index)
        newborn = None if norm is None else norm / max(1, run.parameters) ** 0.5
        host = None if gradient is None else gradient.rms
    drift = run.attachment.seed.ratio if run.drift is None else run.drift
    return Signals(loss=loss, drift=drift, newborn_gradient=newborn, host_gradient=host)
