"""The tools people train with, each as one way to do an optimizer step in a loop that grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.control import Action
from tests.kasmina.hosts import MLP, TinyDelta, choice, mlp
from tests.kasmina.loops import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper.kasmina.control import Stage


class CastDelta(TinyDelta):
    """Computes in its own type and answers in that of its input, as the library's kernels do under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.down.dtype)).to(x.dtype)


class Lion(torch.optim.Optimizer):
    """X. Chen et al., *Symbolic Discovery of Optimization Algorithms*, 2023; as small as it can be."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * momentum.lerp(p.grad, 1 - first).sign())
                momentum.lerp_(p.grad, 1 - second)
        return loss


class Checkpointed(MLP):
    """An MLP that recomputes its second layer, or all of itself but the head, in the backward."""

    def __init__(self, *, reentrant: bool, whole: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.whole = whole

    def _body(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        if self.whole:
            # Reentrant checkpoints need an input that wants a gradient.
            inner = checkpoint(self._body, x.requires_grad_() if self.reentrant else x, use_reentrant=self.reentrant)
        else:
            wide = torch.relu(self.first(x))
            inner = checkpoint(lambda h: torch.relu(self.second(h)), wide, use_reentrant=self.reentrant)
        return self.head(inner)


def checkpointed(*, reentrant: bool, whole: bool) -> Callable[[], nn.Module]:
    """Makes the host with the weights of `mlp`."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Checkpointed(reentrant=reentrant, whole=whole)

    return make


def loss_of(run: Run, x: Tensor, y: Tensor) -> Tensor:
    """Of one batch."""
    return nn.functional.cross_entropy(run.model(x), y)


def plain(run: ToolRun, x: Tensor, y: Tensor) -> Tensor:
    """One backward, one step."""
    run.optimizer.zero_grad()
    loss = loss_of(run, x, y)
    loss.backward()
    run.optimizer.step()
    return loss


def autocast(dtype: torch.dtype) -> Callable[[ToolRun, Tensor, Tensor], Tensor]:
    """Mixed precision; with a gradient scaler where the run has one."""

    def update(run: ToolRun, x: Tensor, y: Tensor) -> Tensor:
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = loss_of(run, x, y)
        if run.scaler is None:
            loss.backward()
            run.optimizer.step()
            return loss
        run.scaler.scale(loss).backward()
        run.scaled_step()
        return loss

    return update


def accumulated(run: ToolRun, x: Tensor, y: Tensor) -> Tensor:
    """Two backward passes to a step."""
    run.optimizer.zero_grad()
    losses = []
    for a, b in zip(x.split(4), y.split(4), strict=True):
        loss = loss_of(run, a, b) / 2
        loss.backward()
        losses.append(loss.detach())
    run.optimizer.step()
    return torch.stack(losses).sum()


def accumulated_and_told(run: ToolRun, x: Tensor, y: Tensor) -> Tensor:
    """Likewise, in a loop that tells growth of every backward pass; of the last one the run itself does."""
    run.optimizer.zero_grad()
    for i, (a, b) in enumerate(zip(x.split(4), y.split(4), strict=True)):
        loss = loss_of(run, a, b)
        (loss / 2).backward()
        if run.wrapped and not i:
            run.growth.step(loss)
    run.optimizer.step()
    return loss


def closure(run: ToolRun, x: Tensor, y: Tensor) -> Tensor:
    """The step computes the gradients itself."""

    def compute() -> Tensor:
        run.optimizer.zero_grad()
        loss = loss_of(run, x, y)
        loss.backward()
        return loss

    return run.optimizer.step(compute)


def clipped(run: ToolRun, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of the whole model are unscaled and clipped by the loop."""
    run.optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(run, x, y)
    assert run.scaler is not None
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.scaled_step()
    return loss


@dataclass(frozen=True)
class Tool:
    """One way to train."""

    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)
    update: Callable[[ToolRun, Tensor, Tensor], Tensor] = plain
    make: Callable[[], nn.Module] = mlp
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    scale: float | None = None
    """Of a gradient scaler in its beginning; large enough to overflow."""
    delta: type[TinyDelta] = TinyDelta
    options: dict[str, Any] = field(default_factory=dict)


class ToolRun(Run):
    """A run that trains with one tool."""

    def __init__(self, tool: Tool, **more: Any) -> None:
        careless = {"confidence": 0.5, "probation_boundaries": 1, "price_per_million_parameters": 0.0}
        super().__init__(make=tool.make, optimizer=tool.optimizer, **(careless | tool.options | more))
        self.tool = tool
        self.skipped = 0
        self.overflowed = False
        self.scaler = None
        if tool.scale is not None:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=tool.scale, growth_interval=12)
        if tool.scheduler is not None:
            # Options of the groups that the first scheduler has left belong to it.
            for group in self.optimizer.param_groups:
                group.pop("initial_lr", None)
            self.scheduler = tool.scheduler(self.optimizer)

    def scaled_step(self) -> None:
        """By the scaler, which may skip it."""
        assert self.scaler is not None
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.overflowed = self.scaler.get_scale() < before
        self.skipped += self.overflowed

    def schedule(self, loss: Tensor) -> None:
        if self.overflowed:
            return
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss.detach())
        else:
            self.scheduler.step()

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return self.tool.update(self, x, y)

    def grow(self, to: Stage, birth: str = "zero") -> Stage:
        """Germinate around the narrow layer, train, and go to a stage."""
        if not self.growth.sites:
            self.steps()
        kernel = self.kernel(birth, delta=self.tool.delta)
        given = choice(kernel.id, scale=1.0, steps=8)
        self.boundary(self.decide(Action.GERMINATE, kernel=given))
        return self.advance(to)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint of such a loop holds."""
        parts: Iterable[tuple[str, Any]] = (
            ("model", self.model),
            ("optimizer", self.optimizer),
            ("scheduler", self.scheduler),
            ("scaler", self.scaler),
        )
        state = {"growth": self.growth.state_dict()} if self.wrapped else {}
        return state | {name: part.state_dict() for name, part in parts if part is not None}

    def load(self, state: dict[str, Any], kernels: Any) -> None:
        """In the documented order."""
        self.growth.load_state_dict(state["growth"], kernels=kernels)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
