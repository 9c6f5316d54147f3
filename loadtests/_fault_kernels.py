"""What kernels can do wrong, each as a fault in the middle of a run."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.blueprints import Birth
from esper.kasmina.control import Stage
from esper.kasmina.kernels import Kernel
from esper.kasmina.local import LocalPlane
from loadtests._fault_rows import Row
from loadtests._faults import Function, Trial, compiled, portable

__all__ = ["kernel_rows"]

STEPS = 10
AT = 3
"""Step after the graft in which the fault is there, and until the end."""
SLOW_S, HANG_S = 0.25, 0.8
"""Far beyond what a loaded machine does to a step of a few milliseconds."""


class Switch:
    """Faults are off until they are switched on."""

    on = False


def _raises(_result: Any) -> Any:
    raise RuntimeError("native code says no")


def _none(_result: Any) -> Any:
    return None


def _all(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Change a tensor, or each of several."""

    def apply(result: Any) -> Any:
        return change(result) if isinstance(result, Tensor) else [change(part) for part in result]

    return apply


def _slow(result: Any) -> Any:
    time.sleep(SLOW_S)
    return result


def _hangs(result: Any) -> Any:
    time.sleep(HANG_S)
    return result


FAULTS: dict[str, Callable[[Any], Any]] = {
    "raises": _raises,
    "gives None": _none,
    "wrong shape": _all(lambda t: t[..., :1]),
    "wrong element type": _all(lambda t: t.to(torch.int64)),
    "not finite": _all(lambda t: t * math.nan),
    "slow": _slow,
    "hangs": _hangs,
}


def _faulty(switch: Switch, fault: Callable[[Any], Any]) -> Callable[[Function], Function]:
    def change(sound: Function) -> Function:
        def call(*arguments: Any) -> Any:
            result = sound(*arguments)
            return fault(result) if switch.on else result

        return call

    return change


class _Gradient(torch.autograd.Function):
    """Identity whose backward goes wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: Switch, fault: Callable[[Any], Any]) -> Tensor:
        ctx.switch, ctx.fault = switch, fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.fault(gradient) if ctx.switch.on else gradient, None, None


def _bad_gradient(switch: Switch, fault: Callable[[Any], Any]) -> Callable[[Function], Function]:
    return lambda sound: lambda *given: _Gradient.apply(sound(*given), switch, fault)  # type: ignore[no-untyped-call]


Make = Callable[[Switch], Kernel]


def _in_code(fault: Callable[[Any], Any], where: str) -> Make:
    return lambda switch: compiled(**{where: _faulty(switch, fault)})


def _in_graph(fault: Callable[[Any], Any], birth: Birth = Birth.ZERO) -> Make:
    return lambda switch: portable(_faulty(switch, fault), birth)


def _in_gradient(fault: Callable[[Any], Any], birth: Birth = Birth.ZERO) -> Make:
    return lambda switch: portable(_bad_gradient(switch, fault), birth)


def _trained(kernel: Kernel, switch: Switch, to: Stage, **options: Any) -> tuple[Trial, Callable[[Trial], None]]:
    def script(trial: Trial) -> None:
        trial.step(1)
        trial.germinate(kernel, to)
        trial.step(AT)
        switch.on = True
        trial.step(STEPS - AT)
        trial.boundary()
        trial.missed = STEPS - trial.used if to is Stage.GRAFTING else 0

    return Trial(LocalPlane(), **options), script


def _timing(fault: str) -> dict[str, Any]:
    if fault == "hangs":
        return {"hang_timeout_s": HANG_S / 3, "slow_floor_s": 60.0}
    return {"slow_floor_s": 0.8 * SLOW_S, "slow_patience": 1} if fault == "slow" else {"slow_floor_s": 60.0}


def _row(where: str, fault: str, make: Make, to: Stage = Stage.GRAFTING, **said: Any) -> Row:
    def begin() -> tuple[Trial, Callable[[Trial], None]]:
        switch = Switch()
        return _trained(make(switch), switch, to, **_timing(fault))

    return Row(where, fault, begin, **said)


def _compiled_rows() -> list[Row]:
    rows = []
    kinds = {"raises": "raised", "not finite": "not_finite", "slow": "slow", "hangs": "hang"}
    for name, fault in FAULTS.items():
        kind = kinds.get(name, "form")
        missed = 1 if name == "not finite" else 0
        rows.append(
            _row(
                "compiled forward",
                name,
                _in_code(fault, "forward"),
                answer="portable",
                kind=kind,
                missed=missed,
                circuit="code",
            )
        )
        if name == "slow":  # forwards are timed
            continue
        rows.append(
            _row(
                "compiled backward",
                name,
                _in_code(fault, "backward"),
                answer="portable",
                kind="gradient" if name == "not finite" else kind,
                circuit="code",
            )
        )
    return rows


def _portable_rows() -> list[Row]:
    kinds = {"raises": "raised", "not finite": "not_finite", "slow": "slow", "hangs": "hang", "gives None": "form"}
    rows = [
        _row(
            "portable forward",
            name,
            _in_graph(fault),
            answer="identity",
            kind=kinds.get(name, "form"),
            circuit="kernel",
        )
        for name, fault in FAULTS.items()
    ]
    rows.append(
        _row(
            "portable backward",
            "not finite",
            _in_gradient(FAULTS["not finite"]),
            answer="identity",
            kind="gradient",
            circuit="kernel",
        )
    )
    rows.append(
        _row(
            "portable backward",
            "raises",
            _in_gradient(FAULTS["raises"]),
            escapes="native code says no",
        )
    )
    return rows


def _isolated_rows() -> list[Row]:
    kinds = {"raises": "raised", "gives None": "raised", "not finite": "gradient", "gradient not finite": "gradient"}
    return [
        _row(
            "training in isolation",
            name,
            _in_gradient(FAULTS["not finite"], Birth.RANDOM)
            if name.startswith("gradient")
            else _in_graph(FAULTS[name], Birth.RANDOM),
            Stage.TRAINING,
            answer="identity",
            kind=kind,
            circuit="kernel",
        )
        for name, kind in kinds.items()
    ]


def _birth_rows() -> list[Row]:
    def row(name: str, make: Make, **said: Any) -> Row:
        def begin() -> tuple[Trial, Callable[[Trial], None]]:
            switch = Switch()
            switch.on = True

            def script(trial: Trial) -> None:
                trial.step(1)
                trial.germinate(make(switch))
                trial.step(2)
                trial.boundary()
                trial.step(1)

            return Trial(LocalPlane(), slow_floor_s=60.0), script

        return Row("first trial", name, begin, **said)

    wrong = ("raises", "gives None", "wrong shape", "not finite")
    rows = []
    for name in wrong:
        rows.append(
            row(
                f"compiled code {name}",
                _in_code(FAULTS[name], "forward"),
                answer="portable",
                kind={"raises": "raised", "not finite": "not_finite"}.get(name, "form"),
                circuit="code",
            )
        )
        if name != "not finite":
            rows.append(
                row(
                    f"portable graph {name}",
                    _in_graph(FAULTS[name]),
                    # The first trial looks at values, the first forward at shapes.
                    answer="identity" if name == "wrong shape" else "cancelled",
                    circuit="kernel",
                )
            )
    rows.append(
        row(
            "output not zero at birth",
            _in_graph(_all(lambda t: t + 1.0)),
            answer="cancelled",
            circuit="kernel",
        )
    )
    return rows


def kernel_rows() -> list[Row]:
    """Every place where a kernel is called, with everything that it can do there."""
    return [*_compiled_rows(), *_portable_rows(), *_isolated_rows(), *_birth_rows()]
