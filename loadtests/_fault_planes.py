"""What everything around the kernels can do wrong: the control plane, the wire, the cache, growth's own parts."""

import functools
import inspect
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from esper.kasmina._columns import Columns
from esper.kasmina._decide import Decider
from esper.kasmina._faults import FaultDesk
from esper.kasmina._gradient import HostGradient
from esper.kasmina._lifecycle import Lifecycle
from esper.kasmina._losses import LossReader
from esper.kasmina._measure import Measurer
from esper.kasmina._observation import Observation
from esper.kasmina._place import Place
from esper.kasmina._plane import GuardedPlane
from esper.kasmina._probes import ProbeReader
from esper.kasmina._shared import Shared
from esper.kasmina._steps import StepWatch
from esper.kasmina._structure import Structure
from esper.kasmina._watch import GraftWatch
from esper.kasmina._watchdog import Watchdog
from esper.kasmina.blending import Blend
from esper.kasmina.blueprints import Birth
from esper.kasmina.breaker import Breakers
from esper.kasmina.cache import Fetched, KernelCache
from esper.kasmina.cache.disk import DiskStore
from esper.kasmina.cache.memory import CompressedBundles
from esper.kasmina.control import Action, Advice, BoundaryState, ControlPlane, Stage
from esper.kasmina.distributed import Ranks
from esper.kasmina.health import HealthSampler, Worker
from esper.kasmina.isolation import IsolationTrainer
from esper.kasmina.kernels import SigningKey, Statement, TrustStore, kernel_id_of
from esper.kasmina.layout import SeedLayout
from esper.kasmina.link import MeshLink
from esper.kasmina.local import LocalPlane
from esper.kasmina.mirror import DeviceMirror
from esper.kasmina.newborn import NewbornGroups
from esper.kasmina.spikes import HostSnapshot, SpikeDetector
from esper.mesh.errors import EsperError
from loadtests._fault_rows import Row
from loadtests._faults import Trial, bundle_of, choice, portable

__all__ = [
    "CACHE",
    "NOT_CALLED",
    "PARTS",
    "PLANE",
    "USERS",
    "cache_rows",
    "part_rows",
    "plane_rows",
    "public",
    "wire_rows",
]

NOT_CALLED = {
    "prefetch": "the link calls it itself, with what an advice names",
    "under_way": "for whoever waits before training begins; the runtime never waits",
}
"""Methods of the control plane that the runtime does not call."""
PARTS: tuple[type, ...] = (
    Blend,
    Breakers,
    Columns,
    Decider,
    DeviceMirror,
    FaultDesk,
    GraftWatch,
    GuardedPlane,
    HealthSampler,
    HostGradient,
    HostSnapshot,
    IsolationTrainer,
    Lifecycle,
    LossReader,
    Measurer,
    NewbornGroups,
    Observation,
    Place,
    ProbeReader,
    Ranks,
    SeedLayout,
    Shared,
    SpikeDetector,
    StepWatch,
    Structure,
    Watchdog,
    Worker,
)
"""Growth's own parts: a defect in any of them is a fault like another."""
_VALIDATION = "the user's own validation runs in it, and its errors are the user's"
USERS = {
    "Measurer.share": _VALIDATION,
    "Measurer.validate": _VALIDATION,
    "Ranks.check": "it tells the user that ranks would grow apart",
    "Ranks.together": _VALIDATION,
}
"""What may reach the loop, and why."""
_STATE = {"state_dict", "load_state_dict", "document", "from_document", "restore", "from_state_dict", "replace"}
"""Saving and loading are asked for by the user, and must tell what is wrong."""


def public(kind: type) -> list[str]:
    """Public methods that a class defines itself."""
    return sorted(
        name
        for name, member in vars(kind).items()
        if not name.startswith("_") and inspect.isroutine(getattr(member, "__func__", member))
    )


PLANE = [name for name in public(ControlPlane) if name not in NOT_CALLED]
CACHE = {kind: public(kind) for kind in (KernelCache, DiskStore, CompressedBundles)}


# ---- the control plane -----------------------------------------------------------------------------------------------


def _life(trial: Trial) -> None:
    """A whole life, commanded by the plane's policy, then the end of the run."""
    for _ in range(4):
        trial.step(2)
        trial.boundary()
    if trial.growth is not None:
        trial.growth.close(0.2)
    trial.step(1)


