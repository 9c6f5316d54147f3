"""Saves and restores a session: tensors and JSON types, no pickled code, exact.

Order when a run is resumed: `Growth.load_state_dict` first, since it puts the seeds' modules into the model and their
groups into the optimizer, then the model's, the optimizer's and the schedulers' own ``load_state_dict``.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from esper.kasmina._plane import load_failure
from esper.kasmina._seed import KernelLike, SeedRun, choice_document, choice_from_document
from esper.kasmina._shards import gathered, reshard
from esper.kasmina.breaker import Scope
from esper.kasmina.control import BlendStrategy, Counterfactual, KernelChoice, Stage
from esper.kasmina.layout import SeedLayout
from esper.kasmina.seeds import LIVING, execution
from esper.kasmina.sites import Site, site_document, site_from_document
from esper.mesh.errors import EsperError, InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from esper.kasmina.growth import Growth

    Source = Mapping[str, KernelLike] | Callable[[str], KernelLike | None] | None

__all__ = ["clear", "load", "save"]

FORMAT = 2


def save(growth: Growth) -> dict[str, Any]:
    """The whole session."""
    found: dict[str, Any] = gathered(_save(growth))
    return found


def _save(growth: Growth) -> dict[str, Any]:
    life = growth.life
    return {
        "format": FORMAT,
        "run_id": growth.run_id,
        "step": growth.steps,
        "boundary": growth.boundaries,
        "seconds": growth.seconds,
        "controller_state": growth.controller_state.hex(),
        "counters": dict(growth.counters),
        "losses": [growth.losses.total, growth.losses.count],
        "sites": [site_document(site) for site in life.sites],
        "layout": life.layout.document(),
        "seeds": [_save_seed(growth, run) for run in life.runs.values()],
        "groups": life.groups.document(),
        "watch": life.watch.state_dict(),
        "health": None if growth.observation.sampler is None else growth.observation.sampler.document(),
        "gradient_norm": growth.observation.gradient_norm,
        "records": growth.lineage(),
        "breakers": life.breakers.document(),
    }


def _save_seed(growth: Growth, run: SeedRun) -> dict[str, Any]:
    seed = None if run.attachment is None else run.attachment.seed
    measured = run.counterfactual
    norm = growth.life.groups.gradient_norm(run.index)
    return {
        "seed": run.index,
        "choice": choice_document(run.choice),
        "germinated_boundary": run.germinated_boundary,
        "record": next((i for i, record in enumerate(growth.records) if record is run.record), None),
        "birth_finite": run.birth_finite,
        "birth_gradient": run.birth_gradient,
        "isolation_gain": run.isolation_gain,
        "held_out": run.held_out,
        "losses_before": run.losses_before,
        "failure": run.failure,
        "faults": list(run.faults),
        "counterfactual": None if measured is None else asdict(measured),
        "module": None if seed is None else {name: value.detach().clone() for name, value in seed.state_dict().items()},
        "ratio": None if seed is None else seed.ratio,
        "gradient_norm": norm,
        "blend": None if run.blend is None else run.blend.state_dict(),
        "isolation": None if run.isolation is None else run.isolation.state_dict(),
    }


def load(
    growth: Growth,
    state: Mapping[str, Any],
    kernels: Source,
    locks: Mapping[int, int],
    breakers: Mapping[str, Any],
) -> None:
    """Bring a session to the state of `save`; what it had before is taken out of the model."""
    if state.get("format") != FORMAT:
        raise InvalidInput(f"growth state: expected format {FORMAT}, found {state.get('format')!r}")
    sites = tuple(site_from_document(document) for document in state["sites"])
    _check_sites(growth, sites)
    # Kernels first: when one can not be had, the model has not been touched.
    needed = {
        entry["choice"]["kernel_id"]: sites[entry["seed"]] for entry in state["seeds"] if entry["module"] is not None
    }
    found = {kernel_id: _obtain(growth, kernel_id, site, kernels) for kernel_id, site in needed.items()}
    locked = {**growth.locks(), **locks}
    circuits = growth.life.breakers
    # What failed after the checkpoint was taken has failed all the same.
    circuits.replace(state.get("breakers", {}), circuits.document(), breakers)
    clear(growth)
    growth.run_id, growth.steps, growth.boundaries = state["run_id"], state["step"], state["boundary"]
    growth.elapsed_s = state["seconds"]
    growth.restart_clock(time.monotonic())
    growth.controller_state = bytes.fromhex(state["controller_state"])
    growth.counters.clear()
    growth.counters.update(state["counters"])
    growth.losses.total, growth.losses.count = state["losses"]
    growth.records[:] = state["records"]
    growth.observation.gradient_norm = state["gradient_norm"]
    if not sites:
        growth.observation.look(None)
        return
    life = growth.life
    life.settle(sites, SeedLayout.from_document(state["layout"]))
    for entry in state["seeds"]:
        _load_seed(growth, entry, found)
    _load_groups(growth, state)
    life.watch.load_state_dict(state["watch"])
    growth.observation.begin()
    assert growth.observation.sampler is not None
    if state["health"] is not None:
        growth.observation.sampler.restore(state["health"])
    _lock(growth, {**_distrusted(growth), **locked})
    for run in life.runs.values():
        if life.stage(run.index) is Stage.LOADING:
            growth.plane.request_kernel(run.choice.kernel_id, run.site.descriptor.signature)
    growth.observation.arm(growth.steps)


def _check_sites(growth: Growth, sites: tuple[Site, ...]) -> None:
    names = {name for name, _ in growth.model.named_modules()}
    missing = sorted({n for site in sites for n in (site.source, site.target) if n not in names})
    if missing:
        raise InvalidInput(
            f"growth state: expected the model that it was taken from, found none of its modules {missing[:5]}"
        )


def _obtain(growth: Growth, kernel_id: str, site: Site, source: Source) -> KernelLike:
    found = source(kernel_id) if callable(source) else (source or {}).get(kernel_id)
    if found is not None:
        return found
    why = "it did not come in time"
    deadline = time.monotonic() + growth.config.kernel_timeout_s
    growth.plane.open(growth.hello())
    growth.plane.request_kernel(kernel_id, site.descriptor.signature)
    while growth.plane.plane is not None:
        try:
            kernel = growth.plane.kernel(kernel_id)
        except EsperError as error:
            why = load_failure(error)
            break
        if kernel is not None:
            return kernel  # type: ignore[return-value]  # the plane's contract
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    raise NotFound(
        f"kernel {kernel_id}, in use at {site.descriptor.name}: expected it from the given kernels or the mesh: {why}",
        reason="KERNEL_NOT_FOUND",
        metadata={"kernel_id": kernel_id},
    )


def clear(growth: Growth) -> None:
    life = growth.life
    reshard(growth.model)
    for run in life.runs.values():
        life.take_out(run)
    life.runs.clear()
    growth.observation.reset()


def _load_seed(growth: Growth, entry: Mapping[str, Any], kernels: Mapping[str, KernelLike]) -> None:
    life, measured = growth.life, entry["counterfactual"]
    run = SeedRun(
        life.sites[entry["seed"]],
        choice_from_document(entry["choice"]),
        entry["germinated_boundary"],
        {"stages": [], "decisions": []} if entry["record"] is None else growth.records[entry["record"]],
        birth_finite=entry["birth_finite"],
        birth_gradient=entry["birth_gradient"],
        isolation_gain=entry["isolation_gain"],
        held_out=entry["held_out"],
        losses_before=entry["losses_before"],
        failure=entry["failure"],
        faults=list(entry.get("faults", ())),
        counterfactual=None if measured is None else Counterfactual(**measured),
    )
    life.runs[run.index] = run
    if entry["module"] is None:
        return
    life.take_kernel(run, kernels[run.choice.kernel_id])
    seed = life.build(run)
    seed.load_state_dict(entry["module"])
    seed.ratio = entry["ratio"]
    seed.mode = execution(life.stage(run.index))
    life.attach(run, seed)
    life.layout.note_alpha(run.index, float(seed.alpha))
    if entry["isolation"] is not None:
        run.isolation = life.trainer(seed)
        run.isolation.load_state_dict(entry["isolation"])
    if entry["blend"] is not None:
        seed.measuring = True
        run.blend = life.blend(run)
        run.blend.load_state_dict(entry["blend"])


def _load_groups(growth: Growth, state: Mapping[str, Any]) -> None:
    life = growth.life
    norms = {entry["seed"]: entry["gradient_norm"] for entry in state["seeds"]}
    for document in state["groups"]:
        run = life.runs[document["seed"]]
        life.join(run)
        life.groups.restore(document, norms[run.index])
        if run.blend is not None and run.attachment is not None:
            life.groups.compensate(run.index, run.attachment.seed.alpha)


def _distrusted(growth: Growth) -> dict[int, int]:
    """Living seeds whose kernel failed for good after the checkpoint was taken: they would only fail again."""
    life = growth.life
    failed = [r for r in life.runs.values() if life.breakers.refusal(Scope.KERNEL, r.choice.kernel_id)]
    return {run.index: growth.config.lock_boundaries for run in failed if life.stage(run.index) in LIVING}


def _lock(growth: Growth, locked: Mapping[int, int]) -> None:
    """Locks outlive the checkpoint: a seed that was rolled back since is not DORMANT again by going back."""
    life = growth.life
    for seed, boundaries in locked.items():
        if not 0 <= seed < len(life.layout) or life.stage(seed) in {Stage.ROLLED_BACK, Stage.FOSSILIZED}:
            continue
        if seed not in life.runs:
            # It has no life in this checkpoint; what the controller must see of it is the lock.
            choice = KernelChoice(
                kernel_id="", blueprint_name="", blend=BlendStrategy.IMMEDIATE, blend_steps=1, learning_rate_scale=1.0
            )
            life.runs[seed] = SeedRun(life.sites[seed], choice, 0, {"stages": [], "decisions": []})
        life.runs[seed].failure = "rolled back after the checkpoint to which the run went back"
        life.lock(life.runs[seed], boundaries)
