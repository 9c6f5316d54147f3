"""The library itself: what each request means, on top of a store and a blob store. Knows neither gRPC nor protobuf.

Every method that changes something is one transaction. Whoever calls is passed as an `Identity`; the law about it
stands in `blueprints.LAWFUL`, `kernels.LAWFUL`, `verdicts.prove` and `leases.HOLDERS`.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy.ext.asyncio import AsyncConnection

from esper.kasmina.signature import Layout
from esper.mesh.context import spawn
from esper.mesh.errors import Conflict
from esper.mesh.identity import Identity
from esper.mesh.logging import get_logger
from esper.urza import notify, queue, records, shelf
from esper.urza.blob_store import BlobStore
from esper.urza.blueprints import LAWFUL, Blueprint, BlueprintState, read_ir
from esper.urza.builds import Build, BuildOrder, BuildState
from esper.urza.changes import Change
from esper.urza.desk import Desk, Rules
from esper.urza.feed import Feed
from esper.urza.kernels import Kernel, KernelOffer, KernelState, Transition, check_offer, signed_name
from esper.urza.law import entitled_to
from esper.urza.leases import WorkKind
from esper.urza.paging import Page
from esper.urza.search import KernelQuery, list_kernels
from esper.urza.store import CHANGES, Store, Transaction
from esper.urza.upload import Upload
from esper.urza.verdicts import RegisteredKey, check_key

__all__ = ["Library", "Lineage"]

_log = get_logger(__name__)
_ACTIVE = BlueprintState.ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a kernel comes from."""

    kernel: Kernel
    """The kernel with its verdict."""

    build: Build
    """The build that asked for it."""

    blueprints: tuple[Blueprint, ...]
    """Its blueprint, then that one's ancestors, nearest first."""

    transitions: tuple[Transition, ...]
    """Every change of its state, oldest first."""