def _policy(trial: list[Trial]) -> Callable[[BoundaryState], Advice | None]:
    way = [Stage.GRAFTING, Stage.FINE_TUNING]

    def advise(state: BoundaryState) -> Advice | None:
        number = state.boundary
        if number == 1:
            kernel = portable()
            decision = trial[0].decision(number, Action.GERMINATE, kernel=choice(kernel.id), to_stage=way[0])
        elif number - 1 < len(way):
            decision = trial[0].decision(number, Action.ADVANCE, to_stage=way[number - 1])
        elif number == len(way) + 1:
            decision = trial[0].decision(number, Action.CULL)
        else:
            return None
        return Advice(boundary=number, decisions=(decision,), explanation="", controller_state=b"")

    return advise


def _commanded(plane: LocalPlane, **options: Any) -> Trial:
    kernel = portable()
    plane.kernels[kernel.id] = kernel
    found: list[Trial] = []
    plane.policy = _policy(found)
    found.append(Trial(plane, **options))
    return found[0]


def _refuse(*_arguments: Any, **_keywords: Any) -> Any:
    raise ConnectionError("down")


_ANSWERS: dict[str, Callable[..., Any]] = {
    "raises": _refuse,
    "answers None": lambda *_a, **_k: None,
    "answers nonsense": lambda *_a, **_k: {"grow": "everything"},
}


def plane_rows() -> list[Row]:
    """Every method of the control plane that the runtime calls, with every wrong answer."""

    def row(name: str, fault: str) -> Row:
        def begin() -> tuple[Trial, Callable[[Trial], None]]:
            plane = LocalPlane()
            trial = _commanded(plane)
            setattr(plane, name, _ANSWERS[fault])
            return trial, _life

        says = counts = ""
        if fault == "raises":
            counts = f"plane_{name}"
            # A kernel that cannot be had is an answer, and told with the seed that waited for it.
            says = "decision refused" if name == "kernel" else f"control plane failed: call={name}"
        elif fault == "answers nonsense" and name == "advise":
            counts, says = "advice_refused", "advice refused"
        elif fault == "answers nonsense" and name == "kernel":
            counts = "decisions_refused"
        return Row(f"ControlPlane.{name}", fault, begin, says=says, counts=counts)

    return [row(name, fault) for name in PLANE for fault in _ANSWERS]


# ---- the wire --------------------------------------------------------------------------------------------------------


