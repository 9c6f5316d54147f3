"""Conformance of the library on every database: the same tests on SQLite and on PostgreSQL."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    Stale,
    Unavailable,
)
from esper.urza import library, log, queue
from esper.urza.blueprints import BlueprintState
from esper.urza.builds import BuildState, Tier
from esper.urza.changes import Change
from esper.urza.desk import Rules
from esper.urza.leases import Built, Failed, Request, WorkKind
from tests.services.urza.urza_world import (
    ALICE,
    FORGE,
    JUDGE,
    OPERATOR,
    SIGNATURE,
    TARGET,
    World,
    make_ir,
    open_world,
    refused,
)


class TestBlueprints:
    """Submission, names, states."""

    async def test_submitting_again_returns_the_one_stored(self, world: World) -> None:
        """A blueprint is stored once; whoever submits it again gets the first one, author and time included."""
        data = make_ir().canonical_json().encode()
        first, created = await world.library.submit_blueprint(data, (), ALICE)
        world.clock.advance(5)
        again, created_again = await world.library.submit_blueprint(data, (), OPERATOR)
        assert (True, False) == (created, created_again)
        assert first == again
        assert ("client:alice", data, BlueprintState.ACTIVE) == (again.author, again.ir, again.state)

    async def test_another_spelling_is_refused(self, world: World) -> None:
        """Only canonical JSON is taken: a second spelling would be a second id for the same blueprint."""
        data = make_ir().canonical_json().replace(",", ", ", 1).encode()
        await refused(InvalidInput, "BLUEPRINT_MALFORMED", world.library.submit_blueprint(data, (), ALICE))
        await refused(InvalidInput, "BLUEPRINT_MALFORMED", world.library.submit_blueprint(b"{}", (), ALICE))
        unknown = make_ir().canonical_json().replace('"op":"linear"', '"op":"quantum"').encode()
        await refused(InvalidInput, "BLUEPRINT_INVALID", world.library.submit_blueprint(unknown, (), ALICE))

    async def test_found_by_id_prefix_and_name(self, world: World) -> None:
        """An id, a prefix of eight digits, or a name (the newest of it) leads to a blueprint."""
        old = await world.submit("mine", description="An old one.")
        new = await world.submit("mine", description="A new one.")
        assert old == (await world.library.get_blueprint(old)).id
        assert old == (await world.library.get_blueprint(old[:15])).id
        assert new == (await world.library.get_blueprint("mine")).id
        for wrong in ("yours", "sha256:" + "0" * 8, "sha256:1234", "sha256:" + "0" * 64, "sha256:" + "0" * 70):
            await refused(NotFound, "BLUEPRINT_NOT_FOUND", world.library.get_blueprint(wrong))

    async def test_parents_must_be_here(self, world: World) -> None:
        """A lineage that leads nowhere is refused."""
        data = make_ir().canonical_json().encode()
        await refused(
            NotFound, "BLUEPRINT_NOT_FOUND", world.library.submit_blueprint(data, ["sha256:" + "0" * 64], ALICE)
        )
        await refused(NotFound, "BLUEPRINT_NOT_FOUND", world.library.get_blueprint("low_rank"))

    async def test_archived_ones_are_not_built_until_an_operator_submits_them_again(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Archiving hides a blueprint, fails its builds, refuses new ones; an operator undoes it; both are logged."""
        said: list[tuple[str, str]] = []
        note = SimpleNamespace(info=lambda _event, *, by, after, **_rest: said.append((by, after)))
        monkeypatch.setattr(library, "_log", note)
        blueprint_id = await world.submit()
        waiting = await world.order(blueprint_id)
        assert BlueprintState.ARCHIVED == (await world.library.archive_blueprint(blueprint_id, OPERATOR)).state
        assert BlueprintState.ARCHIVED == (await world.library.archive_blueprint(blueprint_id, OPERATOR)).state
        failed = await world.library.get_build(waiting.id)
        assert (BuildState.FAILED, "its blueprint was archived") == (failed.state, failed.error)
        await refused(Conflict, "BLUEPRINT_ARCHIVED", world.order(blueprint_id, target="x", tier=Tier.STANDARD))
        listing = {"limit": 10, "before": None, "layout": None, "tags": ()}
        assert () == (await world.library.list_blueprints(**listing, include_archived=False)).entries
        assert 1 == len((await world.library.list_blueprints(**listing, include_archived=True)).entries)
        data = make_ir().canonical_json().encode()
        for by in (ALICE, FORGE, JUDGE):
            stored, created = await world.library.submit_blueprint(data, (), by)
            assert (BlueprintState.ARCHIVED, False) == (stored.state, created)
            await refused(Forbidden, "ROLE_NOT_ENTITLED", world.library.archive_blueprint(await world.submit("x"), by))
        stored, created = await world.library.submit_blueprint(data, (), OPERATOR)
        assert (BlueprintState.ACTIVE, False) == (stored.state, created)
        assert [("operator:olga", "archived"), ("operator:olga", "active")] == said
        assert BuildState.QUEUED == (await world.order(blueprint_id, retry=True)).state
        await refused(NotFound, "BLUEPRINT_NOT_FOUND", world.library.archive_blueprint("sha256:" + "0" * 64, OPERATOR))

    @pytest.mark.parametrize("end", ["failure", "expiry"])
    async def test_archived_ones_are_not_tried_again(self, world: World, end: str) -> None:
        """A build that was under way when its blueprint was archived is given up when its attempt fails."""
        build = await world.order()
        (lease,) = await world.library.desk.lease(Request(kind=WorkKind.COMPILE, holder="x"), FORGE)
        await world.library.archive_blueprint(build.blueprint_id, OPERATOR)
        if end == "failure":
            await world.library.desk.complete(lease.id, Failed("out of memory", retryable=True), FORGE)
        else:
            world.clock.advance(60.0)
            await world.library.desk.expire_due()
        failed = await world.library.get_build(build.id)
        assert (BuildState.FAILED, 1) == (failed.state, failed.attempts)
        assert failed.error.startswith("its blueprint was archived; before that: ")
        assert () == await world.library.desk.lease(Request(kind=WorkKind.COMPILE, holder="x"), FORGE)

    async def test_listing_by_layout_and_tags_in_pages(self, world: World) -> None:
        """A listing is newest first, without IR, filtered, and pages neither skip nor repeat."""
        ids = [
            await world.submit(f"b{number}", tags=("even" if number % 2 == 0 else "odd", "all")) for number in range(5)
        ]
        only_image = await world.submit("image_only", layouts=(Layout.IMAGE,), causal=False, tags=("all",))

        async def pages(**filters: object) -> list[str]:
            found: list[str] = []
            before = None
            while True:
                arguments = {"layout": None, "tags": (), "include_archived": False} | filters
                page = await world.library.list_blueprints(limit=2, before=before, **arguments)
                assert all(entry.ir == b"" for entry in page.entries)
                found += [entry.id for entry in page.entries]
                if not page.more:
                    return found
                before = page.entries[-1].sequence

        assert [only_image, *reversed(ids)] == await pages()
        assert list(reversed(ids[::2])) == await pages(tags=("even", "all"))
        assert list(reversed(ids)) == await pages(layout=Layout.VECTOR)
        assert [] == await pages(tags=("even", "odd"))


