"""Optimizer groups of newborns: a learning rate that follows the host's, no weight decay in probation, clipping.

One ``add_param_group`` per seed, so momentum of the host is kept and newborns start at zero moments. Just before each
optimizer step, every option of a newborn's group follows the host group of its site, the learning rate multiplied by
its scale, so any schedule is followed. After FOSSILIZED scale and weight decay go smoothly to the host's values.

What is done to a newborn's gradient is done where it is whole: before the step, or where the step is given a closure
that computes it, after each evaluation of that. With a gradient scaler it is judged as if it were not scaled, also
where a fused optimizer does the unscaling itself.

Schedulers of torch 2.13 zip their own lists with ``optimizer.param_groups`` strictly and would raise as soon as a
group is added or removed. They are therefore given a view of the optimizer that shows the host's groups alone;
`hide_from_schedulers`. While there is no newborn nothing of this stands on the optimizer, and no scheduler is
touched. (One hook that counts the steps done always does: `_steps`.)
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.kasmina._quiet import harmless
from esper.kasmina._shards import own, whole
from esper.kasmina._steps import gradient_scale
from esper.mesh.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle

__all__ = ["MARK", "NewbornGroups", "hide_from_schedulers", "host_groups"]

MARK = "esper_seed"
"""Key of a newborn's group that holds its seed's index; saved with the optimizer's state."""
_OWN = frozenset({"params", "param_names", "lr", "weight_decay", "initial_lr", MARK})
_ALPHA_FLOOR = 0.05
_UNFIT: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "takes one parameter group only",
    torch.optim.SparseAdam: "takes sparse gradients only, and those of newborns are dense",
    torch.optim.Muon: "takes matrices only, and newborns have vectors too",
}


def host_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups that are not of newborns, in their order."""
    return [group for group in optimizer.param_groups if MARK not in group]


class _HostView:
    """An optimizer whose ``param_groups`` are the host's alone; everything else is the optimizer itself."""

    def __init__(self, optimizer: Any) -> None:
        object.__setattr__(self, "_esper_optimizer", optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return host_groups(object.__getattribute__(self, "_esper_optimizer"))

    @property  # type: ignore[misc]  # other schedulers that are made of this one's optimizer ask for its type
    def __class__(self) -> type:
        return type(object.__getattribute__(self, "_esper_optimizer"))

    def __eq__(self, other: object) -> bool:
        mine = object.__getattribute__(self, "_esper_optimizer")
        return mine is other or (
            type(other) is _HostView and mine is object.__getattribute__(other, "_esper_optimizer")
        )

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_esper_optimizer"))

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_esper_optimizer"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_esper_optimizer"), name, value)

    def __reduce__(self) -> tuple[object, ...]:
        return _HostView, (object.__getattribute__(self, "_esper_optimizer"),)


def hide_from_schedulers(optimizer: Any) -> int:
    """Give every living scheduler of `optimizer` a view of the host's groups; returns how many were found.

    Schedulers hold the optimizer, or something around it that shows the same groups (as accelerate's does), not the
    other way round, so the collector is asked who refers to it: milliseconds, when a seed is grafted or taken out,
    never on a step.
    """
    count = 0
    groups = len(host_groups(optimizer))
    holders = gc.get_referrers(optimizer)
    # An object refers to its attributes by a dictionary, or without one until somebody asks for it.
    holders += gc.get_referrers(*(holder for holder in holders if type(holder) is dict))
    for holder in holders:
        kind = type(holder)
        if issubclass(kind, Optimizer) and vars(holder).get("optimizer") is optimizer:
            count += hide_from_schedulers(holder)
        if not issubclass(kind, LRScheduler) or vars(holder).get("optimizer") is not optimizer:
            continue
        holder.optimizer = _HostView(optimizer)
        # A scheduler that was made while newborns lived has entries for them, after those of the host.
        for name, value in vars(holder).items():
            if isinstance(value, list) and len(value) == len(optimizer.param_groups) > groups:
                setattr(holder, name, value[:groups])
        count += 1
    return count


@dataclass(slots=True)
class _Entry:
    seed: int
    scale: float
    host: int
    """Position of the site's group among the host's groups."""
    names: tuple[str, ...]
    alpha: Tensor | None = None
    """Set while alpha ramps: the gradient is divided by it."""
    merging: int = -1
    """Steps since FOSSILIZED; -1 before."""
    frozen: bool = False
    norm: Tensor | None = None


