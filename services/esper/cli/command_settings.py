"""The part of the configuration that a command needs to reach a mesh.

It imports no service: most commands only ask a mesh something, and should not take a second to begin.
"""

from pathlib import Path

from pydantic import Field, model_validator

from esper.cli.roster import SERVICES
from esper.mesh.settings import AuthSettings, ChannelOptions, LoggingSettings, Section, ServerSettings, check_exposure

__all__ = ["CommandSettings"]


class CommandSettings(Section):
    """Where the mesh is, and how to talk to it."""

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

    @model_validator(mode="after")
    def _consistent(self) -> "CommandSettings":
        check_exposure(self.server, self.auth)
        unknown = sorted(set(self.addresses) - set(SERVICES))
        if unknown:
            raise ValueError(f"addresses names {', '.join(unknown)}: expected only {', '.join(SERVICES)}")
        return self
