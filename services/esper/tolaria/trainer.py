"""The training loop of one run, from a snapshot (or from nothing) to its end, a pause or a stop.

::

    while step < total:
        batch -> loss -> backward -> clip -> optimizer.step() -> growth.step(loss)
        at a boundary: validate -> growth.boundary() -> history -> checkpoint
        asked to pause or stop -> checkpoint -> leave

Everything that decides the next step is in the snapshot; the position in the data is the step count. The loop touches
no disk and no network: checkpoints, status and events are handed to threads of their own, and growth's control plane
answers within its deadline or not at all.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from torch import nn

from esper.mesh.errors import Corrupt
from esper.mesh.logging import get_logger
from esper.tolaria.checkpoints import Snapshot, clone_tree
from esper.tolaria.core import Progress
from esper.tolaria.flops import TRAINING_FACTOR
from esper.tolaria.optim import rate_at, total_steps
from esper.tolaria.randomness import random_state, restore_random_state
from esper.tolaria.task import Evaluation, evaluate, loss_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.tolaria.config import RunConfig
    from esper.tolaria.data.base import Dataset
    from esper.tolaria.growing import Network

__all__ = ["Outcome", "Trainer", "Unstable"]

_log = get_logger(__name__)
_REPORT_EVERY_S = 0.25


class Outcome(StrEnum):
    """How the loop ended."""

    FINISHED = "finished"
    PAUSED = "paused"
    """Asked to."""
    WAITING = "waiting"
    """The control plane is away and ``control.on_loss`` says to wait."""
    STOPPED = "stopped"


class Unstable(Exception):
    """A loss or gradient of the host that is not finite; the run goes back to `snapshot`."""

    def __init__(self, snapshot: Snapshot, step: int) -> None:
        super().__init__(f"loss or gradient not finite at step {step}")
        self.snapshot = snapshot
        self.step = step


@dataclass(slots=True)
class _Meter:
    """What is summed up between two boundaries, and over the run."""

    loss_sum: float = 0.0
    norm_sum: float = 0.0
    steps: int = 0
    flops: float = 0.0
    """Of the whole run."""
    seconds: float = 0.0
    """Of training, in earlier attempts."""
    preparation_s: float = 0.0
    """Of everything before the loop, in all attempts."""
    rollbacks: int = 0
    rate_scale: float = 1.0
    """Product of the cuts of the rollbacks."""


class Trainer:
    """One attempt at a run.

    Args:
        config: the run.
        network: model, optimizer and what grows in it.
        data: the three parts.
        checkpoint: takes a snapshot to be written; returns at once.
        progress: takes the latest progress; returns at once.
        event: leaves a line of history: kind and fields.
        command: ``pause``, ``stop`` or nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        network: Network,
        data: Dataset,
        *,
        checkpoint: Callable[[Snapshot], None],
        progress: Callable[[Progress], None],
        event: Callable[..., None],
        command: Callable[[], str],
    ) -> None:
        self.config = config
        self.network = network
        self.data = data
        self._checkpoint = checkpoint
        self._progress = progress
        self._event = event
        self._command = command
        self.total = total_steps(config.schedule, data.steps_per_epoch)
        self.step = 0
        self.boundary = 0
        self.history: list[dict[str, Any]] = []
        self._boundary_due = False
        self._meter = _Meter()
        self._began: float | None = None
        self._reported = 0.0
        self._last_decision = ""
        self._control_plane = False
        self._sample = data.train_batch(0, 0)[0]
        self._cost: tuple[object, float] = (None, 0.0)
        self._last_boundary: Snapshot | None = None

    @property
    def flops(self) -> float:
        """Floating-point operations of the run until now."""
        return self._meter.flops + self.network.extra_flops

    @property
    def seconds(self) -> float:
        """Wall time of the loop until now, all attempts; what came before it is not in here."""
        return self._meter.seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    @property
    def preparation_s(self) -> float:
        """Wall time of everything before the loop (data, network, kernels), all attempts."""
        return self._meter.preparation_s

    @property
    def rollbacks(self) -> int:
        """Times that the host became unstable."""
        return self._meter.rollbacks

    def snapshot(self) -> Snapshot:
        """The whole state, copied."""
        meter = self._meter
        state = {
            "config": json.dumps({"recipe": self.config.recipe, "seed": self.config.seed}),
            "network": clone_tree(self.network.state_dict()),
            "random": random_state(),
            "boundary_due": self._boundary_due,
            "history": json.dumps(self.history),
            "last_decision": self._last_decision,
            "meter": {
                "loss_sum": meter.loss_sum,
                "norm_sum": meter.norm_sum,
                "steps": meter.steps,
                "flops": meter.flops,
                "seconds": self.seconds,
                "preparation_s": meter.preparation_s,
                "rollbacks": meter.rollbacks,
                "rate_scale": meter.rate_scale,
            },
        }
        return Snapshot(boundary=self.boundary, step=self.step, state=state, kernels=self.network.kernels())

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; the network must be new.

        Raises:
            Corrupt: CHECKPOINT_FOREIGN, the snapshot is of another run.
        """
        state = snapshot.state
        mine = {"recipe": self.config.recipe, "seed": self.config.seed}
        if json.loads(state["config"]) != mine:
            raise Corrupt(
                f"checkpoint: expected one of {mine}, found one of {state['config']}", reason="CHECKPOINT_FOREIGN"
            )
        self.network.load_state_dict(state["network"], snapshot.bundles)
        restore_random_state(state["random"])
        self.step, self.boundary = snapshot.step, snapshot.boundary
        self.history = json.loads(state["history"])
        self._boundary_due = state["boundary_due"]
        self._last_decision = state["last_decision"]
        self._meter = _Meter(**state["meter"])
        self._last_boundary = snapshot

    def run(self, preparation_s: float = 0.0) -> Outcome:
        """Train until the schedule ends or somebody asks to leave.

        Args:
            preparation_s: wall time that this attempt took to come here; told apart from that of training.

        Raises:
            Unstable: the host has a loss or gradient that is not finite.
        """
        self._meter.preparation_s += preparation_s
        self._began = time.monotonic()
        if self._last_boundary is None:
            self._last_boundary = self.snapshot()
        if self._boundary_due and not self._pass_boundary():
            return Outcome.WAITING
        if self.step == 0:
            self._checkpoint(self._last_boundary)
        spacing = max(1, self.data.steps_per_epoch // self.config.schedule.boundaries_per_epoch)
        every = self.config.checkpoint.every_steps
        self.report("training")
        while self.step < self.total:
            command = self._command()
            if command:
                self._checkpoint(self.snapshot())
                return Outcome.PAUSED if command == "pause" else Outcome.STOPPED
            self._train_step()
            position = self.step % self.data.steps_per_epoch
            # The last boundary of an epoch is its end, also where the spacing does not divide it.
            if position == 0 or (position % spacing == 0 and self.data.steps_per_epoch - position >= spacing):
                if not self._pass_boundary():
                    return Outcome.WAITING
            elif every and self.step % every == 0:
                self._checkpoint(self.snapshot())
            if time.monotonic() - self._reported > _REPORT_EVERY_S:
                self.report("training")
        self.report("finishing")
        return Outcome.FINISHED

    def _train_step(self) -> None:
        meter, optimizer = self._meter, self.network.optimizer
        epoch, index = divmod(self.step, self.data.steps_per_epoch)
        inputs, targets = self.data.train_batch(epoch, index)
        self.network.set_rate(self._rate(), self.step)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.network.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
        limit = self.config.optimizer.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.network.clipped_parameters(), limit))
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise Unstable(self._rolled_back(), self.step)
        optimizer.step()
        self.network.after_step(loss)
        self.step += 1
        meter.loss_sum += value
        meter.norm_sum += norm
        meter.steps += 1
        meter.flops += TRAINING_FACTOR * self._forward_flops() * len(inputs)

    def _rate(self) -> float:
        scale = rate_at(self.step, self.total, self.config.schedule)
        return self.config.optimizer.learning_rate * scale * self._meter.rate_scale

    def _rolled_back(self) -> Snapshot:
        """The last boundary, with one rollback more on its account and a lower rate."""
        before = self._last_boundary
        assert before is not None
        # The time is gone, whatever becomes of the steps that it was spent on.
        meter = {**before.state["meter"], "seconds": self.seconds, "preparation_s": self.preparation_s}
        meter["rollbacks"] += 1
        meter["rate_scale"] *= self.config.guard.rate_cut
        return Snapshot(
            boundary=before.boundary,
            step=before.step,
            state={**before.state, "meter": meter},
            kernels=before.kernels,
            bundles=before.bundles,
        )

    def _forward_flops(self) -> float:
        """Operations per sample and forward, counted anew when something grew or left."""
        shape = self.network.structure
        if self._cost[0] != shape:
            self._cost = (shape, self.network.forward_flops(self._sample))
        return self._cost[1]

    def _validate(self) -> Evaluation:
        batches = self.data.validation()
        found = evaluate(self.network.model, batches)
        self._meter.flops += self._forward_flops() * sum(len(inputs) for inputs, _ in batches)
        return found

    def _pass_boundary(self) -> bool:
        """Validate, ask, apply, remember, save; False when the run must wait for its control plane."""
        meter = self._meter
        waiting = self.config.control.on_loss == "pause" and self.network.grows
        self._boundary_due = True
        before = self.snapshot() if waiting else None
        self._boundary_due = False
        self.boundary += 1
        epoch = self.step / self.data.steps_per_epoch
        outcome = self.network.boundary(self._validate, epoch)
        if before is not None and not outcome.answered:
            self._checkpoint(before)
            self._event("control_plane_lost", boundary=self.boundary, step=self.step)
            return False
        steps = max(1, meter.steps)
        facts: dict[str, Any] = {
            "boundary": self.boundary,
            "step": self.step,
            "epoch": epoch,
            "train_loss": meter.loss_sum / steps,
            "validation_loss": outcome.validation.loss,
            "validation_accuracy": outcome.validation.accuracy,
            "learning_rate": self._rate(),
            "gradient_norm": meter.norm_sum / steps,
        }
        self._control_plane = outcome.answered
        self._last_decision = outcome.explanation or self._last_decision
        meter.loss_sum, meter.norm_sum, meter.steps = 0.0, 0.0, 0
        self.history.append(
            {
                **facts,
                "parameters": self.network.parameters,
                "training_flops": self.flops,
                "seconds": self.seconds,
                "control_plane": outcome.answered,
                "explanation": outcome.explanation,
                "advice": outcome.advice,
                "events": outcome.events,
                "seeds": [[seed.index, int(seed.stage)] for seed in self.network.seeds()],
            }
        )
        for fields in outcome.events:
            self._event("growth", **fields)
        self._event(
            "boundary", **{key: facts[key] for key in ("boundary", "step", "validation_loss", "validation_accuracy")}
        )
        self._last_boundary = self.snapshot()
        self._checkpoint(self._last_boundary)
        self.report("training")
        return True

    def report(self, phase: str) -> None:
        """Tell how far the run is."""
        self._reported = time.monotonic()
        last = self.history[-1] if self.history else {}
        meter, per_epoch = self._meter, self.data.steps_per_epoch
        self._progress(
            Progress(
                sequence=0,  # numbered by whoever passes it on
                phase=phase,
                epoch=self.step / per_epoch,
                epochs=float(self.config.schedule.epochs),
                step=self.step,
                steps=self.total,
                train_loss=meter.loss_sum / meter.steps if meter.steps else last.get("train_loss"),
                validation_loss=last.get("validation_loss"),
                validation_accuracy=last.get("validation_accuracy"),
                parameters=self.network.parameters,
                seeds=self.network.seeds(),
                last_decision=self._last_decision,
                control_plane=self._control_plane,
                elapsed_s=self.seconds,
            )
        )
