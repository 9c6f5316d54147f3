"""`MeshLink`: the runtime's one door to the mesh, over gRPC, without ever holding the training thread up.

One background thread with an event loop of its own does all input and output; the training thread hands over and
looks::

    link = MeshLink("localhost:7600", cache_dir=Path.home() / ".cache/esper/kernels")
    link.open(hello)                                  # returns at once; the stream is opened in the background
    advice = link.advise(state, deadline_s=1.0)       # None when the controller is away or too slow
    link.request_kernel(kernel_id, site.signature)    # fetched, verified and loaded in the background
    kernel = link.kernel(kernel_id)                   # the kernel, None while it is on its way, or its refusal
    link.close(timeout_s=2.0)                         # delivers what is buffered

No method raises, except `kernel` for a kernel that was refused. Without a mesh, with one that dies, and with one that
comes back, training goes on; what changes is whether `advise` answers. All buffers are bounded.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.kasmina._link_advice import Advisor, Question, Standing
from esper.kasmina._link_bus import Mail
from esper.kasmina._link_kernels import KernelFetcher
from esper.mesh.channel import open_channel
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import grpc.aio

    from esper.kasmina.control import Advice, BoundaryState, FieldReport, HealthColumns, RunHello
    from esper.kasmina.kernels.kernel import Kernel
    from esper.kasmina.kernels.signing import PublicKey
    from esper.kasmina.signature import Signature

__all__ = ["LinkSettings", "MeshLink", "Standing"]

_log = get_logger("esper.kasmina.link")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Patience and bounds of a link; the defaults fit."""

    connect_timeout_s: float = 5.0
    """Time for opening a stream, up to the controller's `ready`. Refused connections fail in milliseconds anyway."""
    misses_allowed: int = 3
    """Late answers in a row after which the controller counts as away, so that it costs no further deadlines."""
    probe_initial_s: float = 0.25
    """First pause before a controller that is away is tried again; doubles each time."""
    probe_max_s: float = 30.0
    """Longest such pause."""
    call_timeout_s: float = 5.0
    """Deadline of unary calls to the library."""
    download_timeout_s: float = 120.0
    """Deadline of one download."""
    kernel_attempts: int = 5
    """Attempts to fetch a kernel through trouble that may pass."""
    variant_interval_s: float = 30.0
    """Least time between two questions for a faster variant of one kernel in use."""
    max_kernels: int = 64
    """Kernels under way for seeds, kernels under way altogether when one is fetched ahead, and refusals remembered."""
    loaded_bytes: int = 512 << 20
    """Bound of the loaded kernels that no seed uses."""
    memory_bytes: int = 128 << 20
    """Bound of the compressed bundles in memory."""
    disk_bytes: int = 8 << 30
    """Bound of the bundles in the directory of the cache."""
    max_bundle_bytes: int = 256 << 20
    """Largest bundle that is taken."""
    pinned_keys: tuple[PublicKey, ...] = ()
    """The only keys whose verdicts are believed; empty: every key that the library lists and has not revoked."""
    telemetry_limit: int = 1024
    """Batches of telemetry that wait for the bus; beyond it the oldest are shed and counted."""
    report_limit: int = 4096
    """Field reports and events that wait for the bus; beyond it new ones are dropped, counted and logged."""


