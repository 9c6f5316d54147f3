"""The root of the configuration: one section per service beside those of the mesh itself.

Read from `esper.toml` in the working directory (or `$ESPER_CONFIG`) and from the environment, `ESPER_<SECTION>__<KEY>`.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from pydantic import Field, model_validator

from esper.mesh.service import Service, ServiceContext
from esper.mesh.settings import (
    AuthSettings,
    ChannelOptions,
    Loaded,
    LoggingSettings,
    Section,
    ServerSettings,
    check_exposure,
    load,
    locate,
)
from esper.oona.service import Config as OonaConfig
from esper.tamiyo.service import Config as TamiyoConfig
from esper.tezzeret.service import Config as TezzeretConfig
from esper.tolaria.service import Config as TolariaConfig
from esper.urabrask.service import Config as UrabraskConfig
from esper.urza.service import Config as UrzaConfig

__all__ = ["SERVICES", "Settings", "build_service", "load_settings"]

SERVICES = ("oona", "urza", "tezzeret", "urabrask", "tamiyo", "tolaria")
"""Every service, in the order in which they start: what others lean on comes first."""


class Settings(Section):
    """Configuration of every process of a mesh."""

    home: Path = Path(".esper")
    """Directory of everything that a mesh keeps on this machine: logs, library, runs, keys."""

    mesh: str = ""
    """Address of a running mesh, `host:port`, for commands and clients; empty to use the one that runs on `home`,
    or to start one there for as long as the command lasts."""

    addresses: dict[str, str] = Field(default_factory=dict)
    """Service name -> `host:port`, for services that run on their own; one that is not named here is looked for in the
    same process, then at `mesh`."""

    server: ServerSettings = ServerSettings()
    """Where the mesh listens."""

    auth: AuthSettings = AuthSettings()
    """Identity of callers."""

    channel: ChannelOptions = ChannelOptions()
    """How services and commands connect."""

    logging: LoggingSettings = LoggingSettings()
    """Log records."""

    oona: OonaConfig = OonaConfig()
    """Message bus."""

    urza: UrzaConfig = UrzaConfig()
    """Library of blueprints and kernels."""

    tezzeret: TezzeretConfig = TezzeretConfig()
    """Compilation forge."""

    urabrask: UrabraskConfig = UrabraskConfig()
    """Evaluation engine."""

    tamiyo: TamiyoConfig = TamiyoConfig()
    """Strategic controller."""

    tolaria: TolariaConfig = TolariaConfig()
    """Training orchestrator."""

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        check_exposure(self.server, self.auth)
        unknown = sorted(set(self.addresses) - set(SERVICES))
        if unknown:
            raise ValueError(f"addresses names {', '.join(unknown)}: expected only {', '.join(SERVICES)}")
        return self


async def build_service(name: str, settings: Settings, context: ServiceContext) -> Service:
    """Build one service from its own section."""
    build = import_module(f"esper.{name}.service").build
    service: Service = await build(getattr(settings, name), context)
    return service


def load_settings(
    *, environ: Mapping[str, str] | None = None, directory: Path | None = None, file: Path | None = None
) -> Loaded[Settings]:
    """Read the configuration of this process.

    Args:
        environ: the environment; the process's own by default.
        directory: where `esper.toml` is looked for; the working directory by default.
        file: a file named on the command line, before all others.

    Raises:
        esper.mesh.settings.ConfigError: with every fault at once.
    """
    environ = os.environ if environ is None else environ
    return load(Settings, file=file or locate(environ, directory or Path.cwd()), environ=environ)
