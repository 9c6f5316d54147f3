"""Builds the network of a run by its arm."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from esper.mesh.errors import Conflict, NotFound
from esper.tolaria.attach import Attached, from_bundle
from esper.tolaria.core import Arm
from esper.tolaria.growing import HostNetwork, Network, StaticNetwork
from esper.tolaria.optim import total_steps
from esper.tolaria.rundir import RunDir, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

    from esper.kasmina.cache import Fetched
    from esper.kasmina.control import ControlPlane
    from esper.tolaria.config import RunConfig
    from esper.tolaria.core import RunSpec
    from esper.tolaria.data.base import Dataset
    from esper.tolaria.worker import Launch

__all__ = ["build", "read_modules", "write_modules"]

FOLDER = "modules"


def build(
    config: RunConfig,
    spec: RunSpec,
    run_dir: RunDir,
    launch: Launch,
    dataset: Dataset,
    connect: Callable[[Launch], ControlPlane | None],
) -> Network:
    """A new network at step 0.

    Raises:
        Conflict: REFERENCE_NOT_READY, for a static run.
    """
    if spec.arm is Arm.HOST:
        return HostNetwork(config)
    if spec.arm is Arm.STATIC:
        return StaticNetwork(config, read_modules(RunDir(run_dir.path.parent / spec.reference_run_id)))
    # Late: the other arms need nothing of the growth runtime's link to the mesh.
    from esper.tolaria.seeded import SeededNetwork

    return SeededNetwork(
        config,
        run_id=run_dir.run_id,
        launch=launch,
        plane=connect(launch),
        sample=dataset.train_batch(0, 0)[0],
        total_steps=total_steps(config.schedule, dataset.steps_per_epoch),
        folder=run_dir.path,
    )


def write_modules(
    run_dir: RunDir, grown: Sequence[tuple[Attached, nn.Module]], bundle: Callable[[str], Fetched | None]
) -> None:
    """Keep what a static twin needs: sites and kernels of the modules that stayed.

    Raises:
        NotFound: KERNEL_NOT_FOUND, the bundle of one of them is not at hand any more.
    """
    folder = run_dir.path / FOLDER
    folder.mkdir(exist_ok=True)
    for attached, _ in grown:
        fetched = bundle(attached.kernel_id)
        if fetched is None:
            raise NotFound(
                f"kernel {attached.kernel_id} at {attached.site.descriptor.name}: expected its bundle in the "
                "kernel cache, "
                "found none",
                reason="KERNEL_NOT_FOUND",
                metadata={"kernel_id": attached.kernel_id},
            )
        write_atomic(folder / _file(attached.kernel_id), fetched.bundle)
    write_json(folder / "modules.json", [attached.document() for attached, _ in grown])


def read_modules(reference: RunDir) -> list[tuple[Attached, nn.Module]]:
    """The modules of a finished run at birth, blended in full: what was on its ramp there has none to finish here.

    Raises:
        Conflict: REFERENCE_NOT_READY, the run has not finished, or is no grown run.
    """
    folder: Path = reference.path / FOLDER
    try:
        documents = read_json(folder / "modules.json")
    except FileNotFoundError as error:
        raise Conflict(
            f"run {reference.run_id} has no grown modules to refer to: expected a grown run that succeeded",
            reason="REFERENCE_NOT_READY",
            metadata={"run_id": reference.run_id},
        ) from error
    found = [replace(Attached.from_document(document), alpha=1.0) for document in documents]
    return [(a, from_bundle(a.kernel_id, (folder / _file(a.kernel_id)).read_bytes())) for a in found]


def _file(kernel_id: str) -> str:
    return kernel_id.removeprefix("sha256:") + ".kernel"