class NewbornGroups:
    """The groups of all seeds that learn with the host.

    Args:
        optimizer: the host's.
        clip_norm: largest L2 norm of the gradient of one newborn; larger ones are scaled down.
        merge_steps: steps over which a fossilized seed takes over the host's learning rate and weight decay.
    """

    def __init__(self, optimizer: Optimizer, *, clip_norm: float = 1.0, merge_steps: int = 200) -> None:
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.merge_steps = merge_steps
        self._entries: dict[int, _Entry] = {}
        self._hook: RemovableHandle | None = None
        self._look_again = False
        """The run was resumed and no step was done since: schedulers may have been made after the groups came back."""

    def __contains__(self, seed: int) -> bool:
        return seed in self._entries

    def unfit(self) -> str:
        """Why this optimizer can not take newborns; empty where it can."""
        for kind, why in _UNFIT.items():
            if isinstance(self.optimizer, kind):
                return f"the optimizer {kind.__name__} {why}"
        return ""

    def add(
        self, seed: int, parameters: Sequence[tuple[str, nn.Parameter]], site: Iterable[nn.Parameter], scale: float
    ) -> None:
        """Add a group for a newborn beside the host group that holds the parameters of its site.

        Args:
            seed: index.
            parameters: named parameters of the newborn, in a fixed order.
            site: host parameters of the site; the first one that is found in a group decides which group is followed.
            scale: learning rate over that of the host's group.

        Raises:
            Conflict: the seed has a group already.
        """
        if seed in self._entries:
            raise Conflict(f"seed {seed}: expected no optimizer group yet, found one")
        hide_from_schedulers(self.optimizer)
        wanted = {id(p) for p in site}
        groups = host_groups(self.optimizer)
        host = next((i for i, g in enumerate(groups) if any(id(p) in wanted for p in g["params"])), 0)
        names = tuple(name for name, _ in parameters)
        entry = self._entries[seed] = _Entry(seed, scale, host, names)
        like = groups[host]
        group = {key: like[key] for key in self.optimizer.defaults if key in like}
        named = "param_names" in like
        group["params"] = list(parameters) if named else [p for _, p in parameters]
        group |= {MARK: seed, "lr": _copy(like["lr"])}
        if "initial_lr" in like:
            # Schedulers that are made later take it from every group that they are shown.
            group["initial_lr"] = _copy(like["initial_lr"])
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
        self.optimizer.add_param_group(group)
        self._follow(entry, self._group(seed), like)
        if self._hook is None:
            self._hook = self.optimizer.register_step_pre_hook(harmless(self._before_step))

    def remove(self, seed: int) -> None:
        """Remove a newborn's group and every trace of its parameters in the optimizer's state."""
        if self._entries.pop(seed, None) is None:
            return
        hide_from_schedulers(self.optimizer)
        group = self._group(seed)
        for parameter in group["params"]:
            self.optimizer.state.pop(parameter, None)
            parameter.grad = None
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if g is not group]
        if not self._entries and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def compensate(self, seed: int, alpha: Tensor | None) -> None:
        """Divide the newborn's gradient by alpha while it ramps, so that a small alpha does not starve it."""
        self._entries[seed].alpha = alpha

    def freeze(self, seed: int, frozen: bool) -> None:
        """Stop or resume learning; moments are kept.

        The parameters go on asking for gradients, which are dropped before the optimizer sees them: what is compiled,
        or reduced over ranks, stays as it is.
        """
        self._entries[seed].frozen = frozen

    def merge(self, seed: int) -> None:
        """Begin to take over the host's learning rate and weight decay."""
        self._entries[seed].merging = 0

    def gradient_norm(self, seed: int) -> Tensor | None:
        """L2 norm of the newborn's (compensated) gradient before clipping at the last step; a device scalar."""
        entry = self._entries.get(seed)
        return None if entry is None else entry.norm

    def memberships(self, parameters: Iterable[nn.Parameter]) -> tuple[int, ...]:
        """For each parameter, the number of optimizer groups that hold it."""
        ids = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        return tuple(ids.count(id(parameter)) for parameter in parameters)

    def _group(self, seed: int) -> dict[str, Any]:
        # Looked up by its mark every time: Optimizer.load_state_dict makes new dictionaries.
        return next(group for group in self.optimizer.param_groups if group.get(MARK) == seed)

    def _before_step(
        self, _optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._look_again:
            self._look_again = False
            hide_from_schedulers(self.optimizer)
        hosts = host_groups(self.optimizer)
        for entry in self._entries.values():
            if entry.merging >= 0:
                entry.merging = min(entry.merging + 1, self.merge_steps)
            self._follow(entry, self._group(entry.seed), hosts[entry.host])
        # torch hands the optimizer itself on as the first argument.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare()
            return None

        def prepared() -> Any:
            loss = closure()
            harmless(self._prepare)()
            return loss

        if len(args) > 1:
            return (args[0], prepared, *args[2:]), kwargs
        return args, {**kwargs, "closure": prepared}

    def _prepare(self) -> None:
        """Compensate, measure and clip the gradients, which are there now."""
        scale = gradient_scale(self.optimizer)
        for entry in self._entries.values():
            parameters = self._group(entry.seed)["params"]
            if entry.frozen:
                for parameter in parameters:
                    parameter.grad = None
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients or entry.merging >= self.merge_steps:
                continue
            if entry.alpha is not None:
                torch._foreach_div_([own(g) for g in gradients], entry.alpha.clamp_min(_ALPHA_FLOOR))  # no public name
            norm = whole(torch.nn.utils.get_total_norm(gradients))
            entry.norm = norm if scale is None else norm / scale
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, entry.norm)

    def _follow(self, entry: _Entry, group: dict[str, Any], host: dict[str, Any]) -> None:
        known = self.optimizer.defaults
        group.update({key: value for key, value in host.items() if key in known and key not in _OWN})
        done = max(0.0, min(1.0, entry.merging / self.merge_steps)) if self.merge_steps else float(entry.merging >= 0)
        # Geometric, so that a scale of 3 and one of 1/3 take equally long to become 1.
        rate = host["lr"] * entry.scale ** (1.0 - done)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if "weight_decay" in host:
            group["weight_decay"] = host["weight_decay"] * done

    def document(self) -> list[dict[str, Any]]:
        """As JSON types, in the order of the optimizer's groups."""
        order = [group[MARK] for group in self.optimizer.param_groups if MARK in group]
        entries = [self._entries[seed] for seed in order]
        return [
            {"seed": e.seed, "scale": e.scale, "host": e.host, "merging": e.merging, "frozen": e.frozen}
            for e in entries
        ]

    def restore(self, document: Mapping[str, Any], norm: Tensor | None) -> None:
        """Give the group of one seed the progress that `document` recorded; the group was added before."""
        entry = self._entries[document["seed"]]
        self._look_again = True
        entry.norm = norm
        entry.host, entry.merging = document["host"], document["merging"]
        if document["frozen"]:
            self.freeze(entry.seed, frozen=True)


def _copy(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate
