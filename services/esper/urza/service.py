"""Urza as a service of the mesh: its settings, who may call what, and its life."""

from typing import Annotated

import grpc.aio
from pydantic import Field, SecretStr

from esper.mesh.bus import BusPublisher
from esper.mesh.identity import Role
from esper.mesh.logging import get_logger
from esper.mesh.service import ANYONE_KNOWN, Service, ServiceContext, allow
from esper.mesh.settings import Section
from esper.urza.announce import Announcer
from esper.urza.blob_store import LocalBlobStore
from esper.urza.desk import Rules
from esper.urza.library import Library
from esper.urza.servicer import UrzaServicer
from esper.urza.store import Store, sqlite_url
from esper.v1 import urza_service_pb2_grpc

__all__ = ["SERVICE_NAME", "Config", "Urza", "build"]

_log = get_logger(__name__)

SERVICE_NAME = "esper.v1.UrzaService"

_FORGES = {Role.TEZZERET}
_EVALUATORS = {Role.URABRASK}

POLICY = allow(
    SERVICE_NAME,
    {
        "SubmitBlueprint": ANYONE_KNOWN,
        "GetBlueprint": ANYONE_KNOWN,
        "ListBlueprints": ANYONE_KNOWN,
        "ArchiveBlueprint": {Role.OPERATOR},
        "RequestBuilds": ANYONE_KNOWN,
        "GetBuild": ANYONE_KNOWN,
        "ListBuilds": ANYONE_KNOWN,
        "UploadKernel": _FORGES,
        "GetKernel": ANYONE_KNOWN,
        "ListKernels": ANYONE_KNOWN,
        "DownloadKernel": ANYONE_KNOWN,
        "ArchiveKernel": {Role.OPERATOR},
        "QuarantineKernel": {Role.OPERATOR} | _EVALUATORS,
        "GetLineage": ANYONE_KNOWN,
        "WatchLibrary": ANYONE_KNOWN,
        "LeaseWork": _FORGES | _EVALUATORS,
        "RenewLease": _FORGES | _EVALUATORS,
        "CompleteWork": _FORGES | _EVALUATORS,
        "RegisterSigningKey": _EVALUATORS,
        "ListSigningKeys": ANYONE_KNOWN,
    },
)
"""Full method name -> roles. What a role may do with a particular kernel is the library's own law."""


class Config(Section):
    """Settings of the library."""

    database_url: SecretStr | None = None
    """`sqlite+aiosqlite:///FILE` or `postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE`; without it a SQLite file in the
    data directory. A secret, because it may carry a password."""

    database_connections: Annotated[int, Field(ge=1, le=64)] = 4
    """Connections for reading; writers take turns on one more."""

    max_kernel_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 1 << 30
    """Largest bundle that is taken, in bytes; the contract allows 1 GiB."""

    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Leases of one piece of work before it is given up: a build that kills its forge must not kill them for ever."""

    default_lease_s: Annotated[float, Field(ge=1, le=600)] = 30.0
    """Length of the leases of those who do not say, in seconds."""

    lease_memory_s: Annotated[float, Field(ge=60, le=30 * 86400)] = 86400.0
    """How long a lease that is over is remembered, in seconds: so long may its completion be sent again."""

    announce: bool = True
    """Whether changes are announced on the message bus too (topic `library-events`)."""

    watcher_queue: Annotated[int, Field(ge=16, le=65536)] = 4096
    """Changes that a watcher may be behind before its stream ends."""


class Urza(Service):
    """The library as a service.

    Args:
        library: the library itself.
        context: what the mesh gives.
        config: settings.
    """

    name = "urza"
    grpc_service_names = (SERVICE_NAME,)
    policy = POLICY

    def __init__(self, library: Library, context: ServiceContext, config: Config) -> None:
        self.library = library
        self._context = context
        self._announce = config.announce
        self._announcer: Announcer | None = None
        self._servicer = UrzaServicer(library, drain=context.drain, default_lease_s=config.default_lease_s)

    def register(self, server: grpc.aio.Server) -> None:
        """Add the handlers."""
        urza_service_pb2_grpc.add_UrzaServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Clear what a crash left, begin to watch leases and changes."""
        await self.library.start()
        if self._announce:
            try:
                publisher = BusPublisher(self._context.channel("oona"))
            except Exception:  # noqa: BLE001  # whatever keeps the bus away must not keep the library from serving
                _log.warning("changes are not announced: there is no way to the message bus", exc_info=True)
            else:
                self._announcer = Announcer(self.library, publisher)
                self._announcer.start()

    async def close(self) -> None:
        """Stop watching, close the database."""
        if self._announcer is not None:
            await self._announcer.close()
        await self.library.close()


async def build(config: Config, context: ServiceContext) -> Service:
    """Open the library: connect, migrate, find the blobs.

    Raises:
        InvalidInput: DATABASE_URL_INVALID.
        Unavailable: DATABASE_UNAVAILABLE.
        Conflict: LIBRARY_TOO_NEW.
    """
    url = config.database_url
    store = await Store.open(
        sqlite_url(context.data_dir / "library.db") if url is None else url.get_secret_value(),
        clock=context.clock,
        readers=config.database_connections,
    )
    try:
        blobs = LocalBlobStore(context.data_dir / "blobs", max_bytes=config.max_kernel_bytes)
    except OSError:
        await store.close()
        raise
    rules = Rules(
        max_attempts=config.max_attempts, lease_memory_s=config.lease_memory_s, watcher_queue=config.watcher_queue
    )
    return Urza(Library(store, blobs, rules=rules, drain=context.drain), context, config)
