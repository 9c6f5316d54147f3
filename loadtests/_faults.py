"""A small training run into which faults are injected, and what is found of it afterwards.

The run is compared with the same run without growth, bit for bit after every step. The newborn's learning rate is 0 and
its output zero at birth, so that a sound seed changes nothing at all: whatever differs is the fault's doing.
"""

import contextlib
import functools
import gc
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina.attach import SeedModule
from esper.kasmina.blueprints import Birth, get
from esper.kasmina.control import Action, BlendStrategy, Decision, KernelChoice, SiteKind, Stage
from esper.kasmina.kernels import Compiled, Kernel, Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.attempt import portable_gradients
from esper.kasmina.kernels.build import build
from esper.kasmina.signature import Layout, Signature
from esper.kasmina.wrapping import wrap
from esper.mesh import logging

if TYPE_CHECKING:
    from esper.kasmina.growth import Growth

__all__ = ["SIGNATURE", "Found", "Trial", "bundle_of", "compiled", "examine", "portable", "young_objects"]

SIGNATURE = Signature(Layout.VECTOR, 4, 4)
SITE = "2"
BATCHES = 16
Function = Callable[..., Any]


@functools.cache
def bundle_of(birth: Birth) -> bytes:
    """A real kernel for the host's output, portable tier."""
    return build(get("low_rank").with_birth(birth), SIGNATURE, Tier.PORTABLE)


@functools.cache
def _loaded(birth: Birth) -> Kernel:
    bundle = bundle_of(birth)
    return load_candidate(bundle, kernel_id_of(bundle))


def portable(change: Callable[[Function], Function] = lambda f: f, birth: Birth = Birth.ZERO) -> Kernel:
    """The kernel with only a portable graph, changed by `change`."""
    return _kernel(birth, change(_loaded(birth).portable), None)


def compiled(
    forward: Callable[[Function], Function] = lambda f: f, backward: Callable[[Function], Function] = lambda f: f
) -> Kernel:
    """The kernel with stand-ins for compiled code, changed by `forward` and `backward`, and a sound portable graph."""
    sound = _loaded(Birth.ZERO).portable

    def run(x: Tensor, *parameters: Tensor) -> Any:
        with torch.no_grad():
            return sound(x, *parameters)

    def differentiate(grad: Tensor, x: Tensor, *parameters: Tensor) -> Any:
        saved = (x, *parameters)
        return portable_gradients(sound, grad, saved, [True] * len(saved))

    ahead, back = forward(run), backward(differentiate)
    every = tuple(range(1 + len(_loaded(Birth.ZERO).parameter_names)))
    code = Compiled(lambda inputs: ahead(*inputs), lambda taken: back(*taken), every)
    return _kernel(Birth.ZERO, sound, code)


def _kernel(birth: Birth, graph: Function, code: Compiled | None) -> Kernel:
    like = _loaded(birth)
    kernel = Kernel(
        kernel_id=like.id,
        manifest=like.manifest,
        plan=like.plan,
        parameters=dict(like.instantiate().named_parameters()),
        exported=graph,
        compiled=code,
        nbytes=like.nbytes,
    )
    # The manifest of a portable bundle names no machine for its code.
    kernel.device_type = "cpu"
    return kernel


