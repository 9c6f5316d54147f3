"""Libraries for tests: on SQLite, and on a real PostgreSQL 15 where Debian's package is installed."""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from esper.urza.store import sqlite_url
from tests.services.urza.urza_world import World, open_world

_BIN = Path("/usr/lib/postgresql/15/bin")


def _as_user() -> list[str]:
    """Prefix of commands that the server refuses to run for root."""
    if os.getuid() != 0:
        return []
    user = next(name for name in ("postgres", "nobody") if _exists(name))
    return ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups", "--"]


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server in a temporary directory: the URL of its maintenance database, for asyncpg."""
    if not (_BIN / "initdb").exists():
        pytest.skip(f"PostgreSQL 15 is not installed: expected {_BIN}/initdb (Debian package postgresql)")
    pytest.importorskip("asyncpg", reason="asyncpg is not installed: expected the extra esper[postgres]")
    # Not below pytest's own directory: that one is closed to the user that the server runs as.
    directory = Path(tempfile.mkdtemp(prefix="esper-postgres-"))
    prefix = _as_user()
    if prefix:
        user = pwd.getpwnam(prefix[1].removeprefix("--reuid="))
        os.chown(directory, user.pw_uid, user.pw_gid)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    data = directory / "data"
    options = f"-p {port} -h 127.0.0.1 -k {directory} -F -c max_connections=60"

    def run(*command: str) -> None:
        subprocess.run([*prefix, *command], check=True, cwd=directory, capture_output=True, timeout=120)

    run(str(_BIN / "initdb"), "-D", str(data), "-U", "esper", "-A", "trust", "-E", "UTF8", "--no-sync")
    try:
        run(str(_BIN / "pg_ctl"), "-D", str(data), "-l", str(directory / "log"), "-o", options, "-w", "start")
        yield f"postgresql://esper@127.0.0.1:{port}/postgres"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            run(str(_BIN / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
async def postgres_url(postgres_server: str) -> AsyncIterator[str]:
    """An empty database on the server, as an URL for SQLAlchemy."""
    import asyncpg

    name = f"library_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(postgres_server)
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield postgres_server.replace("postgresql://", "postgresql+asyncpg://").replace("/postgres", f"/{name}")
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each edition."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "library.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
async def world(database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """A library on each edition of the database."""
    async with open_world(database_url, tmp_path) as opened:
        yield opened


@pytest.fixture
async def small_world(tmp_path: Path) -> AsyncIterator[World]:
    """A library on SQLite, for what does not depend on the database."""
    async with open_world(sqlite_url(tmp_path / "library.db"), tmp_path) as opened:
        yield opened
