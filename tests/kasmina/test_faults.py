"""Everything that the runtime calls, failing in every way: training goes on, the host is what it would be anyway."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.breaker import CircuitState, Scope
from esper.kasmina.control import Action, Stage
from esper.kasmina.local import LocalPlane
from loadtests._fault_kernels import FAULTS, Switch, kernel_rows
from loadtests._fault_planes import (
    CACHE,
    NOT_CALLED,
    PARTS,
    PLANE,
    cache_rows,
    part_rows,
    plane_rows,
    public,
    wire_rows,
)
from loadtests._faults import Trial, choice, compiled, portable, young_objects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loadtests._fault_rows import Row

ROWS = [*kernel_rows(), *plane_rows(), *wire_rows(), *cache_rows(), *part_rows()]
NAN = FAULTS["not finite"]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    portable()
    with young_objects():
        yield


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_fault_costs_the_host_nothing(row: Row) -> None:
    """The host is, bit for bit and step by step, that of a run without growth; what happened is told, once."""
    assert [] == row.problems(row.run())


class TestTheListIsComplete:
    """What is called and not in the table is a hole in it."""

    def test_every_method_of_the_control_plane(self) -> None:
        """With every wrong answer; the two that the runtime never calls say why."""
        from esper.kasmina.control import ControlPlane

        covered = Counter(row.where.removeprefix("ControlPlane.") for row in plane_rows())
        assert set(public(ControlPlane)) == set(covered) | set(NOT_CALLED)
        assert set(PLANE) == {name for name, count in covered.items() if count == 3}

    def test_every_method_of_the_cache_and_its_tiers(self) -> None:
        """All classes of the package that hold kernels."""
        from esper.kasmina import cache
        from esper.kasmina.cache import memory

        tiers = {cache.KernelCache, cache.DiskStore, memory.CompressedBundles}
        assert tiers == set(CACHE)
        rows = {row.where for row in cache_rows()}
        assert {f"{kind.__name__}.{name}" for kind in tiers for name in public(kind)} <= rows

    def test_every_part_that_a_session_is_made_of(self) -> None:
        """Whatever object of the runtime's own a session holds, however deep."""
        trial = Trial(LocalPlane())
        trial.step(1)
        trial.germinate(portable())
        trial.step(2)
        held, seen = {type(part) for part in _parts(trial.growth, set())}, set(PARTS)
        trial.growth.close()
        # What the user calls, what the rows of kernels cover, and the guard itself, which has nobody behind it.
        others = {"Growth", "Guard", "Kernel", "KernelModule", "ParameterGroup", "SeedModule", "Selection"}
        assert others >= {kind.__name__ for kind in held - seen if _acts(kind)}


def _parts(thing: Any, seen: set[int]) -> Iterator[Any]:
    if id(thing) in seen or isinstance(thing, type):
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        for part in thing.values():
            yield from _parts(part, seen)
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _parts(part, seen)
    elif type(thing).__module__.startswith("esper.kasmina") and not isinstance(thing, LocalPlane):
        yield thing
        slots = [s for kind in type(thing).__mro__ for s in getattr(kind, "__slots__", ())]
        names = [*getattr(thing, "__dict__", {}), *slots]
        for name in names:
            yield from _parts(getattr(thing, name, None), seen)


def _acts(kind: type) -> bool:
    """Whether a class has behaviour that a session calls: values and private helpers have none."""
    private = kind.__name__.startswith("_")
    return not private and bool(public(kind)) and not hasattr(kind, "__dataclass_fields__")


# ---- circuits in a run -----------------------------------------------------------------------------------------------


def _grown(kernel: Any, **options: Any) -> Trial:
    trial = Trial(LocalPlane(), slow_floor_s=60.0, **options)
    trial.step(1)
    trial.germinate(kernel)
    trial.step(2)
    return trial


