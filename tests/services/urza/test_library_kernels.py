"""Conformance of kernels, verdicts and the change log, on SQLite and on PostgreSQL."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from esper.kasmina.kernels.signing import Figure, SigningKey
from esper.mesh.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    Forbidden,
    InvalidInput,
    LimitExceeded,
    NotFound,
)
from esper.mesh.identity import Identity, Role
from esper.urza import log, search
from esper.urza.blueprints import Blueprint, BlueprintState
from esper.urza.builds import BuildState, Tier
from esper.urza.kernels import Kernel, KernelState
from esper.urza.leases import Built, Failed, Request, WorkKind
from esper.urza.search import KernelQuery
from tests.services.urza.urza_world import (
    FORGE,
    JUDGE,
    OPERATOR,
    SIGNATURE,
    TARGET,
    World,
    make_ir,
    open_world,
    refused,
    resigned,
    statement_over,
    tampered,
)


class TestVerdicts:
    """The only way out of STAGED."""

    async def test_a_signed_verdict_validates(self, world: World) -> None:
        """A kernel judged well is VALIDATED, carries the verdict as signed, and the judgement is in its lineage."""
        kernel = await world.validated()
        assert KernelState.VALIDATED == kernel.state
        assert kernel == await world.library.get_kernel(kernel.id)
        assert statement_over(kernel.id) == kernel.statement
        steps = (await world.library.lineage(kernel.id)).transitions
        assert [(None, KernelState.STAGED), (KernelState.STAGED, KernelState.VALIDATED)] == [
            (step.from_state, step.to_state) for step in steps
        ]
        assert ["tezzeret:forge-1", "urabrask:gauntlet-1"] == [step.identity for step in steps]

    async def test_a_bad_verdict_rejects(self, world: World) -> None:
        """A kernel that failed is REJECTED, for good: nothing leads out of it."""
        kernel = await world.judge(await world.staged(), passed=False)
        assert KernelState.REJECTED == kernel.state
        assert "failed contract.shape" in (await world.library.lineage(kernel.id)).transitions[-1].reason
        for state in (KernelState.ARCHIVED, KernelState.QUARANTINED, KernelState.VALIDATED, KernelState.STAGED):
            await refused(Conflict, "UNLAWFUL_TRANSITION", world.library.move_kernel(kernel.id, state, OPERATOR, "try"))

    async def test_nobody_else_validates(self, world: World) -> None:
        """A verdict from anyone but urabrask is refused, however well it is signed, and changes nothing."""
        kernel = await world.staged()
        await world.register()
        lease = await world.lease(WorkKind.EVALUATE)
        outcome = world.judged(statement_over(kernel.id))
        for role in set(Role) - {Role.URABRASK}:
            by = Identity("mallory", role)
            await refused(Forbidden, "NOT_THE_EVALUATOR", world.library.desk.complete(lease.id, outcome, by))
        assert KernelState.STAGED == (await world.library.get_kernel(kernel.id)).state
        validated = await world.library.desk.complete(lease.id, outcome, JUDGE)
        assert KernelState.VALIDATED == validated.state

    async def test_verdicts_that_do_not_count(self, world: World) -> None:
        """Unknown key, revoked key, turned bit, other kernel, other fields, failed check: each is named and refused."""
        kernel = await world.staged()
        lease = await world.lease(WorkKind.EVALUATE)
        good = statement_over(kernel.id)
        unknown = await refused(
            InvalidInput, "VERDICT_INVALID", world.library.desk.complete(lease.id, world.judged(good), JUDGE)
        )
        assert "which is not trusted here" in unknown.public
        await world.register()
        revoked = SigningKey.generate()
        await world.library.register_key(revoked.public.key_id, revoked.public.raw, JUDGE, revoked=True)
        turned = world.judged(good)
        cases = {
            "was revoked": world.judged(good, revoked),
            "does not fit the statement": replace(turned, verdict=tampered(turned.verdict)),
            "it is about kernel sha256:0": world.judged(statement_over("sha256:" + "0" * 64)),
            "say something else": replace(turned, claimed=replace(good, tags=("latency:slow",))),
            "a check failed or none was run": world.judged(replace(good, checks=())),
            "no time zone": resigned(world.judged(good), good.to_bytes().replace(b"+00:00", b""), world.key),
            "found": resigned(world.judged(good), b"no statement", world.key),
            "more than 32 tags": world.judged(replace(good, tags=tuple(map(str, range(33))))),
            "more than 64 checks": world.judged(replace(good, checks=good.checks * 65)),
        }
        for words, outcome in cases.items():
            error = await refused(
                InvalidInput, "VERDICT_INVALID", world.library.desk.complete(lease.id, outcome, JUDGE)
            )
            assert words in error.public
        assert KernelState.STAGED == (await world.library.get_kernel(kernel.id)).state
        await world.library.desk.complete(lease.id, world.judged(good), JUDGE)

    async def test_outcomes_must_be_of_the_kind(self, world: World) -> None:
        """An evaluation does not end with a kernel id."""
        kernel = await world.staged()
        lease = await world.lease(WorkKind.EVALUATE)
        await refused(InvalidInput, "OUTCOME_MISMATCH", world.library.desk.complete(lease.id, Built(kernel.id), JUDGE))

    async def test_an_evaluation_given_up_can_be_asked_for_again(self, world: World) -> None:
        """A kernel whose gauntlet broke down stays STAGED; requesting its build with retry queues it again."""
        kernel = await world.staged()
        lease = await world.lease(WorkKind.EVALUATE)
        result = await world.library.desk.complete(lease.id, Failed("no sandbox", retryable=False), JUDGE)
        assert KernelState.STAGED == result.state
        nothing = Request(kind=WorkKind.EVALUATE, holder="x")
        assert () == await world.library.desk.lease(nothing, JUDGE)
        await world.order(kernel.blueprint_id, retry=True)
        assert kernel.id == (await world.lease(WorkKind.EVALUATE)).subject_id
        await world.order(kernel.blueprint_id, retry=True)  # held by somebody: stays as it is
        assert () == await world.library.desk.lease(nothing, JUDGE)

    async def test_keys(self, world: World) -> None:
        """A key is registered once, under its own name; revoking lasts."""
        key = world.key.public
        first = await world.library.register_key(key.key_id, key.raw, JUDGE, revoked=False)
        world.clock.advance(1)
        assert first == await world.library.register_key(key.key_id, key.raw, JUDGE, revoked=False)
        assert (await world.library.register_key(key.key_id, key.raw, JUDGE, revoked=True)).revoked
        assert (await world.library.register_key(key.key_id, key.raw, JUDGE, revoked=False)).revoked
        other = SigningKey.generate().public
        await refused(
            InvalidInput, "KEY_ID_MISMATCH", world.library.register_key(key.key_id, other.raw, JUDGE, revoked=False)
        )
        await world.library.register_key(other.key_id, other.raw, JUDGE, revoked=False)
        assert [key.key_id, other.key_id] == [one.key_id for one in await world.library.keys()]

    async def test_keys_are_bounded(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """The list of keys is not paged, so it has an end."""
        monkeypatch.setattr("esper.urza.shelf.MAX_KEYS", 1)
        await world.register()
        await world.register()
        other = SigningKey.generate().public
        await refused(
            LimitExceeded, "TOO_MANY_KEYS", world.library.register_key(other.key_id, other.raw, JUDGE, revoked=False)
        )

    async def test_a_name_with_another_key_is_refused(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two keys whose names collide are not mixed up: the first one keeps the name."""
        key, other = world.key.public, SigningKey.generate().public
        await world.library.register_key(key.key_id, key.raw, JUDGE, revoked=False)
        # A collision of 64 bits cannot be had in a test: the check of the name is taken away.
        monkeypatch.setattr("esper.urza.library.check_key", lambda *_: None)
        await refused(
            AlreadyExists, "KEY_DIFFERS", world.library.register_key(key.key_id, other.raw, JUDGE, revoked=False)
        )


