"""The root of the configuration: one section per service beside those of the mesh itself.

Read from `esper.toml` in the working directory (or `$ESPER_CONFIG`) and from the environment, `ESPER_<SECTION>__<KEY>`.
"""

from importlib import import_module

from esper.cli.command_settings import CommandSettings
from esper.mesh.service import Service, ServiceContext
from esper.oona.service import Config as OonaConfig
from esper.tamiyo.service import Config as TamiyoConfig
from esper.tezzeret.service import Config as TezzeretConfig
from esper.tolaria.service import Config as TolariaConfig
from esper.urabrask.service import Config as UrabraskConfig
from esper.urza.service import Config as UrzaConfig

__all__ = ["Settings", "build_service"]


class Settings(CommandSettings):
    """Configuration of every process of a mesh."""

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


async def build_service(name: str, settings: Settings, context: ServiceContext) -> Service:
    """Build one service from its own section."""
    build = import_module(f"esper.{name}.service").build
    service: Service = await build(getattr(settings, name), context)
    return service