@contextmanager
def _listening(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A port behind which something other than a mesh listens."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    stop, held = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                continue
            held.append(connection)
            answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        stop.set()
        thread.join(1.0)
        for connection in held:
            connection.close()
        server.close()


def _junk(connection: socket.socket) -> None:
    try:
        connection.sendall(b"\x00\xff" * 512)
    except OSError:
        return


def _drop(connection: socket.socket) -> None:
    connection.close()


def wire_rows() -> list[Row]:
    """A mesh that is not there, does not answer, talks nonsense, or hangs up."""
    behind: dict[str, Callable[[socket.socket], None]] = {
        "accepts and never answers": lambda _: None,
        "answers junk": _junk,
        "hangs up": _drop,
    }

    def row(name: str, answer: Callable[[socket.socket], None] | None) -> Row:
        def begin() -> tuple[Trial, Callable[[Trial], None]]:
            def script(trial: Trial) -> None:
                if answer is None:
                    _over(trial, "127.0.0.1:1")
                    return
                with _listening(answer) as target:
                    _over(trial, target)

            return Trial(LocalPlane()), script

        return Row("mesh over the wire", name, begin)

    return [row("is not there", None), *(row(name, answer) for name, answer in behind.items())]


def _over(trial: Trial, target: str) -> None:
    assert trial.growth is not None
    trial.growth.plane.plane = MeshLink(target)
    for _ in range(3):
        trial.step(2)
        trial.boundary()
    trial.growth.close(0.2)
    trial.step(1)


# ---- the cache -------------------------------------------------------------------------------------------------------

_KEY = SigningKey.generate()


def _fetched() -> Fetched:
    from datetime import UTC, datetime

    bundle = bundle_of(Birth.ZERO)
    statement = Statement(
        kernel_id=kernel_id_of(bundle),
        passed=True,
        target="any",
        gauntlet_version="1",
        issued_at=datetime(2026, 11, 23, tzinfo=UTC),
    )
    return Fetched(bundle, _KEY.sign(statement))


class _CachePlane(LocalPlane):
    """Kernels through a real cache, whose loading runs on a thread of its own, as behind the link."""

    def __init__(self, folder: Path, fetch: Callable[[str], Any]) -> None:
        super().__init__()
        self.cache = KernelCache(folder, fetch, lambda: TrustStore([_KEY.public]), available=lambda: 1.0)
        self._worker = ThreadPoolExecutor(1)
        self._asked: dict[str, Future[Any]] = {}

    def request_kernel(self, kernel_id: str, signature: Any) -> None:
        """Begin to obtain."""
        self._asked[kernel_id] = self._worker.submit(self.cache.obtain, kernel_id, signature)

    def hold_kernels(self, kernel_ids: Any) -> None:
        """Hold, on the worker."""
        for kernel_id in kernel_ids:
            self._worker.submit(self.cache.hold, kernel_id)
        self._worker.submit(self.cache.relieve)

    def kernel(self, kernel_id: str) -> object | None:
        """What came of it."""
        asked = self._asked.get(kernel_id)
        if asked is None or not asked.done():
            return None
        error = asked.exception()
        if isinstance(error, EsperError):
            raise error
        if error is not None:
            raise RuntimeError(str(error))
        return self.cache.get(kernel_id)

    def finish(self) -> None:
        """End the worker, which may still have its hands on the disk."""
        self._worker.shutdown(wait=True, cancel_futures=True)


def _cached(change: Callable[[], Any], fetch: Callable[[str], Any]) -> tuple[Trial, Callable[[Trial], None]]:
    folder = TemporaryDirectory()
    plane = _CachePlane(Path(folder.name), fetch)

    def script(trial: Trial) -> None:
        with folder, change():
            kernel_id = kernel_id_of(bundle_of(Birth.ZERO))
            trial.step(1)
            trial.boundary(Action.GERMINATE, kernel=choice(kernel_id))
            for _ in range(3):
                time.sleep(0.02)
                trial.step(1)
                if trial.stage == "LOADING":
                    trial.boundary(Action.ADVANCE, to_stage=Stage.GRAFTING)
            plane.finish()

    return Trial(plane), script


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def cache_rows() -> list[Row]:
    """Every method of the cache and its tiers raises; the library gives what it should not; the loader fails."""

    def row(where: str, fault: str, change: Callable[[], Any], fetch: Callable[[str], Any]) -> Row:
        return Row(where, fault, lambda: _cached(change, fetch))

    def broken(kind: type, name: str) -> Row:
        change = functools.partial(patch.object, kind, name, _refuse)
        return row(f"{kind.__name__}.{name}", "raises", change, lambda _: _fetched())

    gives: dict[str, Callable[[str], Any]] = {
        "raises": _refuse,
        "gives None": lambda _: None,
        "gives other bytes": lambda _: _fetched()._replace(bundle=b"PK" + bytes(64)),
        "gives no verdict": lambda _: _fetched()._replace(verdict=None),
        "hangs": lambda _: time.sleep(0.3),
    }
    loader = "esper.kasmina.kernels.load.load_kernel"

    def unloadable(fault: str, answer: Callable[..., Any]) -> Row:
        return row("load_kernel", fault, lambda: patch(loader, answer), lambda _: _fetched())

    return [
        *(broken(kind, name) for kind, names in CACHE.items() for name in names),
        *(row("fetch from the library", fault, _as_it_is, fetch) for fault, fetch in gives.items()),
        *(unloadable(fault, answer) for fault, answer in _ANSWERS.items()),
    ]


# ---- growth's own parts ----------------------------------------------------------------------------------------------


def part_rows() -> list[Row]:
    """Every public method of growth's own parts raises, from the second boundary on."""

    def row(kind: type, name: str) -> Row:
        def begin() -> tuple[Trial, Callable[[Trial], None]]:
            trial = _commanded(LocalPlane())

            def script(trial: Trial) -> None:
                trial.step(2)
                trial.boundary()
                with patch.object(kind, name, _refuse):
                    _life(trial)

            return trial, script

        return Row(f"{kind.__name__}.{name}", "raises", begin)

    names = [(kind, name) for kind in PARTS for name in public(kind) if name not in _STATE]
    return [row(kind, name) for kind, name in names if f"{kind.__name__}.{name}" not in USERS]