class TestBuilds:
    """Requests for kernels."""

    async def test_asking_twice_asks_once(self, world: World) -> None:
        """The same order is the same build; another signature, tier or target is another."""
        blueprint_id = await world.submit()
        first = await world.order(blueprint_id, priority=3)
        assert first == await world.order(blueprint_id, priority=9)
        assert first == await world.order(blueprint_id, target=TARGET)  # portable: runs anywhere
        others = {
            (await world.order(blueprint_id, signature=replace(SIGNATURE, out_features=8))).id,
            (await world.order(blueprint_id, tier=Tier.STANDARD)).id,
            (await world.order(blueprint_id, tier=Tier.STANDARD, target=TARGET)).id,
        }
        assert 3 == len(others - {first.id})

    async def test_what_cannot_be_asked_for(self, world: World) -> None:
        """An unknown blueprint cannot be built; nothing is left behind."""
        await refused(NotFound, "BLUEPRINT_NOT_FOUND", world.order("sha256:" + "0" * 64))
        await refused(NotFound, "BUILD_NOT_FOUND", world.library.get_build("sha256:" + "0" * 64))
        assert () == (await world.library.list_builds(limit=10, before=None, states=())).entries

    async def test_listing_by_state_in_pages(self, world: World) -> None:
        """Builds are listed newest first, of one, several or all states."""
        builds = await world.orders(5)
        lease = await world.lease(WorkKind.COMPILE)
        assert builds[0].id == lease.subject_id

        async def ids(*states: BuildState, limit: int = 10, before: int | None = None) -> list[str]:
            page = await world.library.list_builds(limit=limit, before=before, states=states)
            return [build.id for build in page.entries]

        newest_first = [build.id for build in reversed(builds)]
        assert newest_first == await ids()
        assert newest_first[:-1] == await ids(BuildState.QUEUED)
        assert [builds[0].id] == await ids(BuildState.LEASED, BuildState.FAILED)
        assert newest_first == await ids(BuildState.LEASED, BuildState.QUEUED)
        assert newest_first[2:4] == await ids(limit=2, before=builds[3].sequence)


