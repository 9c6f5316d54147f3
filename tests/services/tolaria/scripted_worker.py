"""A training process whose controller is a script: germinate at a boundary, advance whenever the gates allow."""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina.cache import DiskStore
from esper.kasmina.control import (
    Action,
    Advice,
    BlendStrategy,
    BoundaryState,
    Decision,
    KernelChoice,
    RunHello,
    Stage,
)
from esper.kasmina.kernels import Compiled
from esper.kasmina.kernels.attempt import portable_gradients
from esper.kasmina.kernels.load import load_candidate
from esper.kasmina.local import LocalPlane
from esper.tolaria.rundir import RunDir
from esper.tolaria.worker import Launch, Session

if TYPE_CHECKING:
    from esper.kasmina.kernels.kernel import Kernel


class ScriptedPlane(LocalPlane):
    """Follows a plan.

    Keys: kernel_id, site, germinate and cull (boundaries), fossilize (bool), silent (boundaries), hold (the boundary at
    which it thinks for ever), hang (calls after which the kernel's compiled code does not come back).
    """

    def __init__(self, plan: dict[str, Any], cache_dir: str) -> None:
        kernels = {}
        if plan.get("kernel_id"):
            fetched = DiskStore(Path(cache_dir), 1 << 30).read(plan["kernel_id"])
            assert fetched is not None
            kernels[plan["kernel_id"]] = load_candidate(fetched.bundle, plan["kernel_id"])
            if plan.get("hang"):
                _compile(kernels[plan["kernel_id"]], plan["hang"])
        super().__init__(kernels, self.decide)
        self.plan = plan

    def decide(self, state: BoundaryState) -> Advice | None:
        """The script, as a pure function of the state."""
        while state.boundary == self.plan.get("hold"):
            time.sleep(1)
        if state.boundary in self.plan.get("silent", []):
            return None
        decisions = []
        if state.boundary == self.plan.get("germinate"):
            decisions.append(self._germinate(state))
        for seed in state.seeds:
            if state.boundary == self.plan.get("cull"):
                decisions.append(self._command(state, seed.index, Action.CULL, None))
            elif seed.stage < Stage.FINE_TUNING:
                decisions.append(self._command(state, seed.index, Action.ADVANCE, Stage.FINE_TUNING))
            elif seed.stage is Stage.FINE_TUNING and self.plan.get("fossilize", True):
                decisions.append(self._command(state, seed.index, Action.ADVANCE, Stage.FOSSILIZED))
        return Advice(
            boundary=state.boundary,
            decisions=tuple(decisions),
            explanation="as the script says",
            controller_state=f"after {state.boundary}".encode(),
        )

    def _germinate(self, state: BoundaryState) -> Decision:
        assert isinstance(self.hello, RunHello)
        site = next(s for s in self.hello.sites if s.name == self.plan["site"] and s.kind == "parallel")
        choice = KernelChoice(
            kernel_id=self.plan["kernel_id"],
            blueprint_name="conv_bottleneck",
            blend=BlendStrategy.IMMEDIATE,
            blend_steps=0,
            learning_rate_scale=3.0,
        )
        return Decision(
            decision_id=f"{state.boundary}.{site.index}",
            boundary=state.boundary,
            seed=site.index,
            action=Action.GERMINATE,
            reason="SCRIPT",
            explanation="the script germinates here",
            kernel=choice,
        )

    @staticmethod
    def _command(state: BoundaryState, seed: int, action: Action, to: Stage | None) -> Decision:
        return Decision(
            decision_id=f"{state.boundary}.{seed}.{action}",
            boundary=state.boundary,
            seed=seed,
            action=action,
            reason="SCRIPT",
            explanation=f"the script asks to {action}",
            to_stage=to,
        )


def _compile(kernel: Kernel, calls: int) -> None:
    """Give a kernel stand-ins for compiled code that hang, as that of torch does, with the interpreter's lock held."""
    left = itertools.count(calls, -1)

    def forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if next(left) == 0:
            ctypes.PyDLL(None).sleep(600)
        with torch.no_grad():
            return [kernel.portable(*inputs)]

    def backward(taken: list[torch.Tensor]) -> list[torch.Tensor | None]:
        grad, *inputs = taken
        return portable_gradients(kernel.portable, grad, inputs, [True] * len(inputs))

    kernel.compiled = kernel._native = Compiled(forward, backward, tuple(range(1 + len(kernel.parameter_names))))
    kernel.device_type = "cpu"


def connect(run_dir: RunDir):
    """A plane that follows ``plan.json`` of the run."""
    plan = json.loads((run_dir.path / "plan.json").read_text())
    return lambda launch: ScriptedPlane(plan, launch.cache_dir)


if __name__ == "__main__":
    folder = RunDir(Path(sys.argv[1]))
    sys.exit(Session(folder, Launch.from_line(sys.stdin.readline()), connect(folder)).run())
