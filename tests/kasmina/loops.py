"""A small training run that grows, in the manner of a user's own loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper.kasmina.control import Action, BlendStrategy, Decision, Stage
from esper.kasmina.local import LocalPlane
from esper.kasmina.wrapping import wrap
from tests.kasmina.hosts import TinyKernel, blobs, choice, decide, mlp

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.growth import BoundaryReport, Growth

KERNEL = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


class Run:
    """Host, optimizer, scheduler, growth and data; `epoch` trains and validates."""

    def __init__(
        self,
        *,
        make: Callable[[], nn.Module] = mlp,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        plane: Any = None,
        rate: float = 0.1,
        wrapped: bool = True,
        **options: Any,
    ) -> None:
        self.model = make()
        make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9, weight_decay=1e-4))
        self.optimizer = make_optimizer(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.999**step)
        self.plane = LocalPlane() if plane is None else plane
        defaults = {"min_graft_steps": 5, "sample_every": 5, "watch_steps": 40, "run_id": "t"}
        self.wrapped = wrapped
        """False trains the same host without growth, as a comparison."""
        if wrapped:
            self.growth: Growth = wrap(self.model, self.optimizer, mesh=self.plane, **(defaults | options))
        self.train, self.held_out = blobs(128), blobs(64, seed=2)
        self.validations = 0
        self.clears_first = False
        """The loop clears gradients before it tells growth of the step, as in growth's own description."""
        self.shape: Callable[[torch.Tensor], Any] = lambda loss: loss
        """What the loop hands over as the loss of a step."""

    def validate(self) -> dict[str, Any]:
        """Loss per batch, in a fixed order."""
        self.validations += 1
        with torch.no_grad():
            return self._validate()

    def _validate(self) -> dict[str, Any]:
        x, y = self.held_out
        losses = [
            float(nn.functional.cross_entropy(self.model(a), b)) for a, b in zip(x.split(8), y.split(8), strict=True)
        ]
        return {"loss": losses, "accuracy": float((self.model(x).argmax(1) == y).float().mean())}

    def steps(self, count: int = 16) -> None:
        """Optimizer steps over the training data, from its beginning."""
        x, y = self.train
        for i in range(count):
            batch = slice(8 * (i % 16), 8 * (i % 16) + 8)
            loss = self.update(x[batch], y[batch])
            self.schedule(loss)
            if self.clears_first:
                self.optimizer.zero_grad()
            if self.wrapped:
                self.growth.step(self.shape(loss))

    def update(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One optimizer step; returns its loss."""
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss

    def schedule(self, _loss: torch.Tensor) -> None:
        """Step the scheduler."""
        self.scheduler.step()

    def tell(self, loss: float) -> None:
        """An optimizer step that changes nothing, with a loss of the test's choice."""
        self.optimizer.zero_grad()
        self.optimizer.step()
        self.growth.step(loss)

    def boundary(self, *decisions: Decision, metrics: Any = None) -> BoundaryReport:
        """A validation with these decisions; with none, the plane is asked."""
        return self.growth.boundary(self.validate if metrics is None else metrics, decisions=decisions or None)

    def site(self, name: str = "first..head", kind: str = "parallel") -> int:
        """Index of a site."""
        return next(s.index for s in self.growth.sites if s.descriptor.name == name and s.descriptor.kind.value == kind)

    def kernel(self, birth: str = "zero", name: str = "first..head", kind: str = "parallel", **more: Any) -> TinyKernel:
        """A kernel for a site, put into the plane."""
        signature = self.growth.sites[self.site(name, kind)].descriptor.signature
        kernel = TinyKernel(more.pop("id", KERNEL), signature, birth, **more)
        self.plane.kernels[kernel.id] = kernel
        return kernel

    def decide(self, action: Action, seed: int | None = None, **more: Any) -> Decision:
        """A decision for the next boundary."""
        return decide(self.growth.boundaries + 1, self.site() if seed is None else seed, action, **more)

    def germinate(self, birth: str = "zero", *, to: Stage | None = None, **more: Any) -> BoundaryReport:
        """Train an epoch where none was, then germinate at the span around the narrow layer."""
        if not self.growth.sites:
            self.steps()
        kernel = self.kernel(birth)
        given = choice(kernel.id, **more)
        return self.boundary(self.decide(Action.GERMINATE, kernel=given, to_stage=to))

    def advance(self, to: Stage, *, limit: int = 12) -> Stage:
        """Train and command until the span's seed is at `to`; returns where it ended."""
        for _ in range(limit):
            self.steps()
            report = self.boundary(self.decide(Action.ADVANCE, to_stage=to))
            if report.applied[0].done:
                break
        return self.growth.life.stage(self.site())


RAMPS = [s for s in BlendStrategy if s is not BlendStrategy.IMMEDIATE]
