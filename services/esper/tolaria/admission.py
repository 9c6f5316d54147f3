"""What is refused before anything starts: requests that can never succeed, or not now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.mesh.errors import Conflict, InvalidInput, LimitExceeded, NotFound
from esper.tolaria.core import Arm
from esper.tolaria.data.files import find_cifar10

if TYPE_CHECKING:
    from esper.tolaria.config import RunConfig
    from esper.tolaria.core import RunSpec
    from esper.tolaria.rundir import RunDir
    from esper.tolaria.store import RunStore

__all__ = ["check_boundary", "check_request", "check_room"]


def check_request(spec: RunSpec, config: RunConfig, store: RunStore) -> None:
    """Refuse a run whose data are missing or whose reference does not fit.

    Raises:
        InvalidInput: OVERRIDE_INVALID, the seed has a place of its own.
        Conflict: DATA_MISSING, REFERENCE_WRONG, REFERENCE_NOT_GROWN.
        NotFound: RUN_NOT_FOUND, for the reference.
    """
    if "seed" in spec.overrides:
        raise InvalidInput(
            f"override 'seed': expected the seed beside the overrides (use --seed), found {spec.overrides['seed']!r} "
            "among them",
            reason="OVERRIDE_INVALID",
            metadata={"path": "seed"},
        )
    if config.data.kind == "cifar10":
        find_cifar10(config.data.dir)
    if (spec.arm is Arm.STATIC) != bool(spec.reference_run_id):
        raise Conflict(
            f"arm {spec.arm.value} with reference_run_id {spec.reference_run_id!r}: a static run needs one, "
            "no other takes one",
            reason="REFERENCE_WRONG",
        )
    if spec.arm is Arm.STATIC:
        reference = store.record(spec.reference_run_id)
        if reference.spec.arm is not Arm.GROWN or reference.spec.recipe != spec.recipe:
            raise Conflict(
                f"run {reference.id}: expected a grown run of recipe {spec.recipe}, "
                f"found a {reference.spec.arm.value} run of {reference.spec.recipe}",
                reason="REFERENCE_NOT_GROWN",
            )


def check_room(waiting: int, most: int) -> None:
    """Refuse a run when as many are waiting as may.

    Raises:
        LimitExceeded: TOO_MANY_RUNS.
    """
    if waiting >= most:
        raise LimitExceeded(
            f"{waiting} runs are waiting already, the most that this service takes: wait for one to end, or stop one",
            reason="TOO_MANY_RUNS",
            retry_after_s=10.0,
            metadata={"waiting": str(waiting)},
        )


def check_boundary(run_dir: RunDir, boundary: int) -> None:
    """Refuse to resume from a checkpoint that is not there.

    Raises:
        NotFound: CHECKPOINT_NOT_FOUND; lists those that are.
    """
    folder = run_dir.checkpoints
    have = sorted({int(path.name[1:].split("-")[0]) for path in folder.glob("b*-s*")}) if folder.is_dir() else []
    if boundary not in have:
        raise NotFound(
            f"run {run_dir.run_id} has no checkpoint of boundary {boundary}: "
            f"expected one of {', '.join(map(str, have)) or 'none'}",
            reason="CHECKPOINT_NOT_FOUND",
            metadata={"boundary": str(boundary)},
        )