class MeshLink:
    """See the module. Implements `esper.kasmina.control.ControlPlane`; serves one run at a time.

    Args:
        target: ``host:port`` of the mesh.
        token: identity to call with, or a callable that gives a fresh one; None calls as a client of this machine.
        cache_dir: directory of the kernel cache, shared between processes; None keeps nothing on disk.
        settings: patience and bounds.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | Callable[[], str] | None = None,
        cache_dir: Path | None = None,
        settings: LinkSettings | None = None,
    ) -> None:
        self.settings = LinkSettings() if settings is None else settings
        self._target = target
        self._token = token
        self._shared: grpc.aio.Channel | None = None
        self._advisor = Advisor(self.settings, self._channel)
        self._kernels = KernelFetcher(self.settings, self._channel, cache_dir)
        self._mail = Mail(self.settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._drain_by = 0.0
        self._thread = threading.Thread(target=self._live, name="esper-link", daemon=True)
        self._started = threading.Event()

    @property
    def standing(self) -> Standing:
        """What may be expected of the controller now."""
        return self._advisor.standing

    def open(self, hello: RunHello) -> None:
        """Announce the run, or announce it again after it went back; connecting happens in the background."""
        self._advisor.introduce(hello)
        self._mail.run_id = hello.run_id
        self._kernels.variants.target = hello.target
        if self._thread.ident is None:
            self._thread.start()
            self._started.wait()  # a few hundred microseconds: until the loop takes callbacks
        self._post(self._advisor.restart)

    def follow(self) -> None:
        """Fetch kernels for a run that another process announces and speaks for."""
        if self._thread.ident is None:
            self._thread.start()
            self._started.wait()

    def advise(self, state: BoundaryState, deadline_s: float) -> Advice | None:
        """The answer to this boundary, or None: at once when the controller is away, else at the deadline."""
        advice = self._advisor.ask(
            Question(state, deadline_s), lambda question: self._post(self._advisor.submit, question)
        )
        self.prefetch(() if advice is None else advice.prefetch)
        return advice

    def request_kernel(self, kernel_id: str, signature: Signature) -> None:
        """Begin to fetch, verify and load a kernel in the background; idempotent."""
        self._post(self._kernels.request, kernel_id, signature)

    def prefetch(self, kernel_ids: Sequence[str]) -> None:
        """Begin to fetch, verify and load what is likely to be wanted soon; failures are forgotten."""
        if kernel_ids:
            wanted = tuple(kernel_ids)
            self._kernels.announce(wanted)
            if not self._post(self._kernels.request_ahead, wanted):
                self._kernels.dismiss(wanted)

    def hold_kernels(self, kernel_ids: Sequence[str]) -> None:
        """Keep these kernels loaded, and those requested from now on; any other may leave the cache."""
        self._post(self._kernels.hold_only, tuple(kernel_ids))

    def under_way(self, kernel_ids: Sequence[str]) -> frozenset[str]:
        """Those of these kernels that are still being fetched; any other is there, was refused, or was not kept."""
        return self._kernels.under_way(kernel_ids)

    def kernel(self, kernel_id: str) -> Kernel | None:
        """The loaded kernel, or None while it is not there.

        Raises:
            EsperError: it was refused or could not be fetched. Raised once: requesting it again starts afresh.
        """
        return self._kernels.look_up(kernel_id)

    def faster_kernel(self, kernel_id: str) -> Kernel | None:
        """A variant of a kernel in use that the library measured to be faster, once it is loaded."""
        return self._kernels.variants.faster(kernel_id)

    def publish_health(self, columns: HealthColumns) -> None:
        """Hand telemetry over; dropped and counted when the buffers are full."""
        self._mail.hand_over(self._post, self._mail.send_health, columns)

    def report(self, report: FieldReport) -> None:
        """Hand a field report over; kept until delivered; dropped, with an error in the log, when buffers are full."""
        self._mail.hand_over(self._post, self._mail.send_report, report)

    def event(self, kind: str, fields: dict[str, object]) -> None:
        """Leave an event of the run on the bus, as JSON."""
        # A copy: the caller may go on writing into its own.
        self._mail.hand_over(self._post, self._mail.send_event, kind, dict(fields))

    def close(self, timeout_s: float) -> None:
        """Deliver what is buffered, at most for `timeout_s`, and let go of the mesh. May be called more than once."""
        if self._thread.ident is None:
            return
        self._drain_by = time.monotonic() + timeout_s
        self._post(self._stop.set)
        # The loop keeps to the time itself; the margin is for cancelling what is left.
        self._thread.join(timeout_s + 1.0)
        if self._thread.is_alive():
            _log.error("link_did_not_close", waited_s=timeout_s + 1.0)

    # Background thread

    def _post(self, function: Callable[..., object], *arguments: object) -> bool:
        """Run something on the loop, from any thread; False when there is none (any more)."""
        loop = self._loop
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # closed in this moment
            return False
        return True

    def _channel(self) -> grpc.aio.Channel:
        if self._shared is None:
            self._shared = open_channel(self._target, token=self._token)
        return self._shared

    def _live(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception:  # noqa: BLE001  # the last line of defence: a defect here means no growth, never a failed run
            _log.exception("link_failed")
        finally:
            self._loop = None
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_defect)
        self._mail.start(self._channel())
        talking = asyncio.create_task(self._advisor.run(), name="advise")
        self._started.set()
        try:
            await self._stop.wait()
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
            await self._kernels.close()
            await self._mail.close(max(0.0, self._drain_by - time.monotonic()))
            if self._shared is not None:
                await self._shared.close()


def _log_defect(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    _log.error("link_defect", detail=str(context.get("message")), exc_info=context.get("exception"))