class TestKernels:
    """Upload, search, lineage, end of life."""

    async def test_the_same_bundle_again_returns_the_kernel_stored(self, world: World) -> None:
        """An upload may be sent again, even after the judgement."""
        build = await world.order()
        kernel = await world.staged(build, b"bundle")
        validated = await world.judge(kernel)
        assert validated == await world.upload(build, b"bundle")
        assert () == await world.library.desk.lease(Request(kind=WorkKind.EVALUATE, holder="x"), JUDGE)

    async def test_a_bundle_that_is_not_what_the_build_asked_for(self, world: World) -> None:
        """Blueprint, signature, tier, target and birth must be those of the build; each difference is named."""
        build = await world.order(tier=Tier.STANDARD, target=TARGET)
        error = await refused(
            InvalidInput,
            "KERNEL_MISMATCH",
            world.upload(build, signature=replace(SIGNATURE, in_features=3), tier=Tier.PORTABLE, target="elsewhere"),
        )
        for word in ("signature", "tier", "target"):
            assert word in error.public
        await refused(NotFound, "BUILD_NOT_FOUND", world.upload(build, build_id="sha256:" + "0" * 64))
        # The same bytes cannot be the kernel of two different orders.
        other = await world.order(build.blueprint_id, signature=replace(SIGNATURE, in_features=4))
        await world.upload(build, b"bundle")
        await refused(InvalidInput, "KERNEL_MISMATCH", world.upload(other, b"bundle"))

    async def test_a_digest_that_does_not_fit_leaves_nothing(self, world: World) -> None:
        """An upload whose bytes have another digest than announced is not visible, and its bytes are gone."""
        build = await world.order()
        await refused(Corrupt, "DIGEST_MISMATCH", world.upload(build, b"bundle", id="sha256:" + "0" * 64))
        await refused(InvalidInput, "BLOB_MALFORMED", world.upload(build, b"bundle", size_bytes=7))
        assert () == (await world.library.list_kernels(KernelQuery(), limit=10, before=None)).entries

    async def test_end_of_life(self, world: World) -> None:
        """A validated kernel can be archived and quarantined; a quarantined one is no longer served."""
        kernel = await world.validated()
        assert kernel == await world.library.open_kernel(kernel.id)
        await refused(
            Forbidden,
            "ROLE_NOT_ENTITLED",
            world.library.move_kernel(kernel.id, KernelState.ARCHIVED, JUDGE, "not mine to do"),
        )
        archived = await world.library.move_kernel(kernel.id, KernelState.ARCHIVED, OPERATOR, "old")
        assert archived == await world.library.move_kernel(kernel.id, KernelState.ARCHIVED, OPERATOR, "again")
        assert archived == await world.library.open_kernel(kernel.id)
        gone = await world.library.move_kernel(kernel.id, KernelState.QUARANTINED, JUDGE, "diverges")
        assert KernelState.QUARANTINED == gone.state
        await refused(Conflict, "KERNEL_QUARANTINED", world.library.open_kernel(kernel.id))
        lineage = await world.library.lineage(kernel.id)
        assert ("diverges", "old") == (lineage.transitions[-1].reason, lineage.transitions[-2].reason)
        await refused(NotFound, "KERNEL_NOT_FOUND", world.library.open_kernel("sha256:" + "0" * 64))

    async def test_lineage_leads_to_the_ancestors(self, world: World) -> None:
        """The ancestors come nearest first, each once, however their lines meet."""
        root = await world.submit("root")
        left, right = await world.submit("left", [root]), await world.submit("right", [root])
        child = await world.submit("child", [left, right, left])
        build = await world.order(child)
        kernel = await world.staged(build)
        lineage = await world.library.lineage(kernel.id)
        assert [child, left, right, root] == [blueprint.id for blueprint in lineage.blueprints]
        assert (build.id, kernel) == (lineage.build.id, lineage.kernel)
        assert (left, right) == lineage.blueprints[0].parent_ids

    async def test_a_prefix_that_names_two(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """A prefix must name one entry: with two it is refused instead of guessed at."""
        # Equal digits at the front cannot be had on order: the shortest prefix is made shorter.
        monkeypatch.setattr("esper.urza.shelf.MIN_PREFIX", len("sha256:"))
        build = await world.order()
        for number in range(2):
            await world.upload(build, bytes([number]))
        await refused(InvalidInput, "AMBIGUOUS_ID", world.library.get_kernel("sha256:"))

    async def test_found_by_prefix(self, world: World) -> None:
        """Eight digits lead to a kernel; fewer, or ones that nothing has, do not."""
        kernel = await world.staged()
        assert kernel.id == (await world.library.get_kernel(kernel.id[:15])).id
        for wrong in (kernel.id[:14], "sha256:" + "0" * 8, "low_rank"):
            await refused(NotFound, "KERNEL_NOT_FOUND", world.library.get_kernel(wrong))

    @pytest.mark.parametrize("rare", [0, 1000])
    async def test_search(self, world: World, rare: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every condition of a listing chooses what it says, and all of them hold together, however common a tag is."""
        monkeypatch.setattr(search, "RARE", rare)
        blueprint_id = await world.submit(tags=("handmade",))
        wide = replace(SIGNATURE, in_features=64)
        fast = await world.validated(await world.order(blueprint_id))
        build = await world.order(blueprint_id, signature=wide, tier=Tier.STANDARD, target=TARGET)
        lease = await world.lease(WorkKind.COMPILE)
        slow = await world.upload(build, parameters=5000)
        await world.library.desk.complete(lease.id, Built(slow.id), FORGE)
        slow = await world.judge(slow, measurements=(), tags=("latency:slow", "handmade"))
        staged = await world.staged(await world.order(await world.submit("other"), signature=wide))
        expected: dict[KernelQuery, list[Kernel]] = {
            KernelQuery(): [staged, slow, fast],
            KernelQuery(states=frozenset(KernelState)): [staged, slow, fast],
            KernelQuery(states=frozenset({KernelState.VALIDATED})): [slow, fast],
            KernelQuery(states=frozenset({KernelState.VALIDATED, KernelState.STAGED})): [staged, slow, fast],
            KernelQuery(states=frozenset({KernelState.ARCHIVED})): [],
            KernelQuery(signatures=frozenset({wide})): [staged, slow],
            KernelQuery(signatures=frozenset({wide, SIGNATURE})): [staged, slow, fast],
            KernelQuery(signatures=frozenset(replace(SIGNATURE, in_features=n) for n in range(1, 40))): [fast],
            KernelQuery(target=TARGET): [staged, slow, fast],
            KernelQuery(target="cuda/nvidia/sm_90/torch-2.13"): [staged, fast],
            KernelQuery(blueprint_id=blueprint_id): [slow, fast],
            KernelQuery(tier=Tier.STANDARD): [slow],
            KernelQuery(tags=frozenset({"latency:fast"})): [fast],
            KernelQuery(tags=frozenset({"latency:fast", "latency:slow"})): [],
            KernelQuery(tags=frozenset({"handmade"})): [slow, fast],
            KernelQuery(max_parameters=100): [staged, fast],
            KernelQuery(max_latency_us=12.5): [fast],
            KernelQuery(max_latency_us=12.4): [],
            KernelQuery(max_memory_bytes=4096): [fast],
            KernelQuery(max_memory_bytes=4095): [],
            KernelQuery(causal_only=True): [staged, slow, fast] if make_ir().causal else [],
            KernelQuery(states=frozenset({KernelState.VALIDATED}), signatures=frozenset({wide})): [slow],
        }
        for query, kernels in expected.items():
            page = await world.library.list_kernels(query, limit=10, before=None)
            assert [kernel.id for kernel in kernels] == [kernel.id for kernel in page.entries], query
        first = await world.library.list_kernels(KernelQuery(), limit=2, before=None)
        assert first.more
        rest = await world.library.list_kernels(KernelQuery(), limit=2, before=first.entries[-1].sequence)
        assert ([staged.id, slow.id, fast.id], False) == ([k.id for k in (*first.entries, *rest.entries)], rest.more)


class TestChanges:
    """The log of everything."""

    async def test_numbers_have_no_gaps_and_states_are_those_of_their_time(self, world: World) -> None:
        """The log tells each step in order, with its subject as it was then, and nothing of what was rolled back."""
        kernel = await world.validated()
        await refused(NotFound, "BLUEPRINT_NOT_FOUND", world.order("sha256:" + "0" * 64))
        await world.library.archive_blueprint(kernel.blueprint_id, OPERATOR)
        changes = await world.library.store.read(lambda connection: log.changes_after(connection, 0, limit=100))
        assert list(range(1, len(changes) + 1)) == [change.sequence for change in changes]
        told = [(type(change.subject), change.subject.state) for change in changes]
        from esper.urza.builds import Build

        assert [
            (Blueprint, BlueprintState.ACTIVE),
            (Build, BuildState.QUEUED),
            (Build, BuildState.LEASED),
            (Kernel, KernelState.STAGED),
            (Build, BuildState.SUCCEEDED),
            (Kernel, KernelState.VALIDATED),
            (Blueprint, BlueprintState.ARCHIVED),
        ] == told
        staged, validated = changes[3].subject, changes[5].subject
        assert isinstance(staged, Kernel)
        assert isinstance(validated, Kernel)
        assert (None, statement_over(kernel.id)) == (staged.statement, validated.statement)

    async def test_concurrent_writers_leave_no_gap(self, world: World) -> None:
        """Many writers at once: every number from one to the last is there."""
        await asyncio.gather(*(world.submit(f"b{number}") for number in range(25)))
        changes = await world.library.store.read(lambda connection: log.changes_after(connection, 0, limit=100))
        assert list(range(1, 26)) == [change.sequence for change in changes]

    async def test_everything_survives_a_restart(self, database_url: str, tmp_path: Path) -> None:
        """What one server stored, the next one serves: kernels, leases, keys, numbers, identity."""
        async with open_world(database_url, tmp_path) as before:
            kernel = await before.validated()
            builds = await before.orders(2)
            lease = await before.lease(WorkKind.COMPILE)
            head = await before.library.store.read(log.head)
            identity = before.library.store.library_id
        async with open_world(database_url, tmp_path) as after:
            assert identity == after.library.store.library_id
            assert head == await after.library.store.read(log.head)
            assert kernel == await after.library.get_kernel(kernel.id)
            failed = Failed("stopped", retryable=True)
            assert BuildState.QUEUED == (await after.library.desk.complete(lease.id, failed, FORGE)).state
            assert builds[0].id == (await after.lease(WorkKind.COMPILE)).subject_id
            pieces = [piece async for piece in after.library.read_bundle(kernel)]
            assert kernel.size_bytes == sum(map(len, pieces))


def measured(*ratios: float) -> tuple[Figure, ...]:
    """Figures of a gauntlet that found these times over plain torch's, from small inputs to large ones."""
    return tuple(
        figure
        for name, ratio, positions in zip(("small", "nominal", "large"), ratios, (8, 256, 4096), strict=True)
        for figure in (
            Figure(f"latency.{name}.positions", positions, "count"),
            Figure(f"latency.{name}.step.ratio", ratio, "ratio"),
            Figure(f"latency.{name}.forward.ratio", ratio, "ratio"),
        )
    )


class TestFastest:
    """Of the variants of one kernel, the one that was measured to train fastest."""

    async def test_the_fastest_variant_of_each_blueprint_and_signature(self, world: World) -> None:
        """What is slower than plain torch counts as plain torch, and then the portable one is listed."""
        blueprint_id = await world.submit()
        portable = await world.validated(await world.order(blueprint_id))

        async def variant(tier: Tier, *ratios: float) -> Kernel:
            staged = await world.staged(await world.order(blueprint_id, tier=tier, target=TARGET))
            return await world.judge(staged, measurements=measured(*ratios))

        async def fastest(**conditions: object) -> list[str]:
            query = KernelQuery(states=frozenset({KernelState.VALIDATED}), fastest_only=True, **conditions)
            return [kernel.id for kernel in (await world.library.list_kernels(query, limit=10, before=None)).entries]

        assert [portable.id] == await fastest(target=TARGET)
        await variant(Tier.STANDARD, 1.3, 1.0, 1.1)
        assert [portable.id] == await fastest(target=TARGET)
        tuned = await variant(Tier.AGGRESSIVE, 1.2, 0.7, 0.8)
        other = await world.validated(await world.order(blueprint_id, signature=replace(SIGNATURE, out_features=8)))
        assert [other.id, tuned.id] == await fastest(target=TARGET)
        assert [other.id, portable.id] == await fastest(target="cpu/other/default/torch-2.13")
        assert [tuned.id] == await fastest(target=TARGET, blueprint_id=blueprint_id, signatures=frozenset({SIGNATURE}))
        query = KernelQuery(fastest_only=True)
        await refused(InvalidInput, "PAGE_TOKEN_INVALID", world.library.list_kernels(query, limit=1, before=3))