class TestWork:
    """Leases from claim to outcome."""

    async def test_a_build_becomes_a_kernel(self, world: World) -> None:
        """Queued, leased, succeeded: the lease carries build and IR, the build names its kernel."""
        build = await world.order()
        lease = await world.lease(WorkKind.COMPILE)
        assert lease.build is not None
        assert lease.blueprint is not None
        assert (build.id, BuildState.LEASED, 1) == (lease.build.id, lease.build.state, lease.build.attempts)
        assert make_ir().canonical_json().encode() == lease.blueprint.ir
        kernel = await world.upload(build)
        done = await world.library.desk.complete(lease.id, Built(kernel.id), FORGE)
        assert done == await world.library.get_build(build.id)
        assert (BuildState.SUCCEEDED, kernel.id) == (done.state, done.kernel_id)
        assert () == await world.library.desk.lease(Request(kind=WorkKind.COMPILE, holder="x"), FORGE)

    async def test_completing_again_changes_nothing(self, world: World) -> None:
        """The same completion may be sent again; another one for the same lease comes too late."""
        build = await world.order()
        lease = await world.lease(WorkKind.COMPILE)
        kernel = await world.upload(build)
        first = await world.library.desk.complete(lease.id, Built(kernel.id), FORGE)
        head = await world.library.store.read(log.head)
        assert first == await world.library.desk.complete(lease.id, Built(kernel.id), FORGE)
        await refused(Stale, "LEASE_LOST", world.library.desk.complete(lease.id, Failed("no", retryable=True), FORGE))
        assert head == await world.library.store.read(log.head)

    async def test_highest_priority_first_then_oldest(self, world: World) -> None:
        """Work is handed out by priority, and within one in the order in which it was asked for."""
        blueprint_id = await world.submit()
        priorities = [0, 5, 0, 9, 5]
        ids = [
            (await world.order(blueprint_id, signature=Signature(Layout.VECTOR, width, 8), priority=priority)).id
            for width, priority in enumerate(priorities, 1)
        ]
        leases = await world.library.desk.lease(Request(kind=WorkKind.COMPILE, holder="x", limit=3), FORGE)
        leases += await world.library.desk.lease(Request(kind=WorkKind.COMPILE, holder="x", limit=3), FORGE)
        assert [ids[index] for index in (3, 1, 4, 0, 2)] == [lease.subject_id for lease in leases]

    async def test_a_forge_gets_what_it_can_build(self, world: World) -> None:
        """Tiers and target of a forge choose among the builds; portable ones and those for any machine always fit."""
        blueprint_id = await world.submit()
        elsewhere = await world.order(blueprint_id, tier=Tier.STANDARD, target="cuda/nvidia/sm_90/torch-2.13")
        anywhere = await world.order(blueprint_id, tier=Tier.STANDARD)
        portable = await world.order(blueprint_id)

        async def take(**more: object) -> list[str]:
            request = Request(kind=WorkKind.COMPILE, holder="x", limit=10, **more)
            return [lease.subject_id for lease in await world.library.desk.lease(request, FORGE)]

        assert [portable.id] == await take(tiers=frozenset({Tier.PORTABLE}))
        assert [anywhere.id] == await take(target=TARGET)
        assert [elsewhere.id] == await take()

    async def test_an_evaluator_gets_what_it_can_run(self, world: World) -> None:
        """Kernels for another machine wait for an evaluator there; portable ones are judged anywhere."""
        blueprint_id = await world.submit()
        portable = await world.upload(await world.order(blueprint_id))
        gpu = "cuda/nvidia/sm_90/torch-2.13"
        there = await world.upload(await world.order(blueprint_id, tier=Tier.STANDARD, target=gpu))
        here = await world.upload(await world.order(blueprint_id, tier=Tier.STANDARD, target=TARGET))

        async def take(target: str) -> list[str]:
            request = Request(kind=WorkKind.EVALUATE, holder="x", limit=10, target=target)
            return [lease.subject_id for lease in await world.library.desk.lease(request, JUDGE)]

        assert [portable.id, here.id] == await take(TARGET)
        assert [there.id] == await take(gpu)

    async def test_only_the_entitled_role_takes_work(self, world: World) -> None:
        """Compiling is for forges, judging for evaluation engines; nobody keeps or ends another role's lease."""
        await world.order()
        for kind, by in ((WorkKind.COMPILE, JUDGE), (WorkKind.EVALUATE, FORGE), (WorkKind.COMPILE, ALICE)):
            await refused(Forbidden, "ROLE_NOT_ENTITLED", world.library.desk.lease(Request(kind=kind, holder="x"), by))
        lease = await world.lease(WorkKind.COMPILE)
        await refused(Forbidden, "ROLE_NOT_ENTITLED", world.library.desk.renew(lease.id, None, JUDGE))
        failed = Failed("x", retryable=True)
        await refused(Forbidden, "ROLE_NOT_ENTITLED", world.library.desk.complete(lease.id, failed, JUDGE))

    async def test_an_expired_lease_goes_to_somebody_else(self, world: World) -> None:
        """A lease that ran out can be neither kept nor completed, and its work is handed out again."""
        build = await world.order()
        lease = await world.lease(WorkKind.COMPILE, lease_time_s=10)
        kernel = await world.upload(build)
        world.clock.advance(10)
        await refused(Stale, "LEASE_LOST", world.library.desk.renew(lease.id, None, FORGE))
        await refused(Stale, "LEASE_LOST", world.library.desk.complete(lease.id, Built(kernel.id), FORGE))
        assert 1 == await world.library.desk.expire_due()
        assert 0 == await world.library.desk.expire_due()
        second = await world.lease(WorkKind.COMPILE)
        assert (build.id, 2) == (second.subject_id, second.attempt)
        await refused(Stale, "LEASE_LOST", world.library.desk.complete(lease.id, Built(kernel.id), FORGE))

    async def test_renewal_keeps_a_lease(self, world: World) -> None:
        """A renewed lease lives on, for as long as before or for as long as asked."""
        await world.order()
        lease = await world.lease(WorkKind.COMPILE, lease_time_s=10)
        world.clock.advance(9)
        until = await world.library.desk.renew(lease.id, None, FORGE)
        assert 10 == (until - world.clock.now).total_seconds()
        until = await world.library.desk.renew(lease.id, 100, FORGE)
        assert 100 == (until - world.clock.now).total_seconds()
        world.clock.advance(99)
        assert 0 == await world.library.desk.expire_due()
        await refused(Stale, "LEASE_LOST", world.library.desk.renew("0" * 32, None, FORGE))

    async def test_poison_is_given_up_with_its_last_words(self, world: World) -> None:
        """A build that kills every forge is FAILED after three attempts with what was said; a retry revives it."""
        build = await world.order()
        lease = await world.lease(WorkKind.COMPILE)
        await world.library.desk.complete(lease.id, Failed("segmentation fault", retryable=True), FORGE)
        assert BuildState.QUEUED == (await world.library.get_build(build.id)).state
        for _ in range(2):
            await world.lease(WorkKind.COMPILE, lease_time_s=1, holder="forge@host/0")
            world.clock.advance(1)
            await world.library.desk.expire_due()
        failed = await world.library.get_build(build.id)
        assert (BuildState.FAILED, 3) == (failed.state, failed.attempts)
        assert "attempt 3 of 3: the lease of forge@host/0 ran out" in failed.error
        assert "segmentation fault" in failed.error
        assert failed == await world.order(build.blueprint_id)
        again = await world.order(build.blueprint_id, retry=True)
        assert (BuildState.QUEUED, 0, "") == (again.state, again.attempts, again.error)
        assert 1 == (await world.lease(WorkKind.COMPILE)).attempt

    async def test_what_cannot_be_built_fails_at_once(self, world: World) -> None:
        """A failure that no other attempt can mend ends the build with the compiler's own words."""
        build = await world.order()
        lease = await world.lease(WorkKind.COMPILE)
        failed = await world.library.desk.complete(lease.id, Failed("no such operation", retryable=False), FORGE)
        assert (BuildState.FAILED, "no such operation") == (failed.state, failed.error)
        assert failed == await world.library.get_build(build.id)

    async def test_a_build_takes_its_own_kernel_only(self, world: World) -> None:
        """Completing a build with an unknown kernel, or one of another order, is refused and the lease stays."""
        builds = await world.orders(2)
        lease = await world.lease(WorkKind.COMPILE)
        assert builds[0].id == lease.subject_id
        other = await world.upload(builds[1])
        complete = world.library.desk.complete
        await refused(NotFound, "KERNEL_NOT_FOUND", complete(lease.id, Built("sha256:" + "0" * 64), FORGE))
        await refused(InvalidInput, "KERNEL_MISMATCH", complete(lease.id, Built(other.id), FORGE))
        await world.library.desk.complete(lease.id, Built((await world.upload(builds[0])).id), FORGE)

    async def test_leases_that_are_long_over_are_forgotten(self, world: World) -> None:
        """A completion may be sent again while the lease is remembered, and no longer."""
        await world.order()
        lease = await world.lease(WorkKind.COMPILE)
        failed = Failed("x", retryable=False)
        await world.library.desk.complete(lease.id, failed, FORGE)
        world.clock.advance(3600)
        assert 0 == await world.library.store.write(lambda tx: queue.forget(tx, older_than_s=3600))
        await world.library.desk.complete(lease.id, failed, FORGE)
        world.clock.advance(1)
        assert 1 == await world.library.store.write(lambda tx: queue.forget(tx, older_than_s=3600))
        await refused(Stale, "LEASE_LOST", world.library.desk.complete(lease.id, failed, FORGE))

    async def test_the_library_ends_leases_by_itself(self, database_url: str, tmp_path: Path) -> None:
        """A lease that runs out ends without anybody asking; with no attempt left its build has failed."""
        rules = Rules(idle_sweep_s=0.02, max_attempts=1)
        async with open_world(database_url, tmp_path, rules=rules) as world:
            build = await world.order()
            await world.lease(WorkKind.COMPILE, lease_time_s=5)
            world.clock.advance(6)
            async with aclosing(world.library.watch(3)) as changes, asyncio.timeout(30):
                change = await anext(changes)
            assert isinstance(change, Change)
            assert (build.id, BuildState.FAILED) == (change.subject.id, change.subject.state)

    async def test_trouble_delays_the_end_of_a_lease_only(
        self, small_world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When the database fails while leases are looked at, they are looked at again."""
        desk = small_world.library.desk
        real, failures = queue.next_expiry, 2

        async def flaky(connection: AsyncConnection) -> float | None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise Unavailable("not now")
            return await real(connection)

        monkeypatch.setattr("esper.urza.desk._RETRY_S", 0.01)
        monkeypatch.setattr(queue, "next_expiry", flaky)
        await small_world.order()
        lease = await small_world.lease(WorkKind.COMPILE, lease_time_s=1)
        small_world.clock.advance(2)
        with pytest.raises(Stale):
            await desk.renew(lease.id, None, FORGE)
        small_world.library.store.signal(frozenset())
        desk._leased.flash()
        async with aclosing(small_world.library.watch(3)) as changes, asyncio.timeout(30):
            change = await anext(changes)
        assert isinstance(change, Change)
        assert BuildState.QUEUED is change.subject.state

    async def test_no_two_lessees_get_the_same_piece(self, world: World) -> None:
        """Many lessees at once: every piece is handed out exactly once, and all of them are."""
        builds = await world.orders(30)
        taken: list[str] = []

        async def forge(name: str) -> None:
            request = Request(kind=WorkKind.COMPILE, holder=name, limit=2)
            while leases := await world.library.desk.lease(request, FORGE):
                taken.extend(lease.subject_id for lease in leases)

        await asyncio.gather(*(forge(f"forge-{number}") for number in range(12)))
        assert sorted(build.id for build in builds) == sorted(taken)