class Library:
    """Blueprints, builds, kernels, leases and the change log of one store.

    Args:
        store: open and migrated.
        blobs: bundles of the kernels.
        rules: attempts, memory, queues.
        drain: ends waiting, watching and the background tasks.
    """

    def __init__(
        self, store: Store, blobs: BlobStore, *, rules: Rules | None = None, drain: asyncio.Event | None = None
    ) -> None:
        self.store = store
        self.blobs = blobs
        self.rules = Rules() if rules is None else rules
        self._drain = asyncio.Event() if drain is None else drain
        self._feed = Feed(store, drain=self._drain, queue_size=self.rules.watcher_queue)
        self.desk = Desk(store, self.rules, drain=self._drain)
        self._tasks: list[asyncio.Task[None]] = []
        store.listen(self._on_commit)

    async def start(self) -> None:
        """Clear what a crash left behind, then begin to watch leases and changes."""
        # An embedded library is this process's own; a shared one may have uploads running on another server.
        swept = await self.blobs.sweep(self._stored_ids, older_than_s=0.0 if self.store.embedded else 3600.0)
        if swept:
            _log.info("leftovers of interrupted uploads removed", files=swept)
        await self._feed.start()
        self._tasks.append(spawn(self.desk.keep(), name="urza-leases"))
        if not self.store.embedded:
            topics = frozenset({CHANGES, *(kind.value for kind in WorkKind)})
            listening = notify.listen(self.store.url, self.store.signal, topics, self._drain)
            self._tasks.append(spawn(listening, name="urza-notifications"))

    async def close(self) -> None:
        """Stop the background tasks and close the store."""
        self._drain.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._feed.close()
        await self.store.close()

    # Blueprints

    async def submit_blueprint(self, data: bytes, parent_ids: Sequence[str], by: Identity) -> tuple[Blueprint, bool]:
        """Store a blueprint; return it, and whether it is new.

        An archived one becomes active again when an operator submits it; to others it is returned as it is: what an
        operator took out of use does not come back because somebody has a copy of it.

        Raises:
            InvalidInput: BLUEPRINT_MALFORMED, BLUEPRINT_INVALID.
            NotFound: BLUEPRINT_NOT_FOUND, a parent is not here.
            Forbidden: ROLE_NOT_ENTITLED.
        """
        # 256 KiB of JSON take milliseconds to read: not on the event loop.
        ir = await asyncio.to_thread(read_ir, data)
        parents = list(dict.fromkeys(parent_ids))

        async def submit(tx: Transaction) -> tuple[Blueprint, Blueprint | None]:
            known = (await records.blueprint_rows(tx.connection, [ir.id])).get(ir.id)
            if known is None:
                for parent in parents:
                    await records.get_blueprint(tx.connection, parent)
                await records.insert_blueprint(tx, ir, data, parents, by)
            elif known.state is BlueprintState.ARCHIVED and by.role in entitled_to(LAWFUL, known.state, _ACTIVE):
                await records.set_blueprint_state(tx, known, _ACTIVE, by)
            return await records.get_blueprint(tx.connection, ir.id, with_ir=True), known

        blueprint, known = await self.store.write(submit)
        if known is not None:
            _tell(known, blueprint, by)
        return blueprint, known is None

    async def get_blueprint(self, text: str) -> Blueprint:
        """One blueprint with its IR, by id, prefix or name; errors as `records.resolve_blueprint`."""
        return await self.store.read(lambda connection: records.resolve_blueprint(connection, text))

    async def list_blueprints(
        self, *, limit: int, before: int | None, layout: Layout | None, tags: Collection[str], include_archived: bool
    ) -> Page[Blueprint]:
        """Blueprints without their IR, newest first."""
        listing = partial(
            records.list_blueprints,
            limit=limit,
            before=before,
            layout=layout,
            tags=tags,
            include_archived=include_archived,
        )
        return await self.store.read(listing)

    async def archive_blueprint(self, blueprint_id: str, by: Identity) -> Blueprint:
        """Take a blueprint out of use; builds of it that nobody has begun fail, others when their attempt does.

        Raises:
            NotFound: BLUEPRINT_NOT_FOUND.
            Forbidden: ROLE_NOT_ENTITLED.
        """

        async def archive(tx: Transaction) -> tuple[Blueprint, Blueprint]:
            before = await records.get_blueprint(tx.connection, blueprint_id)
            if before.state is not BlueprintState.ARCHIVED:
                await records.set_blueprint_state(tx, before, BlueprintState.ARCHIVED, by)
                for build in await records.queued_builds_of(tx.connection, blueprint_id):
                    await queue.withdraw(tx, build.id)
            return before, await records.get_blueprint(tx.connection, blueprint_id, with_ir=True)

        before, after = await self.store.write(archive)
        _tell(before, after, by)
        return after

    # Builds

    async def request_builds(self, orders: Sequence[BuildOrder], *, retry: bool) -> tuple[Build, ...]:
        """Ask for kernels; what exists is returned as it is. With `retry` what was given up is queued afresh:
        failed builds, and evaluations of a staged kernel that ended without a verdict.

        Raises:
            NotFound: BLUEPRINT_NOT_FOUND.
            Conflict: BLUEPRINT_ARCHIVED.
        """  # noqa: D205  # one sentence of two lines

        async def request(tx: Transaction) -> tuple[Build, ...]:
            for order in orders:
                await self._request(tx, order, retry=retry)
            found = await records.build_rows(tx.connection, {order.id for order in orders})
            return tuple(found[order.id] for order in orders)

        return await self.store.write(request)

    async def _request(self, tx: Transaction, order: BuildOrder, *, retry: bool) -> None:
        blueprint = await records.get_blueprint(tx.connection, order.blueprint_id)
        if blueprint.state is BlueprintState.ARCHIVED:
            raise Conflict(
                f"blueprint {blueprint.id}: expected an active one to build, found it archived",
                reason="BLUEPRINT_ARCHIVED",
                metadata={"blueprint_id": blueprint.id},
            )
        build = (await records.build_rows(tx.connection, [order.id])).get(order.id)
        if build is None:
            position = await records.insert_build(tx, order)
            stored = await records.get_build(tx.connection, order.id)
            await queue.enqueue(
                tx,
                WorkKind.COMPILE,
                order.id,
                position=position,
                priority=order.priority,
                tier=order.tier,
                target=stored.target,
            )
        elif retry and build.state is BuildState.FAILED:
            await queue.requeue(tx, WorkKind.COMPILE, build.id)
        elif retry and build.kernel_id:
            await queue.requeue(tx, WorkKind.EVALUATE, build.kernel_id)

    async def get_build(self, build_id: str) -> Build:
        """One build; NotFound (BUILD_NOT_FOUND)."""
        return await self.store.read(lambda connection: records.get_build(connection, build_id))

    async def list_builds(self, *, limit: int, before: int | None, states: Collection[BuildState]) -> Page[Build]:
        """Builds, newest first."""
        return await self.store.read(partial(records.list_builds, limit=limit, before=before, states=states))

    # Kernels

    async def begin_upload(self, offer: KernelOffer) -> Upload:
        """Begin to take a bundle in.

        Raises:
            NotFound: BUILD_NOT_FOUND.
            InvalidInput: KERNEL_MISMATCH.
            LimitExceeded: BLOB_TOO_LARGE, DISK_FULL.
        """

        async def check(connection: AsyncConnection) -> None:
            build = await records.get_build(connection, offer.build_id)
            check_offer(offer, build, await records.get_blueprint(connection, build.blueprint_id))

        await self.store.read(check)
        return await Upload.begin(offer, self.blobs)

    async def finish_upload(self, upload: Upload, by: Identity) -> tuple[Kernel, bool]:
        """Make an upload visible whose bytes have arrived and are right; return the kernel, and whether it is new.

        Raises:
            InvalidInput: KERNEL_MISMATCH, the same bytes are stored as another kernel.
            Forbidden: ROLE_NOT_ENTITLED.
        """
        kernel_id, size_bytes = await upload.commit()
        offer = upload.offer

        async def stage(tx: Transaction) -> tuple[Kernel, bool]:
            build = await records.get_build(tx.connection, offer.build_id)
            blueprint = await records.get_blueprint(tx.connection, build.blueprint_id)
            known = (await shelf.kernel_rows(tx.connection, [kernel_id])).get(kernel_id)
            if known is not None:
                check_offer(known, build, blueprint)
                return known, False
            position = await shelf.stage(tx, kernel_id, size_bytes, offer, blueprint, by)
            await queue.enqueue(
                tx,
                WorkKind.EVALUATE,
                kernel_id,
                position=position,
                priority=build.priority,
                tier=offer.tier,
                target=offer.target,
            )
            return await shelf.get_kernel(tx.connection, kernel_id), True

        return await self.store.write(stage)

    async def get_kernel(self, text: str) -> Kernel:
        """One kernel with its verdict, by id or prefix; errors as `shelf.resolve_kernel`."""
        return await self.store.read(lambda connection: shelf.resolve_kernel(connection, text))

    async def list_kernels(self, query: KernelQuery, *, limit: int, before: int | None) -> Page[Kernel]:
        """Kernels that meet every condition, newest first."""
        return await self.store.read(partial(list_kernels, query=query, limit=limit, before=before))

    async def open_kernel(self, kernel_id: str) -> Kernel:
        """A kernel whose bundle may be served.

        Raises:
            NotFound: KERNEL_NOT_FOUND.
            Conflict: KERNEL_QUARANTINED.
        """
        kernel = await self.store.read(lambda connection: shelf.get_kernel(connection, kernel_id))
        if kernel.state is KernelState.QUARANTINED:
            raise Conflict(
                f"kernel {kernel_id} was found harmful and is no longer served",
                reason="KERNEL_QUARANTINED",
                metadata={"kernel_id": kernel_id},
            )
        return kernel

    def read_bundle(self, kernel: Kernel) -> AsyncGenerator[bytes, None]:
        """The bundle in pieces of at most 1 MiB; Corrupt (BLOB_CORRUPT) when it is no longer what was stored."""
        return self.blobs.read(kernel.id, size_bytes=kernel.size_bytes)

    async def move_kernel(self, kernel_id: str, state: KernelState, by: Identity, reason: str) -> Kernel:
        """Archive or quarantine a kernel; errors as `shelf.transition`."""
        return await self.store.write(lambda tx: shelf.transition(tx, kernel_id, state, by, reason))

    async def lineage(self, kernel_id: str) -> Lineage:
        """Where a kernel comes from; NotFound (KERNEL_NOT_FOUND)."""

        async def trace(connection: AsyncConnection) -> Lineage:
            kernel = await shelf.get_kernel(connection, kernel_id)
            return Lineage(
                kernel=kernel,
                build=await records.get_build(connection, kernel.build_id),
                blueprints=await records.ancestors(connection, kernel.blueprint_id),
                transitions=await shelf.transitions_of(connection, kernel_id),
            )

        return await self.store.read(trace)

    # Changes

    def watch(self, after: int | None) -> AsyncGenerator[int | Change, None]:
        """See `Feed.watch`."""
        return self._feed.watch(after)

    # Keys

    async def register_key(self, key_id: str, public_key: bytes, by: Identity, *, revoked: bool) -> RegisteredKey:
        """Make a public key known; with `revoked`, take it out of trust for good.

        Raises:
            InvalidInput: KEY_ID_MISMATCH.
            AlreadyExists: KEY_DIFFERS.
        """
        check_key(key_id, public_key)

        async def register(tx: Transaction) -> RegisteredKey:
            await shelf.register_key(tx, key_id, public_key, by, revoked=revoked)
            return next(key for key in await shelf.keys(tx.connection) if key.key_id == key_id)

        return await self.store.write(register)

    async def keys(self) -> tuple[RegisteredKey, ...]:
        """Every registered key, oldest first."""
        return await self.store.read(shelf.keys)

    # Background

    def _on_commit(self, topics: frozenset[str]) -> None:
        if CHANGES in topics:
            self._feed.wake()
        self.desk.wake(topics)

    async def _stored_ids(self, ids: Collection[str]) -> set[str]:
        return await self.store.read(lambda connection: shelf.stored_ids(connection, ids))


def _tell(before: Blueprint, after: Blueprint, by: Identity) -> None:
    """Say in the log who took a blueprint out of use or brought it back."""
    if before.state is not after.state:
        _log.info("blueprint moved", blueprint_id=after.id, name=after.name, before=before.state.value,
                  after=after.state.value, by=signed_name(by))  # fmt: skip
