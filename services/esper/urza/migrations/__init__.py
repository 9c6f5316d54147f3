"""Alembic migrations of the library, shipped with the package and run when the library starts.

``upgrade(connection)`` brings a database to the newest revision, ``downgrade(connection, revision)`` back. Both work on
a synchronous connection inside the caller's transaction, so that a migration that fails leaves nothing behind.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from esper.mesh.errors import Conflict

__all__ = ["current", "downgrade", "head", "upgrade"]


def _config(connection: Connection | None) -> Config:
    config = Config()
    # No interpolation here, but alembic's parser has one: a percent sign in a path must be doubled.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def head() -> str:
    """The newest revision that this code knows."""
    return ScriptDirectory.from_config(_config(None)).get_current_head() or ""


def current(connection: Connection) -> str:
    """The revision of a database; empty for an empty one."""
    return MigrationContext.configure(connection).get_current_revision() or ""


def upgrade(connection: Connection) -> None:
    """Bring a database to the newest revision.

    Raises:
        Conflict: LIBRARY_TOO_NEW, a newer Esper has been here.
    """
    found = current(connection)
    if found == head():
        return
    known = {script.revision for script in ScriptDirectory.from_config(_config(None)).walk_revisions()}
    if found and found not in known:
        raise Conflict(
            f"library database: expected a revision up to {head()}, found {found}: a newer Esper has migrated it",
            reason="LIBRARY_TOO_NEW",
            metadata={"found": found, "head": head()},
        )
    command.upgrade(_config(connection), "head")


def downgrade(connection: Connection, revision: str) -> None:
    """Bring a database back to an older revision, `base` for none. What the older one has no place for is lost."""
    command.downgrade(_config(connection), revision)
