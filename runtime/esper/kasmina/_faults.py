"""Answers what kernels do wrong: the portable graph where compiled code is to blame, else identity; and tells it.

The host is out of danger before anything here runs (`_guard`). What is left is to judge, after each optimizer step:

| found | judged | answer |
|---|---|---|
| forward raised, wrong form, output not finite | at once | portable, else taken out |
| compiled backward raised or has a wrong form | at once | portable; the same backward has used it already |
| gradient not finite | when the next loss is finite: else it was the host's | portable, else taken out |
| slow | after some slow steps in a row | portable, else taken out |
| hang | by the watchdog, while it lasts | portable, else taken out, once the call comes back |

A seed that is FOSSILIZED is never taken out; where its kernel gives nothing usable, the host runs without it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina._guard import Fault, FaultKind
from esper.kasmina._probes import ProbeReader
from esper.kasmina._watchdog import Watchdog
from esper.kasmina.breaker import CircuitState, Scope
from esper.kasmina.control import Stage
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from esper.kasmina._flight import Call
    from esper.kasmina._lifecycle import Lifecycle
    from esper.kasmina._seed import KernelLike, SeedRun

__all__ = ["FaultDesk"]

_log = get_logger("esper.kasmina.growth")
_LEARNT = 5
"""Steps from which the usual time of a seed is known."""
_SAID = {": raised ": FaultKind.RAISED, "not finite": FaultKind.NOT_FINITE}
"""What a kernel says of its compiled code, and the kind of fault that it is; any other is one of form."""
_USUAL = 10.0
"""Times the usual that count as slow."""


class FaultDesk:
    """The judge of one session.

    Args:
        life: the seeds.
        counters: shared with the session.
        tell: leaves an event.
        shared: True where other ranks train the same: what one of them must do without is taken out of all (`taken`).
    """

    def __init__(
        self,
        life: Lifecycle,
        counters: Counter[str],
        tell: Callable[[str, dict[str, object]], None],
        *,
        shared: bool = False,
    ) -> None:
        self._shared = shared
        self._unusable: dict[int, Fault] = {}
        self._life = life
        self._config = life.config
        self._counters = counters
        self._tell = tell
        self._probes = ProbeReader()
        self._last: float | None = None
        self._times: dict[int, _Times] = {}
        self._hung: deque[tuple[str, Fault]] = deque()
        config = life.config
        self.watchdog = Watchdog(config.hang_timeout_s, abort=config.abort_on_hang, told=self.hung)
        self.on_breakers: Callable[[dict[str, Any], bool], None] | None = None
        """Told the circuits at each boundary, and, with True, before a hang ends the process."""

    # ---- lives -------------------------------------------------------------------------------------------------------

    def entered(self, run: SeedRun, stage: Stage) -> None:
        """A seed has come to a stage: from TRAINING on its kernel is called, and G2 is proof that it works."""
        if stage is Stage.TRAINING:
            self.watchdog.start()
        elif stage is Stage.STABILIZING:
            self._life.breakers.succeed(Scope.KERNEL, run.choice.kernel_id)
            self._life.breakers.succeed(Scope.SITE, run.site.key)

    def ended(self, run: SeedRun) -> None:
        """A life is over: if it was a trial, another one may begin."""
        self._life.breakers.give_up(Scope.KERNEL, run.choice.kernel_id)
        self._life.breakers.give_up(Scope.SITE, run.site.key)

    def resumed(self) -> None:
        """Seeds have come back from a checkpoint."""
        if self._life.runs:
            self.watchdog.start()

    def publish(self, *, ending: bool = False) -> None:
        """Hand the circuits over to whoever keeps them outside the checkpoint."""
        if self.on_breakers is not None:
            self.on_breakers(self._life.breakers.document(), ending)

    def close(self) -> None:
        """End the watchdog."""
        self.watchdog.stop()

    # ---- after each optimizer step -----------------------------------------------------------------------------------

    def judge(self, *, finite: bool) -> None:
        """Look at what the guards of all seeds have found.

        Args:
            finite: whether every loss that was read since the last call is finite.
        """
        now = time.perf_counter()
        step_s = None if self._last is None else now - self._last
        self._last = now
        runs = [run for run in self._life.runs.values() if run.attachment is not None]
        self._probes.read(runs)
        while self._hung:
            kernel_id, fault = self._hung.popleft()
            for run in [r for r in runs if r.choice.kernel_id == kernel_id and r.attachment is not None]:
                if self._answer(run, fault):
                    break
        for run in runs:
            if run.attachment is None:  # taken out a moment ago
                continue
            self._told_by_kernel(run)
            found = self._found(run, step_s, finite=finite)
            run.attachment.seed.guard.fresh = False
            if found is not None:
                self._answer(run, found)

    def _told_by_kernel(self, run: SeedRun) -> None:
        """Compiled code that failed in a call which its portable graph answered."""
        why = getattr(run.kernel, "fault", "")
        if why and run.kernel is not None:
            run.kernel.fault = ""  # type: ignore[attr-defined]  # it has one
            kind = next((kind for words, kind in _SAID.items() if words in why), FaultKind.FORM)
            self._use_portable(run, Fault(kind, why))

    def _found(self, run: SeedRun, step_s: float | None, *, finite: bool) -> Fault | None:
        assert run.attachment is not None
        guard = run.attachment.seed.guard
        if run.index in self._unusable:
            return None
        if guard.fault is not None:
            return None if guard.reported else guard.fault
        if guard.suspect:
            guard.suspect += 1
            # A loss after the step tells whose gradient it was: that of a host whose gradient was bad is bad too.
            if guard.suspect > 2:  # first the step itself, then the next one
                guard.suspect = 0
                if finite:
                    return Fault(FaultKind.GRADIENT, "its gradient is not finite, the loss is")
        spent, known = guard.take_spent()
        floor_s = self._config.slow_floor_s
        if not known and spent <= floor_s:
            return None  # the device's time is not there yet, and the calling thread's is nothing to mention
        times = self._times.setdefault(run.index, _Times())
        return times.judge(spent, step_s, floor_s, self._config.slow_patience)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, run: SeedRun, fault: Fault) -> bool:
        """Have the portable graph run, and return True, or do without the kernel."""
        assert run.attachment is not None
        diverged = self._diverged(run)
        if diverged is None and self._fall_back(run):
            self._use_portable(run, fault)
            return True
        fault = diverged or fault
        seed, stage = run.attachment.seed, self._life.stage(run.index)
        text = f"kernel failed: {fault.text}"
        self._counters["kernel_failures"] += 1
        run.faults.append(text)
        if fault.kind is not FaultKind.DIVERGED:
            self._life.breakers.trip(Scope.KERNEL, run.choice.kernel_id, text, for_good=fault.kind is FaultKind.HANG)
        if stage is Stage.FOSSILIZED:
            seed.guard.reported = True
            self._say(run, fault, "identity" if seed.guard.fault is not None else "none")
            return False
        self._say(run, fault, "identity")
        if self._shared:
            self._unusable[run.index] = fault
        else:
            self._take_out(run, text)
        return False

    def _take_out(self, run: SeedRun, text: str) -> None:
        run.failure = text
        self._times.pop(run.index, None)
        self._life.cull(run, text, self._life.trip_site(run, text))

    # ---- other ranks -------------------------------------------------------------------------------------------------

    def unusable(self, run: SeedRun) -> bool:
        """Whether this rank has to do without a seed, and waits for the others to hear of it."""
        assert run.attachment is not None
        fossilized = self._life.stage(run.index) is Stage.FOSSILIZED
        return run.index in self._unusable or (fossilized and run.attachment.seed.guard.fault is not None)

    def taken(self, run: SeedRun) -> None:
        """All ranks know that one of them has to do without this seed: all do."""
        assert run.attachment is not None
        elsewhere = Fault(FaultKind.RAISED, "on another rank")
        fault, guard = self._unusable.pop(run.index, elsewhere), run.attachment.seed.guard
        if self._life.stage(run.index) is not Stage.FOSSILIZED:
            self._take_out(run, f"kernel failed: {fault.text}")
        elif guard.fault is None:
            guard.fault, guard.reported = fault, True
            self._say(run, fault, "identity")

    def _fall_back(self, run: SeedRun) -> bool:
        fall_back = getattr(run.kernel, "fall_back", None)
        return fall_back is not None and fall_back()

    def _use_portable(self, run: SeedRun, fault: Fault) -> None:
        self._counters["kernel_fallbacks"] += 1
        run.faults.append(f"portable graph from then on: {fault.text}")
        hang = fault.kind is FaultKind.HANG
        self._life.breakers.trip(Scope.CODE, run.choice.kernel_id, f"{fault.kind}: {fault.text}", for_good=hang)
        for other in self._life.runs.values():
            if other.kernel is run.kernel and other.attachment is not None:
                other.attachment.seed.guard.clear()
                self._times.pop(other.index, None)
        self._say(run, fault, "portable")

    def _diverged(self, run: SeedRun) -> Fault | None:
        """Whether the parameters themselves are not finite; reads the device, which a fault is worth."""
        if all(bool(torch.isfinite(p).all()) for p in run.module.parameters()):
            return None
        return Fault(FaultKind.DIVERGED, "the seed's parameters are not finite")

    def _say(self, run: SeedRun, fault: Fault, answer: str) -> None:
        fields: dict[str, object] = {
            "kernel_id": run.choice.kernel_id,
            "seed": run.index,
            "site": run.site.descriptor.name,
            "stage": self._life.stage(run.index).name,
            "fault": fault.kind.value,
            "detail": fault.text,
            "answer": answer,
        }
        self._counters[f"fault_{fault.kind.value}"] += 1
        _log.warning("kernel fault", **fields)
        self._tell("kernel_fault", fields)

    # ---- kernels and their circuits ----------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Count a boundary; compiled code whose circuit is half open is run again, and trusted after a whole one."""
        breakers = self._life.breakers
        tried = {k for k in self._in_use() if breakers.trying(Scope.CODE, k)}
        breakers.tick()
        for kernel_id, kernel in self._in_use().items():
            if breakers.state(Scope.CODE, kernel_id) is not CircuitState.HALF_OPEN:
                continue
            if kernel_id in tried:
                breakers.succeed(Scope.CODE, kernel_id)
            else:
                breakers.begin(Scope.CODE, kernel_id)
                getattr(kernel, "take_up", lambda: None)()

    def _in_use(self) -> dict[str, KernelLike]:
        return {r.choice.kernel_id: r.kernel for r in tuple(self._life.runs.values()) if r.kernel is not None}

    def hung(self, call: Call, seconds: float) -> None:
        """From the watchdog's thread: a call has not come back; answered when it has, if it ever does."""
        fault = Fault(FaultKind.HANG, f"{call.phase} has not come back for {seconds:.1f} s")
        compiled = getattr(self._in_use().get(call.kernel_id), "compiled", None) is not None
        # At once, since the process may end before anything else is done.
        scope = Scope.CODE if compiled else Scope.KERNEL
        self._life.breakers.trip(scope, call.kernel_id, f"{fault.kind}: {fault.text}", for_good=True)
        self._tell("kernel_hang", {"kernel_id": call.kernel_id, "phase": call.phase, "seconds": round(seconds, 1)})
        self._hung.append((call.kernel_id, fault))
        self.publish(ending=self._config.abort_on_hang)


class _Times:
    """How long a seed takes, step by step."""

    def __init__(self) -> None:
        self._known: list[float] = []
        self._slow = 0

    def judge(self, spent: float, step_s: float | None, floor_s: float, patience: int) -> Fault | None:
        """Take one step's time; a fault once too many in a row were slow."""
        if step_s is None or spent <= 0.0:
            return None
        usual = statistics.median(self._known) if len(self._known) == _LEARNT else None
        rest = max(0.0, step_s - spent)
        slow = spent > floor_s and (spent > rest or (usual is not None and spent > _USUAL * usual))
        self._slow = self._slow + 1 if slow else 0
        if not slow and usual is None:
            self._known.append(spent)
        if not self._slow or self._slow < patience:
            return None
        self._slow = 0
        than = f"the rest of the step {rest * 1e3:.1f} ms"
        if usual is not None:
            than += f", usually {usual * 1e3:.1f} ms"
        return Fault(FaultKind.SLOW, f"its forward took {spent * 1e3:.1f} ms, {than}, {patience} steps in a row")
