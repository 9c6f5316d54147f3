"""Keeps the catalogue up with the library, and asks the library for builds.

One background loop watches from the present, lists everything, then applies each change; when the watch ends, for
whatever reason, it begins again. A library that is away leaves the catalogue as it was: what was validated stays
validated, and the runtime verifies every kernel anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from esper.mesh.errors import EsperError, Unavailable, from_rpc_error
from esper.mesh.logging import get_logger
from esper.tamiyo.catalogue import KernelState
from esper.tamiyo.convert import blueprint_from_proto, kernel_from_proto, kernel_state_from_proto, wish_to_proto
from esper.tamiyo.preparation import wishes
from esper.v1 import blueprint_pb2, build_pb2, kernel_pb2
from esper.v1 import urza_service_pb2 as pb
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.control import RunHello
    from esper.tamiyo.catalogue import Catalogue
    from esper.tamiyo.preparation import PreparationRules

__all__ = ["LibraryView", "Prepared"]

_log = get_logger("esper.tamiyo")
_PAGE = 1000
_BATCH = 256
_BACKOFF_S, _BACKOFF_MAX_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """How far the library is ready for a run."""

    pending: int
    failed: int


class LibraryView:
    """See the module.

    Args:
        catalogue: the view to keep up.
        channel: gives the channel to the library.
        rules: of preparation.
    """

    def __init__(self, catalogue: Catalogue, channel: Callable[[], grpc.aio.Channel], rules: PreparationRules) -> None:
        self.catalogue = catalogue
        self._channel = channel
        self._rules = rules
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._task = asyncio.create_task(self._run(), name="library-view")

    async def close(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def prepare(self, hello: RunHello) -> Prepared:
        """Ask for the builds that a run wants, and tell how many of those it waits for are still to come.

        Raises:
            EsperError: the library is away.
        """
        wanted = wishes(hello, self.catalogue.blueprints, self._rules)
        pending = failed = 0
        for start in range(0, len(wanted), _BATCH):
            batch = wanted[start : start + _BATCH]
            request = pb.RequestBuildsRequest(builds=[wish_to_proto(wish) for wish in batch])
            try:
                answer = await UrzaServiceStub(self._channel()).RequestBuilds(request)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
            for wish, build in zip(batch, answer.builds, strict=True):
                if wish.awaited:
                    state = self._stands(build)
                    pending += state is KernelState.STAGED
                    failed += state is KernelState.CLOSED
        return Prepared(pending, failed)

    def _stands(self, build: build_pb2.Build) -> KernelState:
        if build.state == build_pb2.BUILD_STATE_FAILED:
            return KernelState.CLOSED
        if build.state != build_pb2.BUILD_STATE_SUCCEEDED:
            return KernelState.STAGED
        # Not seen yet: the watch is about to tell.
        return self.catalogue.state_of(build.kernel_id) or KernelState.STAGED

    async def blueprints_within(self, timeout_s: float) -> bool:
        """Wait until the library is known to hold a blueprint; False when it did not within the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.catalogue.blueprints:
                    self._changed.clear()
                    await self._changed.wait()
        return bool(self.catalogue.blueprints)

    async def _run(self) -> None:
        wait_s = _BACKOFF_S
        while True:
            revision = self.catalogue.revision
            try:
                await self._watch()
            except EsperError as error:
                _log.info("library_watch_ended", reason=error.reason, detail=error.public)
            except Exception:  # noqa: BLE001  # a change that cannot be read must not end the view for good
                _log.exception("library_watch_failed")
            wait_s = _BACKOFF_S if self.catalogue.revision != revision else min(_BACKOFF_MAX_S, 2 * wait_s)
            await asyncio.sleep(wait_s)

    async def _watch(self) -> None:
        stub = UrzaServiceStub(self._channel())
        call: Any = stub.WatchLibrary(pb.WatchLibraryRequest())
        try:
            # The position first: what changes while the listing runs is then told by the watch.
            if await call.read() is grpc.aio.EOF:
                raise Unavailable("the watch of the library ended before its position")
            await self._list(stub)
            while (change := await call.read()) is not grpc.aio.EOF:
                self._apply(change)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def _list(self, stub: Any) -> None:
        blueprints: list[blueprint_pb2.Blueprint] = []
        kernels: list[kernel_pb2.Kernel] = []
        token = ""
        while True:
            shelf = await stub.ListBlueprints(pb.ListBlueprintsRequest(page_size=_PAGE, page_token=token))
            blueprints.extend(shelf.blueprints)
            if not (token := shelf.next_page_token):
                break
        while True:
            page = await stub.ListKernels(pb.ListKernelsRequest(page_size=_PAGE, page_token=token))
            kernels.extend(page.kernels)
            if not (token := page.next_page_token) or len(kernels) >= self.catalogue.limit:
                break
        # In one go, so that no decision sees half a catalogue.
        self.catalogue.clear()
        for blueprint in blueprints:
            self._put_blueprint(blueprint)
        for kernel in reversed(kernels):
            self._put_kernel(kernel)
        self._changed.set()
        _log.info("library_listed", blueprints=len(blueprints), kernels=len(kernels))

    def _apply(self, change: pb.WatchLibraryResponse) -> None:
        kind = change.WhichOneof("change")
        if kind == "blueprint":
            self._put_blueprint(change.blueprint)
        elif kind == "kernel":
            self._put_kernel(change.kernel)
        self._changed.set()

    def _put_blueprint(self, message: blueprint_pb2.Blueprint) -> None:
        active = message.state == blueprint_pb2.BLUEPRINT_STATE_ACTIVE
        self.catalogue.put_blueprint(blueprint_from_proto(message), active=active)

    def _put_kernel(self, message: kernel_pb2.Kernel) -> None:
        self.catalogue.put_kernel(kernel_from_proto(message), kernel_state_from_proto(message.state))
