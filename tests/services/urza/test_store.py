"""The seam to the database: migrations, plans, what is said when it fails."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from esper.mesh.errors import Conflict, EsperError, InvalidInput, LimitExceeded, Unavailable
from esper.mesh.service import utc_now
from esper.urza import migrations, queue, records, search, shelf
from esper.urza.builds import BuildState, Tier
from esper.urza.changes import Subject
from esper.urza.clock import from_micros, micros
from esper.urza.kernels import KernelState
from esper.urza.leases import Request, WorkKind
from esper.urza.schema import METADATA, builds, library
from esper.urza.search import KernelQuery
from esper.urza.store import Store, sqlite_url
from tests.services.urza.urza_world import FORGE, SIGNATURE, World


@given(st.datetimes(timezones=st.just(utc_now().tzinfo)))
def test_times_are_exact(moment: Any) -> None:
    """Every microsecond of a moment comes back."""
    assert moment == from_micros(micros(moment))


class TestMigrations:
    """From nothing to the newest revision and back."""

    async def test_up_and_down(self, database_url: str) -> None:
        """Up makes exactly the tables that the code uses, down removes every one of them, and up works again."""
        store = await Store.open(database_url, clock=utc_now)
        try:
            async with store._writer.begin() as connection:
                assert migrations.head() == await connection.run_sync(migrations.current)
                assert [] == await connection.run_sync(_differences)
                await connection.run_sync(migrations.downgrade, "base")
                left = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
                assert ["alembic_version"] == left
            first = store.library_id
        finally:
            await store.close()
        again = await Store.open(database_url, clock=utc_now)
        assert first != again.library_id
        await again.close()

    async def test_servers_that_start_together(self, postgres_url: str) -> None:
        """Two servers that find an empty database migrate it once, and agree on its identity."""
        stores = await asyncio.gather(*(Store.open(postgres_url, clock=utc_now) for _ in range(3)))
        assert 1 == len({store.library_id for store in stores})
        for store in stores:
            await store.close()

    async def test_a_newer_library_is_left_alone(self, database_url: str) -> None:
        """A database that a newer Esper migrated is refused, with both revisions named."""
        store = await Store.open(database_url, clock=utc_now)
        async with store._writer.begin() as connection:
            await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        await store.close()
        with pytest.raises(Conflict, match="found 9999") as caught:
            await Store.open(database_url, clock=utc_now)
        assert "LIBRARY_TOO_NEW" == caught.value.reason


def _differences(connection: sa.Connection) -> list[Any]:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    found: list[Any] = compare_metadata(MigrationContext.configure(connection), METADATA)
    return found


class TestFailures:
    """What callers hear when the database does not do its part."""

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "no url",
            "sqlite+aiosqlite:///:memory:",
            "sqlite+aiosqlite://",
            "mysql://user:hunter2@host/db",
            "sqlite:///x",
        ],
    )
    async def test_urls_that_are_not_taken(self, url: str) -> None:
        """Only a SQLite file and PostgreSQL are taken; the message names both forms and never a password."""
        with pytest.raises(InvalidInput) as caught:
            await Store.open(url, clock=utc_now)
        assert "DATABASE_URL_INVALID" == caught.value.reason
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        "url", ["postgresql+asyncpg://esper@127.0.0.1:1/library", "sqlite+aiosqlite:////proc/nowhere/library.db"]
    )
    async def test_a_database_that_is_not_there(self, url: str) -> None:
        """A server that does not answer and a file that cannot be made are UNAVAILABLE."""
        with pytest.raises(Unavailable) as caught:
            await Store.open(url, clock=utc_now)
        assert "DATABASE_UNAVAILABLE" == caught.value.reason

    async def test_a_transaction_that_fails_leaves_nothing(self, world: World) -> None:
        """An error in the middle of a write undoes all of it, its change numbers included."""

        async def half(tx: Any) -> None:
            await tx.log(Subject.BLUEPRINT, "sha256:0", "active")
            await tx.connection.execute(sa.update(library).values(sequence=99))
            raise Conflict("no")

        with pytest.raises(Conflict):
            await world.library.store.write(half)
        assert 0 == await world.library.store.read(lambda c: _one(c, sa.select(library.c.sequence)))
        assert await world.submit()

    async def test_a_full_disk_is_said(self, small_world: World) -> None:
        """A database that cannot grow is RESOURCE_EXHAUSTED, DISK_FULL, and works again when there is room."""

        async def limit(pages: str) -> None:
            await small_world.library.store.write(
                lambda tx: tx.connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
            )

        await limit("1")
        with pytest.raises(LimitExceeded) as caught:
            await small_world.orders(50)
        assert "DISK_FULL" == caught.value.reason
        await limit("1000000")
        assert await small_world.submit("after")

    async def test_a_locked_file_is_unavailable(self, small_world: World, tmp_path: Path) -> None:
        """When another process holds the file, callers are told to come again."""
        store = small_world.library.store
        await store.write(lambda tx: tx.connection.exec_driver_sql("PRAGMA busy_timeout=10"))
        other = sqlite3.connect(tmp_path / "library.db", isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable) as caught:
                await small_world.submit()
            assert "DATABASE_UNAVAILABLE" == caught.value.reason
        finally:
            other.close()
        assert await small_world.submit()

    async def test_a_server_that_goes_away_is_unavailable(self, postgres_url: str, postgres_server: str) -> None:
        """Connections that PostgreSQL cuts are UNAVAILABLE once, and replaced."""
        import asyncpg

        store = await Store.open(postgres_url, clock=utc_now)
        try:

            async def cut(connection: Any) -> int:
                pid = await _one(connection, sa.select(sa.func.pg_backend_pid()))
                admin = await asyncpg.connect(postgres_server)
                await admin.execute(f"SELECT pg_terminate_backend({pid})")
                await admin.close()
                return int(await _one(connection, sa.select(library.c.sequence)))

            with pytest.raises(Unavailable):
                await store.read(cut)
            assert 0 == await store.read(lambda c: _one(c, sa.select(library.c.sequence)))
        finally:
            await store.close()

    async def test_our_own_mistakes_stay_defects(self, world: World) -> None:
        """A statement that breaks a constraint is no fault of the database: it is not dressed up as UNAVAILABLE."""
        with pytest.raises(sa.exc.IntegrityError):
            await world.library.store.write(
                lambda tx: tx.connection.execute(sa.insert(library).values(id=1, library_id="x", sequence=0))
            )

    async def test_a_caller_that_leaves_does_not_stop_a_write(self, world: World) -> None:
        """A cancelled write is finished, and its connection stays good."""
        begun = asyncio.Event()

        async def slow(tx: Any) -> None:
            begun.set()
            await asyncio.sleep(0.05)
            await tx.log(Subject.BUILD, "sha256:0", "queued")

        writing = asyncio.ensure_future(world.library.store.write(slow))
        await begun.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        head = await world.library.store.write(lambda tx: _one(tx.connection, sa.select(library.c.sequence)))
        assert 1 == head

    async def test_no_two_active_leases_in_the_schema(self, world: World) -> None:
        """Even a statement of ours that went wrong could not lease a piece twice: the database refuses it."""
        await world.order()
        lease = await world.lease(WorkKind.COMPILE)
        copy = sa.text(
            "INSERT INTO leases (id, kind, subject_id, holder, attempt, lease_time_us, expire_time, state, outcome) "
            "SELECT 'other', kind, subject_id, holder, attempt, lease_time_us, expire_time, state, outcome FROM leases"
        )
        with pytest.raises(sa.exc.IntegrityError):
            await world.library.store.write(lambda tx: tx.connection.execute(copy))
        assert world.clock.now < await world.library.desk.renew(lease.id, None, FORGE)


async def _one(connection: Any, statement: Any) -> Any:
    return (await connection.execute(statement)).scalar_one()


class TestPlans:
    """No listing reads a table from end to end."""

    @pytest.fixture
    def plans(self, small_world: World) -> list[tuple[str, str]]:
        """Statement and plan of every SELECT and UPDATE that SQLite runs from now on."""
        seen: list[tuple[str, str]] = []
        store = small_world.library.store

        def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
            if statement.startswith(("SELECT", "UPDATE")):
                asked = connection.connection.cursor()
                asked.execute("EXPLAIN QUERY PLAN " + statement, parameters)
                seen.append((statement, "\n".join(str(row[3]) for row in asked.fetchall())))
                asked.close()

        for engine in (store._reader, store._writer):
            sa.event.listen(engine.sync_engine, "before_cursor_execute", explain)
        return seen

    async def test_every_listing_walks_an_index(self, small_world: World, plans: list[tuple[str, str]]) -> None:
        """Listings, resolution, claims and expiry search by an index or walk one in the order asked for."""
        read = small_world.library.store.read
        three = frozenset({KernelState.STAGED, KernelState.VALIDATED})
        queries = [
            KernelQuery(),
            KernelQuery(states=three),
            KernelQuery(states=three, signatures=frozenset({SIGNATURE})),
            KernelQuery(states=three, tags=frozenset({"latency:fast"}), max_latency_us=3),
            KernelQuery(blueprint_id="sha256:0", tier=Tier.STANDARD, target="x"),
        ]
        for query in queries:
            for before in (None, 10):
                await read(lambda c, q=query, b=before: search.list_kernels(c, q, limit=10, before=b))
        for states in ((), (BuildState.FAILED, BuildState.QUEUED)):
            await read(lambda c, s=states: records.list_builds(c, limit=10, before=5, states=s))
        await read(
            lambda c: records.list_blueprints(
                c, limit=10, before=5, layout=None, tags=("conv",), include_archived=False
            )
        )
        await small_world.order()
        await small_world.lease(WorkKind.COMPILE)
        await read(lambda c: queue.waiting(c, Request(kind=WorkKind.COMPILE, holder="x")))
        await read(queue.next_expiry)
        await small_world.library.desk.expire_due()
        await read(lambda c: shelf.stored_ids(c, ["sha256:0"]))
        await read(lambda c: records.queued_builds_of(c, "sha256:0"))
        assert len(plans) > 20
        one_row = ("SCAN library", "SCAN alembic_version")
        for statement, plan in plans:
            for step in plan.splitlines():
                scans = step.startswith("SCAN") and "INDEX" not in step and not step.startswith(one_row)
                # Walking the primary key newest first, up to the limit, is what a listing without conditions is.
                newest_first = step in {"SCAN kernels", "SCAN builds", "SCAN blueprints"} and "LIMIT" in statement
                merged = step.startswith(("SCAN anon", "SCAN (subquery", "SCAN ("))
                assert not scans or newest_first or merged, f"{step}\n{plan}\n{statement}"

    async def test_a_rare_state_is_found_without_sorting(
        self, small_world: World, plans: list[tuple[str, str]]
    ) -> None:
        """The branch of one state and one signature walks the index that holds exactly those, newest first."""
        query = KernelQuery(states=frozenset({KernelState.VALIDATED}), signatures=frozenset({SIGNATURE}))
        await small_world.library.list_kernels(query, limit=10, before=None)
        (plan,) = [plan for statement, plan in plans if "FROM kernels" in statement]
        assert "ix_kernels_signature_state_sequence (signature=? AND state=?)" in plan


async def test_errors_name_no_secret(tmp_path: Path) -> None:
    """What leaves the store about an unreachable database carries neither its address nor its password."""
    with pytest.raises(EsperError) as caught:
        await Store.open("postgresql+asyncpg://esper:hunter2@127.0.0.1:1/library", clock=utc_now)
    assert "hunter2" not in caught.value.public + str(caught.value.private)
    assert "127.0.0.1" not in caught.value.public


def test_paths_become_urls(tmp_path: Path) -> None:
    """A path with characters that mean something in URLs names the same file."""
    path = tmp_path / "a b%c?d" / "library.db"
    assert str(path) == sa.make_url(sqlite_url(path)).database


def test_tables_have_a_home() -> None:
    """Every table that the code knows is one of the library's own."""
    assert builds in METADATA.sorted_tables