@dataclass
class Found:
    """What a run with a fault looked like."""

    differs: int = 0
    """First step after which the host is not, bit for bit, that of a run without growth; 0 where it always is."""
    missed: int = 0
    """Training steps in which the seed should have added its change and did not."""
    stage: str = ""
    escaped: str = ""
    """Exception that reached the user's loop; empty where none did."""
    log: list[str] = field(default_factory=list)
    """Warnings and errors, one each: the event, and what was found."""
    counters: dict[str, int] = field(default_factory=dict)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Of the field reports."""
    circuits: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Trial:
    """One run, in the manner of a user's own loop.

    Args:
        plane: the control plane; None to train without growth.
        options: of `esper.kasmina.wrap`.
    """

    def __init__(self, plane: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(8 * BATCHES, 8, generator=generator)
        self.y = (self.x @ torch.randn(8, 4, generator=generator)).argmax(1)
        self.plane = plane
        self.states: list[list[Tensor]] = []
        """Host parameters after each step."""
        self.used = 0
        """Training forwards to which the seed added."""
        self.missed = 0
        """Those to which it should have added, and did not."""
        self.growth: Growth | None = None
        if plane is not None:
            small = {"min_graft_steps": 1, "sample_every": 2, "settle_steps": 0, "probation_boundaries": 0}
            limits = {"hang_timeout_s": 0.0, "advise_deadline_s": 0.05, "kernel_timeout_s": 0.1, "run_id": "fault"}
            series = {"kinds": (SiteKind.SERIES,)}
            given = small | limits | series | options
            self.growth = wrap(self.model, self.optimizer, mesh=plane, sites=SITE, **given)  # type: ignore[arg-type]  # options
        self.host = dict(self.model.named_parameters())

    def step(self, count: int = 1) -> None:
        """Optimizer steps."""
        for _ in range(count):
            at = 8 * (len(self.states) % BATCHES)
            batch = slice(at, at + 8)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            # As many loops do: one gradient that is not finite would spoil all.
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            self.optimizer.step()
            if self.growth is not None:
                self.growth.step(loss)
            self.states.append([p.detach().clone() for p in self.host.values()])

    def validate(self) -> dict[str, list[float]]:
        """Loss per batch."""
        with torch.no_grad():
            rows = zip(self.x.chunk(2), self.y.chunk(2), strict=True)
            return {"loss": [float(nn.functional.cross_entropy(self.model(x), y)) for x, y in rows]}

    def boundary(self, action: Action | None = None, **more: Any) -> None:
        """A validation, with a decision or with whatever the plane says."""
        growth = self.growth
        if growth is None:
            self.validate()
            return
        number = growth.boundaries + 1
        decision = None if action is None else self.decision(number, action, **more)
        growth.boundary(self.validate, decisions=None if decision is None else [decision])

    def decision(self, boundary: int, action: Action, **more: Any) -> Decision:
        """A decision for the seed."""
        return Decision(
            decision_id=f"f/{boundary}/{action.value}",
            boundary=boundary,
            seed=0,
            action=action,
            reason="TRIAL",
            explanation="the trial says so",
            **more,
        )

    def germinate(self, kernel: Kernel, to: Stage = Stage.GRAFTING) -> None:
        """Put a kernel into the plane and grow it."""
        self.plane.kernels[kernel.id] = kernel
        self.boundary(Action.GERMINATE, kernel=choice(kernel.id), to_stage=to)
        self.count_uses()

    def count_uses(self) -> None:
        """Count the forwards to which the seed adds, from now on."""
        seed = self.seed
        if seed is None:
            return
        run = seed.guard.run

        def counted(delta: nn.Module, features: Tensor, probe: Tensor) -> Tensor:
            change = run(delta, features, probe)
            self.used += torch.is_grad_enabled()
            return change

        seed.guard.run = counted  # type: ignore[method-assign]  # a spy

    @property
    def seed(self) -> SeedModule | None:
        """The living seed's module."""
        runs = () if self.growth is None else self.growth.life.runs.values()
        return next((run.attachment.seed for run in runs if run.attachment is not None), None)

    @property
    def stage(self) -> str:
        """Of the seed."""
        growth = self.growth
        return "" if growth is None or not growth.sites else growth.life.stage(0).name


def choice(kernel_id: str) -> KernelChoice:
    """A kernel whose newborn never moves."""
    return KernelChoice(
        kernel_id=kernel_id,
        blueprint_name="low_rank",
        blend=BlendStrategy.IMMEDIATE,
        blend_steps=1,
        learning_rate_scale=0.0,
    )


@functools.cache
def _bare(steps: int) -> list[list[Tensor]]:
    trial = Trial()
    trial.step(steps)
    return trial.states


def examine(script: Callable[[Trial], None], trial: Trial) -> Found:
    """Run a script over a trial and look at what came of it.

    Args:
        script: trains, with the fault in the middle.
        trial: fresh.
    """
    found = Found()
    began = time.perf_counter()
    with logged() as lines:
        try:
            script(trial)
        except Exception as error:  # noqa: BLE001  # that one came through is the finding
            found.escaped = f"{type(error).__name__}: {error}"
        if trial.growth is not None:
            found.stage = trial.stage
            found.counters = dict(trial.growth.counters)
            found.circuits = trial.growth.breakers()
            trial.growth.close(0.2)
    found.seconds = time.perf_counter() - began
    found.log = [_line(entry) for entry in lines]
    found.events = list(getattr(trial.plane, "events", ()))
    found.reasons = [report.reason for report in getattr(trial.plane, "reports", ())]
    for number, (mine, bare) in enumerate(zip(trial.states, _bare(64), strict=False), start=1):
        if not all(torch.equal(a, b) for a, b in zip(mine, bare, strict=True)):
            found.differs = number
            break
    assert all(math.isfinite(float(p.detach().sum())) for p in trial.host.values())
    return found


@contextlib.contextmanager
def young_objects() -> Iterator[None]:
    """Hide everything that exists from the collector: a graft asks it who refers to the optimizer."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """Warnings and errors of a block, as JSON types."""
    stream = io.StringIO()
    lines: list[dict[str, Any]] = []
    logging.configure(logging.LoggingSettings(level="warning", format="json"), stream=lambda: stream)
    try:
        yield lines
    finally:
        logging.shutdown()
        lines += [json.loads(line) for line in stream.getvalue().splitlines() if line.startswith("{")]


def _line(entry: dict[str, Any]) -> str:
    known = ("fault", "answer", "call", "where", "hook", "error", "reason", "phase", "detail", "refused")
    said = [f"{key}={entry[key]}" for key in known if entry.get(key)]
    return f"{entry['event']}: {', '.join(said)}" if said else str(entry["event"])
