"""Tamiyo as a service of the mesh: its settings, who may call what, and its life."""

from typing import Annotated

import grpc.aio
from pydantic import Field

from esper.mesh.bus import BusPublisher
from esper.mesh.identity import Role
from esper.mesh.service import ANYONE_KNOWN, Service, ServiceContext, allow
from esper.mesh.settings import Section
from esper.tamiyo.catalogue import Catalogue
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.library import LibraryView
from esper.tamiyo.preparation import PreparationRules
from esper.tamiyo.rules import Rules
from esper.tamiyo.servicer import TamiyoServicer
from esper.tamiyo.store import DecisionStore
from esper.v1 import tamiyo_service_pb2_grpc

__all__ = ["SERVICE_NAME", "Config", "Tamiyo", "build"]

SERVICE_NAME = "esper.v1.TamiyoService"
_RUNS = {Role.CLIENT, Role.TOLARIA, Role.OPERATOR}

POLICY = allow(
    SERVICE_NAME,
    {
        "Advise": _RUNS,
        "PrepareRun": _RUNS,
        "GetPolicy": ANYONE_KNOWN,
        "ListDecisions": ANYONE_KNOWN,
    },
)
"""Full method name -> roles."""


class Config(Section):
    """Settings of the controller."""

    rules: Rules = Rules()
    """Numbers of the safety shield and of the heuristic policy."""

    preparation: PreparationRules = PreparationRules()
    """Builds that the controller asks the library for."""

    catalogue_limit: Annotated[int, Field(ge=16, le=1_000_000)] = 20_000
    """Kernels of the library that are kept in view."""

    decision_limit: Annotated[int, Field(ge=1, le=100_000_000)] = 100_000
    """Decisions that are kept for ListDecisions; beyond it the oldest go."""


class Tamiyo(Service):
    """The controller as a service.

    Args:
        config: settings.
        context: what the mesh gives.
    """

    name = "tamiyo"
    grpc_service_names = (SERVICE_NAME,)
    policy = POLICY

    def __init__(self, config: Config, context: ServiceContext) -> None:
        self._context = context
        self._store = DecisionStore(context.data_dir / "decisions.db", config.decision_limit)
        self.view = LibraryView(Catalogue(config.catalogue_limit), lambda: context.channel("urza"), config.preparation)
        self._publisher: BusPublisher | None = None
        self._servicer = TamiyoServicer(
            HeuristicPolicy(),
            config.rules,
            view=self.view,
            store=self._store,
            drain=context.drain,
            clock=context.clock,
            publisher=lambda: self._publisher,
            wait_s=config.preparation.wait_s,
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Add the handlers."""
        tamiyo_service_pb2_grpc.add_TamiyoServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Open the store, begin to watch the library and to publish."""
        await self._store.open()
        self.view.start()
        self._publisher = BusPublisher(self._context.channel("oona"))
        self._publisher.start()

    async def drain(self) -> None:
        """Send the decisions that the bus has not got yet, while it is still there."""
        if self._publisher is not None:
            await self._publisher.flush(1.0)

    async def close(self) -> None:
        """Stop watching, write what waits."""
        await self._servicer.close()
        await self.view.close()
        if self._publisher is not None:
            await self._publisher.close(0.0)
        await self._store.close()


async def build(config: Config, context: ServiceContext) -> Service:
    """Build the controller; it opens its store and connects in `start`."""
    return Tamiyo(config, context)