def _failing(switch: Switch, fault: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda sound: lambda *given: fault(sound(*given)) if switch.on else sound(*given)


def test_compiled_code_is_tried_again_and_trusted_again() -> None:
    """Portable while the circuit is open, compiled in the half-open boundary, closed after a whole one."""
    switch = Switch()
    kernel = compiled(forward=_failing(switch, FAULTS["raises"]))
    trial = _grown(kernel, breaker_boundaries=2)
    switch.on = True
    trial.step(1)
    switch.on = False
    breakers, seen = trial.growth.life.breakers, []
    for _ in range(4):
        seen.append((kernel.compiled is not None, str(breakers.state(Scope.CODE, kernel.id))))
        trial.boundary()
        trial.step(1)
    seen.append((kernel.compiled is not None, str(breakers.state(Scope.CODE, kernel.id))))
    assert [(False, "open"), (False, "open"), (True, "half_open"), (True, "closed"), (True, "closed")] == seen
    switch.on = True
    trial.step(1)
    assert 2 == trial.growth.counters["kernel_fallbacks"]


def test_a_kernel_that_failed_is_refused_until_its_circuit_is_half_open() -> None:
    """The refusal says why; one trial is let through, and its success at G2 closes the circuit."""
    switch = Switch()
    kernel = portable(_failing(switch, FAULTS["raises"]))
    trial = _grown(kernel, breaker_boundaries=3, embargo_boundaries=0)
    switch.on = True
    trial.step(2)
    switch.on = False
    assert "EMBARGOED" == trial.stage
    trial.boundary(Action.RELEASE)
    told = []
    while trial.stage == "DORMANT":
        trial.boundary(Action.GERMINATE, kernel=choice(kernel.id), to_stage=Stage.GRAFTING)
        told += [str(reason) for a in trial.growth.last_report.applied for reason in a.refused]
    assert 1 == len(told)
    assert "circuit open for 1 boundaries, after kernel failed: RuntimeError: native code says no" in told[0]
    breakers = trial.growth.life.breakers
    assert breakers.trying(Scope.KERNEL, kernel.id)
    trial.step(3)
    trial.boundary(Action.ADVANCE, to_stage=Stage.STABILIZING)
    assert ("STABILIZING", CircuitState.CLOSED) == (trial.stage, breakers.state(Scope.KERNEL, kernel.id))


def test_a_site_that_fails_again_stays_closed_for_longer() -> None:
    """The embargo is its circuit's: twice as long for the second failure in a row."""
    closed = []
    trial = Trial(LocalPlane(), breaker_boundaries=1, embargo_boundaries=1, slow_floor_s=60.0)
    trial.step(1)
    for _ in range(3):
        switch = Switch()
        while trial.stage != "GRAFTING":
            trial.germinate(portable(_failing(switch, FAULTS["raises"])))
            if trial.stage == "EMBARGOED":
                trial.boundary(Action.RELEASE)
        switch.on = True
        trial.step(2)
        closed.append(int(trial.growth.life.layout.closed_boundaries[0]))
    assert [1, 2, 4] == closed


@pytest.mark.parametrize("make", [compiled, portable])
def test_circuits_outlive_a_return_to_an_older_checkpoint(make: Any) -> None:
    """Compiled code stays away, a living seed of a kernel that failed is locked; also by state kept outside."""
    switch = Switch()
    forward = _failing(switch, FAULTS["raises"])
    kernel = make(forward)
    trial = _grown(kernel)
    old, weights = trial.growth.state_dict(), trial.model.state_dict()
    switch.on = True
    trial.step(2)
    outside = json.loads(json.dumps(trial.growth.breakers()))
    fresh = Trial(LocalPlane())
    fresh_kernel = make(forward)
    fresh.growth.load_state_dict(old, kernels={kernel.id: fresh_kernel}, breakers=outside)
    if make is compiled:
        fresh.model.load_state_dict(weights)
    assert {"compiled": "GRAFTING", "portable": "ROLLED_BACK"}[make.__name__] == fresh.stage
    assert fresh_kernel.compiled is None
    trial.growth.load_state_dict(old, kernels={kernel.id: make(forward)})
    assert outside.keys() <= trial.growth.breakers().keys()
    saved = fresh.growth.state_dict()["breakers"]
    assert outside.keys() <= saved.keys()


def test_a_fossilized_seed_is_never_taken_out() -> None:
    """The host runs without what its kernel does not give; the kernel is told once, and refused elsewhere."""
    switch = Switch()
    kernel = portable(_failing(switch, FAULTS["raises"]))
    trial = _grown(kernel, price_per_million_parameters=-1e9)
    trial.boundary(Action.ADVANCE, to_stage=Stage.FOSSILIZED)
    for _ in range(2):
        trial.step(2)
        trial.boundary(Action.ADVANCE, to_stage=Stage.FOSSILIZED)
    assert "FOSSILIZED" == trial.stage
    switch.on = True
    trial.step(3)
    assert ("FOSSILIZED", 1) == (trial.stage, trial.growth.counters["kernel_failures"])
    assert "kernel" in trial.growth.breakers()


def test_a_seed_whose_parameters_diverge_is_taken_out_and_its_kernel_is_not_blamed() -> None:
    """It learnt that: the site's circuit opens, the kernel's stays closed."""
    trial = _grown(portable())
    with torch.no_grad():
        next(trial.seed.delta.parameters()).fill_(float("nan"))
    trial.step(2)
    assert "EMBARGOED" == trial.stage
    assert {"site"} == set(trial.growth.breakers())
    assert ["diverged"] == [fields["fault"] for kind, fields in trial.plane.events if kind == "kernel_fault"]


# ---- guards ----------------------------------------------------------------------------------------------------------


def test_a_gradient_that_the_host_itself_spoils_is_not_the_kernels_fault() -> None:
    """A loss that is not finite after the step tells whose gradient it was."""
    trial = _grown(portable())
    guard = trial.seed.guard
    guard.suspect = 1
    trial.growth.life.watch.detector.disarm()
    for loss in (1.0, float("nan")):
        trial.optimizer.step()
        trial.growth.step(loss)
    assert "kernel_fault" not in [kind for kind, _ in trial.plane.events]
    assert 0 == guard.suspect


@pytest.mark.parametrize("fault", ["raises", "not finite"])
def test_a_fault_inside_activation_checkpointing(fault: str) -> None:
    """The forward that is run again in the backward goes without the seed as the first one did."""
    switch = Switch()
    trial = _grown(portable(_failing(switch, FAULTS[fault])))
    model = trial.model
    x = trial.x[:8].clone().requires_grad_()
    model(x).sum().backward()
    trial.seed.enabled = False
    x.grad = None
    model(x).sum().backward()
    expected = x.grad.clone()
    trial.seed.enabled = True
    x.grad = None
    switch.on = True
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(expected, x.grad)
    trial.step(1)
    assert "EMBARGOED" == trial.stage


class _Spoilt(nn.Module):
    """A module of a kernel that is not finite where its input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logarithms of negative numbers, too."""
        return torch.log(x) * self.weight


def test_compiled_graphs_mask_what_is_not_finite() -> None:
    """Without a graph break: values and gradients are the host's, and the probe tells afterwards."""
    from esper.kasmina._guard import Guard

    guard, delta, probe = Guard(()), _Spoilt(), torch.zeros(())

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + guard.run(delta, x, probe)

    graph = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = torch.tensor([[1.0, 2.0, -3.0, 4.0]], requires_grad=True)
    y = graph(x)
    assert torch.equal(x, y)
    y.sum().backward()
    assert torch.equal(torch.ones(1, 4), x.grad)
    assert not bool(torch.isfinite(probe))


def test_guards_stand_aside_where_values_can_not_be_read() -> None:
    """Batched tensors of functional transforms go through as they are."""
    trial = _grown(portable())
    weights = dict(trial.model.named_parameters()) | dict(trial.model.named_buffers())

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(trial.model, weights, (x[None],))[0]

    assert torch.allclose(trial.model(trial.x[:3]), torch.func.vmap(forward)(trial.x[:3]), atol=1e-6)
    assert trial.seed.guard.fault is None


class _Event:
    """An event of a device; reached or not."""

    def __init__(self, at_ms: float, *, reached: bool = True) -> None:
        self.at_ms, self.reached = at_ms, reached

    def query(self) -> bool:
        """Whether the device has come by."""
        return self.reached

    def elapsed_time(self, other: _Event) -> float:
        """Milliseconds to another event."""
        return other.at_ms - self.at_ms


def test_time_on_a_device_is_that_of_forwards_whose_end_has_come() -> None:
    """Nothing is waited for; between two of them the calling thread's own time is no reason to forget slow ones."""
    trial = _grown(portable(), slow_patience=2)
    trial.growth.config.slow_floor_s, guard = 0.5, trial.seed.guard
    guard.behind = True
    end = _Event(1e9, reached=False)
    guard.events = [(_Event(0.0), _Event(7.0)), (_Event(1.0), end)]
    guard.spent_s = 0.001
    assert (0.007, True) == guard.take_spent()
    assert (0.0, False) == guard.take_spent()
    for _ in range(2):
        assert "GRAFTING" == trial.stage
        trial.step(1)
        guard.events = [(_Event(0.0), _Event(1e9))]
        trial.step(1)
    assert "EMBARGOED" == trial.stage
    assert ["slow"] == [fields["fault"] for kind, fields in trial.plane.events if kind == "kernel_fault"]


def test_forwards_of_a_validation_are_not_timed() -> None:
    """They are part of no step that they could be too long for."""
    trial = _grown(portable())
    guard = trial.seed.guard
    guard.take_spent()
    trial.validate()
    assert (0.0, True) == guard.take_spent()
    trial.model(trial.x[:8])
    assert guard.take_spent()[0] > 0.0


def test_copies_of_a_host_carry_their_guards() -> None:
    """A deep copy runs the copied seed."""
    import copy

    trial = _grown(portable())
    twin = copy.deepcopy(trial.model)
    assert torch.equal(trial.model(trial.x[:3]), twin(trial.x[:3]))


# ---- hangs -----------------------------------------------------------------------------------------------------------


def test_a_call_inside_another_leaves_that_one_watched(tmp_path: Any) -> None:
    """A backward that ends inside a step in isolation does not end the step, nor its note."""
    from esper.kasmina._flight import FlightRecorder, last_call

    flight = FlightRecorder()
    flight.write_to(tmp_path / "flight")
    step = flight.enter("sha256:a", "isolation")
    flight.leave(flight.enter("sha256:b", "backward"))
    assert "isolation" == flight.longest().phase
    assert ("sha256:a", "isolation") == last_call(tmp_path / "flight")
    flight.leave(step)
    assert (None, None) == (flight.longest(), last_call(tmp_path / "flight"))
    flight.stop_writing()


_HANG = """
import ctypes, sys, time
from pathlib import Path
from esper.kasmina._flight import FLIGHT
from esper.kasmina._watchdog import Watchdog
FLIGHT.write_to(Path(sys.argv[1]))
Watchdog(0.2, abort=True, told=lambda call, seconds: print("told", call.phase, flush=True)).start()
FLIGHT.enter("sha256:" + "ab" * 32, "forward")
# PyDLL keeps the interpreter's lock, as the loader of compiled kernels does.
(time.sleep if sys.argv[2] == "free" else ctypes.PyDLL(None).sleep)(60)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("lock", "status", "said"), [("free", 70, "told forward"), ("held", 1, "")])
def test_a_hang_ends_the_process_where_it_may(tmp_path: Any, lock: str, status: int, said: str) -> None:
    """With the interpreter's lock held too; stacks are written, and the note of the call survives."""
    import subprocess
    import sys

    from esper.kasmina._flight import last_call

    note = tmp_path / "flight"
    done = subprocess.run(
        [sys.executable, "-c", _HANG, str(note), lock], capture_output=True, text=True, check=False, timeout=50
    )
    assert (status, True, said) == (done.returncode, "most recent call first" in done.stderr, done.stdout.strip())
    assert ("sha256:" + "ab" * 32, "forward") == last_call(note)


def test_a_note_of_no_call(tmp_path: Any) -> None:
    """What came back leaves nothing; neither does a file that is none."""
    from esper.kasmina._flight import FlightRecorder, last_call

    recorder, note = FlightRecorder(), tmp_path / "flight"
    recorder.write_to(note)
    recorder.enter("sha256:" + "ab" * 32, "backward")
    assert ("sha256:" + "ab" * 32, "backward") == last_call(note)
    assert "backward" == recorder.longest().phase
    recorder.leave()
    recorder.stop_writing()
    assert (None, None) == (last_call(note), recorder.longest())
    note.write_bytes(b"\xff\xfe")
    assert (None, None) == (last_call(note), last_call(tmp_path / "none"))
