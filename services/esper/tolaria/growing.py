"""The network of a run behind one face: the host alone, the host with modules from step 0, or the host with seeds.

The trainer knows `Network` only. Whatever grows, the optimizer holds every trainable parameter in exactly one group,
groups carry their rate relative to the host's, and the state of everything goes through `state_dict`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper.tolaria import hosts
from esper.tolaria.attach import Attached, attach
from esper.tolaria.flops import forward_flops
from esper.tolaria.optim import build_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from esper.kasmina.cache import Fetched
    from esper.tolaria.config import RunConfig
    from esper.tolaria.core import SeedProgress
    from esper.tolaria.task import Evaluation

__all__ = ["BoundaryOutcome", "HostNetwork", "Network", "StaticNetwork", "weights_digest"]

MERGE_STEPS = 200
"""Steps in which a module takes over the host's learning rate; that of Kasmina's fossilized seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryOutcome:
    """What came of a boundary."""

    validation: Evaluation
    """The network as it came to the boundary."""
    answered: bool = False
    """Whether the controller answered."""
    explanation: str = ""
    """What was decided, for people; empty where there is nothing to say."""
    advice: str = ""
    """All that the controller weighed, in its own words; empty where it did not answer."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened to seeds, as plain data."""


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of weights in the order of their names: name, element type, shape and bytes of each."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return "sha256:" + found.hexdigest()


class Network:
    """The host alone; what grows overrides."""

    grows = False
    """Whether a controller is asked."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model = hosts.build(config.host, config.seed)
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.host_parameters = sum(p.numel() for p in self.model.parameters())

    @property
    def parameters(self) -> int:
        """Parameters of host and modules, in elements."""
        return self.host_parameters

    @property
    def structure(self) -> object:
        """Changes when the cost of a forward may have changed."""
        return ()

    @property
    def extra_flops(self) -> float:
        """Operations of the run beyond forwards and backwards of the trainer's own: training in isolation."""
        return 0.0

    def forward_flops(self, sample: Tensor) -> float:
        """Operations of one forward per sample, as the network is now."""
        return forward_flops(self.model, sample)

    def set_rate(self, rate: float, step: int) -> None:  # noqa: ARG002  # for what grows
        """Set the host's learning rate for the next step, counted from 0; every other group follows in its own way."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def clipped_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters whose gradients are clipped together: everything in the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def after_step(self, loss: Tensor) -> None:
        """Told after each optimizer step."""

    def boundary(self, validate: Callable[[], Evaluation], epoch: float) -> BoundaryOutcome:  # noqa: ARG002  # for what grows
        """Validate, ask the controller and apply what it says; here there is nothing to ask.

        Args:
            validate: evaluates the network as it then is, on the same batches each time.
            epoch: epochs done.
        """
        return BoundaryOutcome(validation=validate())

    def seeds(self) -> tuple[SeedProgress, ...]:
        """Seeds that are not dormant."""
        return ()

    def kernels(self) -> tuple[str, ...]:
        """Ids of the kernels in use."""
        return ()

    def bundle(self, kernel_id: str) -> Fetched | None:  # noqa: ARG002  # for what grows
        """Bundle and verdict of a kernel in use; reads a disk. None where it is not at hand."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how the network goes on; tensors are live, not copied."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], bundles: Mapping[str, Fetched]) -> None:  # noqa: ARG002  # for what grows
        """Go on from a state; the network must be new."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def grown(self) -> list[tuple[Attached, nn.Module]]:
        """Modules that are part of the network for good, each as plain torch with its present parameters."""
        return []

    def weights(self) -> dict[str, Tensor]:
        """Every weight of the final network by name: ``host.*``, ``grown.seed<index>.*``."""
        found = {f"host.{name}": value for name, value in self.host_state().items()}
        for attached, module in self.grown():
            found |= {f"grown.{attached.key}.{name}": value for name, value in module.state_dict().items()}
        return found

    def host_state(self) -> dict[str, Tensor]:
        """Weights of the host by its own names."""
        return dict(self.model.state_dict())

    def prepare(self, say: Callable[[str], None], leave: Callable[[], bool]) -> None:
        """Have the library build what could grow, before the first step; nothing to do here.

        Args:
            say: takes the phase, for progress.
            leave: true when the run was asked to pause or stop.
        """

    def lineage(self) -> dict[str, Any]:
        """Every adaptation and decision, as plain data."""
        return {"adaptations": [], "decisions": []}

    def close(self) -> None:
        """Let go of the mesh."""


class HostNetwork(Network):
    """The host without growth."""


class StaticNetwork(Network):
    """The host with the modules of a grown run from step 0, born as they were born there: same parameters, zero output.

    A module learns at its newborn's rate for as many steps as the newborn did in the grown run, without weight decay;
    then rate and decay go to the host's within `MERGE_STEPS`, as they did there.

    Args:
        config: the run.
        modules: what to attach, in order; each with its module at birth.
    """

    def __init__(self, config: RunConfig, modules: Sequence[tuple[Attached, nn.Module]]) -> None:
        super().__init__(config)
        self._modules = list(modules)
        for attached, module in self._modules:
            attach(self.model, attached.site, module)
            self.optimizer.add_param_group({"params": list(module.parameters()), "weight_decay": 0.0})

    def set_rate(self, rate: float, step: int) -> None:
        """See `Network`."""
        host, *groups = self.optimizer.param_groups
        host["lr"] = rate
        for group, (attached, _) in zip(groups, self._modules, strict=True):
            scale = self.config.growth.static_learning_rate_scale or attached.learning_rate_scale
            merged = min(1.0, max(0, step - attached.newborn_steps) / MERGE_STEPS)
            group["lr"] = rate * (scale + (1.0 - scale) * merged)
            group["weight_decay"] = host["weight_decay"] * merged

    @property
    def parameters(self) -> int:
        """See `Network`."""
        return self.host_parameters + sum(p.numel() for _, module in self._modules for p in module.parameters())

    def state_dict(self) -> dict[str, Any]:
        """See `Network`."""
        return {**super().state_dict(), "modules": {a.key: module.state_dict() for a, module in self._modules}}

    def load_state_dict(self, state: Mapping[str, Any], bundles: Mapping[str, Fetched]) -> None:
        """See `Network`."""
        super().load_state_dict(state, bundles)
        for attached, module in self._modules:
            module.load_state_dict(state["modules"][attached.key])

    def grown(self) -> list[tuple[Attached, nn.Module]]:
        """See `Network`."""
        return list(self._modules)
