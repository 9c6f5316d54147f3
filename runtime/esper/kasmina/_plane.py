"""The control plane as the training thread may use it: nothing that it does, or fails to do, raises here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from esper.kasmina.control import Advice, Stage
from esper.mesh.errors import EsperError
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from esper.kasmina._lifecycle import Lifecycle
    from esper.kasmina.control import BoundaryState, ControlPlane, FieldReport, HealthColumns, RunHello
    from esper.kasmina.signature import Signature

__all__ = ["GuardedPlane", "load_failure", "reach"]

_log = get_logger("esper.kasmina.growth")


@runtime_checkable
class Follower(Protocol):
    """A plane that need not announce a run to fetch kernels."""

    def follow(self) -> None:
        """Only fetch kernels from now on: another rank speaks for the run."""


class GuardedPlane:
    """Wraps a plane, or none: exceptions are logged, counted under ``plane_<method>``, and answered like silence.

    Args:
        plane: None answers nothing to everything.
        counters: shared with the session.
        speaks: False on a rank for which another one speaks: it gets kernels for itself, and tells and asks nothing.
    """

    def __init__(self, plane: ControlPlane | None, counters: Counter[str], *, speaks: bool = True) -> None:
        self.plane = plane
        self.speaks = speaks
        self._counters = counters

    def _try(self, name: str, call: Callable[[ControlPlane], object]) -> object | None:
        if self.plane is None:
            return None
        try:
            return call(self.plane)
        except Exception as error:  # noqa: BLE001  # whatever a controller does wrong must not stop training
            self._counters[f"plane_{name}"] += 1
            count = self._counters[f"plane_{name}"]
            # The first, the second, the fourth ...: one that stays broken must not fill the log as well.
            if count & (count - 1) == 0:
                said = f"{type(error).__name__}: {error}"
                _log.warning("control plane failed", call=name, error=said, times=count)
            return None

    def _tell(self, name: str, call: Callable[[ControlPlane], object]) -> None:
        if self.speaks:
            self._try(name, call)

    def open(self, hello: RunHello) -> None:
        """Announce the run."""
        if self.speaks:
            self._try("open", lambda plane: plane.open(hello))
        elif isinstance(self.plane, Follower):
            follower = self.plane
            self._try("follow", lambda _plane: follower.follow())

    def advise(self, state: BoundaryState, deadline_s: float) -> Advice | None:
        """The answer to this boundary, or None; anything else is refused."""
        found = self._try("advise", lambda plane: plane.advise(state, deadline_s))
        if found is None or (isinstance(found, Advice) and found.boundary == state.boundary):
            return found
        self._counters["advice_refused"] += 1
        where = getattr(found, "boundary", type(found).__name__)
        _log.warning("advice refused", expected_boundary=state.boundary, found=where)
        return None

    def prefetch(self, kernel_ids: Sequence[str]) -> None:
        """What the rank that speaks was told to fetch ahead."""
        if not self.speaks:
            self._try("prefetch", lambda plane: plane.prefetch(kernel_ids))

    def request_kernel(self, kernel_id: str, signature: Signature) -> None:
        """Begin to fetch."""
        self._try("request_kernel", lambda plane: plane.request_kernel(kernel_id, signature))

    def hold_kernels(self, life: Lifecycle) -> None:
        """Hold what its seeds use or wait for, and nothing else, so that no way of ending a life has to release."""
        used = (r for r in life.runs.values() if r.kernel is not None or life.stage(r.index) is Stage.LOADING)
        kernel_ids = tuple(dict.fromkeys(run.choice.kernel_id for run in used))
        self._try("hold_kernels", lambda plane: plane.hold_kernels(kernel_ids))

    def kernel(self, kernel_id: str) -> object | None:
        """The kernel, or None while it is on its way.

        Raises:
            EsperError: it was refused: this is an answer, and the caller takes the seed out.
        """
        if self.plane is None:
            return None
        try:
            return self.plane.kernel(kernel_id)
        except EsperError:
            raise
        except Exception as error:
            self._counters["plane_kernel"] += 1
            raise EsperError(f"kernel {kernel_id}: {type(error).__name__}: {error}") from error

    def faster_kernel(self, kernel_id: str) -> object | None:
        """A variant that is loaded, or None."""
        return self._try("faster_kernel", lambda plane: plane.faster_kernel(kernel_id))

    def publish_health(self, columns: HealthColumns) -> None:
        """Hand telemetry over."""
        self._tell("publish_health", lambda plane: plane.publish_health(columns))

    def report(self, report: FieldReport) -> None:
        """Hand a field report over."""
        self._tell("report", lambda plane: plane.report(report))

    def event(self, kind: str, fields: dict[str, object]) -> None:
        """Leave an event."""
        self._tell("event", lambda plane: plane.event(kind, fields))

    def close(self, timeout_s: float) -> None:
        """Let go."""
        self._try("close", lambda plane: plane.close(timeout_s))


def reach(mesh: str | ControlPlane | None, cache_dir: Path | None) -> ControlPlane | None:
    """The plane behind an address; any other as it is."""
    if not isinstance(mesh, str):
        return mesh
    from esper.kasmina.link import MeshLink  # gRPC only where a mesh is wanted

    return MeshLink(mesh, cache_dir=cache_dir)


def load_failure(error: Exception) -> str:
    """One sentence of why a kernel could not be had."""
    return error.public if isinstance(error, EsperError) else f"{type(error).__name__}: {error}"
