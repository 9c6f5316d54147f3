"""What the callbacks of all frameworks share: when a session begins, what it is told, and how it comes back.

A framework makes its optimizer of all the parameters that the model has at that moment, so seeds must come back after
that; and it loads weights before or after that as it likes, so what it loads into a model that has no seeds yet is
loaded without theirs (`LeftOut`): they bring their own values along.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina import _checkpoint
from esper.kasmina.control import Stage
from esper.kasmina.wrapping import wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from esper.kasmina._seed import KernelLike
    from esper.kasmina.config import Config
    from esper.kasmina.control import ControlPlane
    from esper.kasmina.growth import Growth
    from esper.kasmina.sites import Selectors

    Kernels = Mapping[str, KernelLike] | Callable[[str], KernelLike | None]

__all__ = ["LeftOut", "Session", "is_of_a_seed", "unwrapped"]

_PART = re.compile(r"(^|\.)esper_seed_\d+\.")


def is_of_a_seed(name: str) -> bool:
    """Whether a name in a `state_dict` is that of a seed's parameter or buffer."""
    return _PART.search(name) is not None


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer itself, where a framework has put something around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    found: Optimizer = optimizer
    return found


class LeftOut:
    """Lets a model that has no seeds yet load the weights of one that had some, until it is removed.

    Args:
        model: what the framework loads into.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        """What was left out."""
        self._handle = model.register_load_state_dict_pre_hook(self._leave_out)  # type: ignore[no-untyped-call]  # torch

    def _leave_out(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        known = {prefix + name for name in module.state_dict()}
        gone = [name for name in state if is_of_a_seed(name) and name not in known]
        self.names += gone
        for name in gone:
            del state[name]

    def remove(self) -> None:
        """Load everything again."""
        self._handle.remove()


class Session:
    """The growth of one training, from the framework's first step to its last, and over several trainings.

    Args:
        mesh: as for `esper.kasmina.wrap`, like the others.
        sites: where it may grow.
        exclude: where it may not.
        cache_dir: of the kernel cache.
        config: all options.
        kernels: where the kernels of a resumed run are; None asks the mesh.
        options: single ones.
    """

    def __init__(
        self,
        *,
        mesh: str | ControlPlane | None,
        sites: Selectors | None,
        exclude: Selectors | None,
        cache_dir: Path | None,
        config: Config | None,
        kernels: Kernels | None,
        options: Mapping[str, Any],
    ) -> None:
        self.growth: Growth | None = None
        self._wrap = {
            "mesh": mesh,
            "sites": sites,
            "exclude": exclude,
            "cache_dir": cache_dir,
            "config": config,
            **options,
        }
        self._kernels = kernels
        self._losses: list[Tensor] = []

    def begin(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        state: Mapping[str, Any] | None,
        *,
        validate: Callable[[], object] | None = None,
        total_steps: int | None = None,
    ) -> Growth:
        """Wrap model and optimizer, and bring seeds back.

        Args:
            model: the host.
            optimizer: the host's, made while the model had no seeds.
            state: of the session to go on with; None begins one.
            validate: held-out losses per batch, repeatable.
            total_steps: where the framework knows it, and the user has not said it.
        """
        given = dict(self._wrap)
        if given["config"] is None and total_steps is not None:
            given.setdefault("total_steps", total_steps)
        self._losses.clear()
        self.growth = wrap(model, optimizer, validate=validate, **given)
        if state is not None:
            self.growth.load_state_dict(state, kernels=self._kernels)
        return self.growth

    def structure(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Give a model that is not trained the seeds of a state."""
        if self.growth is None or self.growth.model is not model:
            self.begin(model, torch.optim.SGD(model.parameters(), lr=0.0), None)
        assert self.growth is not None
        self.growth.load_state_dict(state, kernels=self._kernels)

    def take_out(self) -> dict[str, Any] | None:
        """End the last session before another training begins; the answer is what that goes on with."""
        if self.growth is None:
            return None
        growth, self.growth = self.growth, None
        state = growth.state_dict()
        growth.close()
        _checkpoint.clear(growth)
        return state

    def saw(self, loss: Tensor | None) -> None:
        """Remember the loss of one backward pass."""
        if loss is not None:
            self._losses.append(loss.detach())

    def step(self, *, mean: bool) -> None:
        """After an optimizer step: the losses of its backward passes make one, by their mean or by their sum."""
        losses, self._losses = self._losses, []
        if self.growth is None:
            return
        if not losses:
            self.growth.step()
            return
        total = losses[0] if len(losses) == 1 else torch.stack([loss.float().mean() for loss in losses]).sum()
        self.growth.step(total / len(losses) if mean else total)

    def figures(self) -> dict[str, float]:
        """What has grown, for the framework's logger."""
        growth = self.growth
        assert growth is not None
        life = growth.life
        living = sum(life.stage(seed) not in {Stage.FOSSILIZED, Stage.DORMANT} for seed in life.runs)
        return {
            "growth/sites": float(len(growth.sites)),
            "growth/seeds_living": float(living),
            "growth/seeds_fossilized": float(len(life.fossilized)),
            "growth/parameters_added": float(life.parameters_added),
            "growth/rollbacks": float(growth.counters["rollbacks"]),
            "growth/decisions_refused": float(growth.counters["decisions_refused"]),
        }

    def close(self) -> None:
        """Deliver what is buffered; seeds stay in the model as they are."""
        if self.growth is not None:
            self.growth.close()
