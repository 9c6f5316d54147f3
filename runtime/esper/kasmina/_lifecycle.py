"""Carries seeds through their lives: asks the gates, attaches and detaches, gives and takes optimizer groups.

All that touches the host goes through here, so every way out (cull, cancel, rollback) undoes the same things in one
place.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from esper.kasmina import _facts, seeds
from esper.kasmina._compile import forget_graphs
from esper.kasmina._flight import FLIGHT
from esper.kasmina._gradient import HostGradient
from esper.kasmina._shards import mesh_of, reshard, shard
from esper.kasmina._structure import ChangeKind, Structure
from esper.kasmina._watch import GraftWatch
from esper.kasmina.attach import Attachment, SeedModule
from esper.kasmina.blending import Blend, resolve
from esper.kasmina.breaker import Breakers, CircuitState, Scope
from esper.kasmina.control import Outcome, Stage
from esper.kasmina.isolation import IsolationTrainer, birth_check
from esper.kasmina.layout import SeedLayout
from esper.kasmina.mirror import DeviceMirror
from esper.kasmina.newborn import NewbornGroups
from esper.kasmina.seeds import Reason
from esper.mesh.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

    from esper.kasmina._gradient import Gradient
    from esper.kasmina._seed import KernelLike, SeedRun
    from esper.kasmina.attach import Capture
    from esper.kasmina.config import Config
    from esper.kasmina.control import KernelChoice
    from esper.kasmina.sites import Site

__all__ = ["Lifecycle"]

_BIRTH_BATCH = 4


class Lifecycle:
    """The seeds of one host.

    Args:
        model: the host.
        optimizer: the host's.
        config: options.
        on_transition: told (seed, from, to) after every transition.
        on_end: told (run, outcome, reason) when a life ends.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: Config,
        *,
        on_transition: Callable[[SeedRun, Stage, Stage], None],
        on_end: Callable[[SeedRun, Outcome, str], None],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.sites: tuple[Site, ...] = ()
        self.layout = SeedLayout(0)
        self.mirror = DeviceMirror(self.layout)
        self.runs: dict[int, SeedRun] = {}
        """Lives that are not over, in the order in which their modules were attached: hooks run in that order."""
        self.structure = Structure(model)
        self.shared = False
        """True where other ranks train the same: what steers a seed must be what all of them know."""
        self.learners_changed = False
        """True where parameters began or ceased to learn since somebody set this back."""
        self.groups = NewbornGroups(optimizer, clip_norm=config.clip_norm, merge_steps=config.merge_steps)
        self.watch = GraftWatch(model, optimizer, config)
        self.gradient = HostGradient(optimizer)
        first = {
            Scope.CODE: config.breaker_boundaries,
            Scope.KERNEL: config.breaker_boundaries,
            Scope.SITE: config.embargo_boundaries,
        }
        self.breakers = Breakers(first, config.breaker_max_boundaries)
        host = sum(p.numel() for p in model.parameters())
        self.host_parameters = host
        self.budget = host if config.parameter_budget is None else config.parameter_budget
        self._settle_steps = config.settle_steps if _facts.has_statistics(model) else 0
        self._on_transition = on_transition
        self._on_end = on_end

    def settle(self, sites: tuple[Site, ...], layout: SeedLayout | None = None) -> None:
        """Take over the sites that were found."""
        self.sites = sites
        self.layout = layout or SeedLayout(len(sites))
        self.mirror = DeviceMirror(self.layout)

    @property
    def parameters_added(self) -> int:
        """Parameters of living and fossilized seeds."""
        return sum(run.parameters for run in self.runs.values() if run.attachment is not None)

    def _parameters_left(self, run: SeedRun | None) -> int:
        """Budget that others than `run` leave: what is attached, and what loaded kernels are about to bring."""
        others = [other for other in self.runs.values() if other is not run]
        reserved = sum(o.kernel.manifest.parameter_count for o in others if o.kernel is not None and not o.attachment)
        return self.budget - reserved - sum(o.parameters for o in others if o.attachment is not None)

    def stage(self, seed: int) -> Stage:
        """Stage of one seed."""
        return self.layout.stage_of(seed)

    @property
    def blending(self) -> dict[str, SeedModule]:
        """The seed that blends an output last, by the name of the module: hooks run in the order of `runs`."""
        found = {run.site.target: run.attachment.seed for run in self.runs.values() if run.attachment is not None}
        return {name: seed for name, seed in found.items() if seed.mode is seeds.Execution.BLENDED}

    @property
    def fossilized(self) -> frozenset[int]:
        """Seeds that are the host's own."""
        return frozenset(int(seed) for seed in self.layout.at(Stage.FOSSILIZED))

    def _enter(self, run: SeedRun, to: Stage) -> None:
        before = self.stage(run.index)
        self.layout.transition(run.index, to)
        self._on_transition(run, before, to)

    # ---- gates -------------------------------------------------------------------------------------------------------

    def sanity(self, choice: KernelChoice, site: Site) -> list[Reason]:
        """G0 before GERMINATED: what can be known without the kernel."""
        refused = (
            self.groups.unfit(),
            self.breakers.refusal(Scope.KERNEL, choice.kernel_id),
            self.breakers.refusal(Scope.SITE, site.key),
        )
        unfit = tuple(text for text in refused if text)
        facts = seeds.SanityFacts(
            kernel_named=bool(choice.kernel_id),
            # The cache loads none but validated kernels: whether this one is shows when it is here.
            validated=True,
            unfit=unfit,
            parameters_left=self._parameters_left(None),
            kernel_parameters=None,
            living=self.layout.living,
            max_living=self.config.max_active_seeds,
        )
        return seeds.g0_sanity(facts)

    def kernel_unfit(self, run: SeedRun, kernel: KernelLike) -> list[Reason]:
        """The part of G0 that needs the kernel itself."""
        manifest, wanted = kernel.manifest, run.site.descriptor
        unfit = []
        if self.breakers.state(Scope.KERNEL, run.choice.kernel_id) is CircuitState.OPEN:
            unfit.append(self.breakers.refusal(Scope.KERNEL, run.choice.kernel_id))
        if manifest.signature != wanted.signature:
            unfit.append(f"kernel: expected signature {wanted.signature}, found {manifest.signature}")
        if wanted.causal and not manifest.causal:
            unfit.append("kernel: expected a causal one, found one whose positions see later ones")
        facts = seeds.SanityFacts(
            kernel_named=True,
            validated=True,
            unfit=tuple(unfit),
            parameters_left=self._parameters_left(run),
            kernel_parameters=manifest.parameter_count,
            living=self.layout.living - 1,
            max_living=self.config.max_active_seeds,
        )
        return seeds.g0_sanity(facts)

    def gate(self, run: SeedRun, to: Stage) -> list[Reason]:
        """Why `run` may not enter `to` now; empty where it may."""
        if to is Stage.TRAINING:
            pending = [Reason("KERNEL_PENDING", "the kernel is not loaded yet")]
            return pending if run.kernel is None else self.kernel_unfit(run, run.kernel)
        if to is Stage.GRAFTING:
            return seeds.g1_learning(_facts.learning(run, self.config))
        if to is Stage.STABILIZING:
            return seeds.g2_stability(_facts.graft(run, self.config, self._steps(run), self.watch.detector))
        if to is Stage.EVALUATING:
            return seeds.g3_interface(_facts.interface(run, self.groups, self._steps(run), self._settle_steps))
        if to is Stage.FOSSILIZED:
            return seeds.g4_impact(
                _facts.impact(run, self.config, self._steps(run), self.layout.boundaries_of(run.index))
            )
        return []

    def _steps(self, run: SeedRun) -> int:
        return self.layout.steps_of(run.index)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def germinate(self, run: SeedRun) -> None:
        """DORMANT to GERMINATED to LOADING; G0 was asked before."""
        self.runs[run.index] = run
        self.breakers.begin(Scope.KERNEL, run.choice.kernel_id)
        self.breakers.begin(Scope.SITE, run.site.key)
        self._enter(run, Stage.GERMINATED)
        self._enter(run, Stage.LOADING)

    def advance(self, run: SeedRun, to: Stage) -> None:
        """Enter the next stage; its gate was asked before."""
        reshard(self.model)
        {
            Stage.TRAINING: self._train,
            Stage.GRAFTING: self._graft_now,
            Stage.STABILIZING: self._stabilize,
            Stage.FINE_TUNING: self._fine_tune,
            Stage.FOSSILIZED: self._fossilize,
        }.get(to, lambda _run: None)(run)
        self._enter(run, to)
        if run.attachment is not None:
            run.attachment.seed.mode = seeds.execution(to)
        self.mirror.push()
        if run.attachment is not None:
            # After the push, since copies take over the alpha.
            self.structure.tell(ChangeKind.MOVED, run, to, self.structure.parameters(run.index))
        if to is Stage.FOSSILIZED:
            self._on_end(run, Outcome.FOSSILIZED, "")

    def build(self, run: SeedRun) -> SeedModule:
        """Instantiate the kernel for its site: parameters on the device of the site."""
        assert run.kernel is not None
        target = self.model.get_submodule(run.site.target)
        device = next((t.device for t in (*target.parameters(), *self.model.parameters())), torch.device("cpu"))
        delta = run.kernel.instantiate(device)
        manifest = run.kernel.manifest
        run.birth = str(getattr(manifest.birth, "value", manifest.birth))
        run.parameters = sum(p.numel() for p in delta.parameters())
        run.flops = float(manifest.flops_per_position * torch.Size(run.site.extent or (1,)).numel())
        run.shapes = _facts.shapes(delta)
        seed = SeedModule(delta, run.site)
        seed.guard.kernel_id = run.choice.kernel_id
        seed.shared = self.shared
        return seed

    def take_kernel(self, run: SeedRun, kernel: KernelLike) -> None:
        """Give a seed its kernel; compiled code whose circuit is open stays away, and the portable graph runs."""
        run.kernel = kernel
        if self.breakers.state(Scope.CODE, run.choice.kernel_id) is CircuitState.OPEN:
            getattr(kernel, "fall_back", bool)()

    def trip_site(self, run: SeedRun, why: str) -> int:
        """A seed had to be taken out of its site; returns the boundaries for which that is closed."""
        return self.breakers.trip(Scope.SITE, run.site.key, why)

    def _train(self, run: SeedRun) -> None:
        try:
            seed = self._born(run)
        except Exception as error:
            self.breakers.trip(Scope.KERNEL, run.choice.kernel_id, f"{type(error).__name__}: {error!s:.200}")
            raise
        if run.birth != "zero":
            run.isolation = self.trainer(seed)
        self.attach(run, seed)
        # A kernel that came late is attached after those that overtook it: hooks do not run in the order of birth.
        self.runs[run.index] = self.runs.pop(run.index)

    def _born(self, run: SeedRun) -> SeedModule:
        """The module of a seed after its first trial, on noise.

        Raises:
            Exception: it cannot be built or run here, or is not born as it says.
        """
        seed = self.build(run)
        signature, extent = run.site.descriptor.signature, list(run.site.extent)
        shape = [_BIRTH_BATCH, *extent]
        shape.insert(signature.layout.feature_dim, signature.in_features)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
            seed.alpha.device, getattr(torch, signature.dtype)
        )
        run.birth_finite, run.birth_gradient, silent = birth_check(seed.delta, noise)
        fall_back = getattr(run.kernel, "fall_back", None)
        if not run.birth_finite and fall_back is not None and fall_back("first trial: not finite"):
            run.birth_finite, run.birth_gradient, silent = birth_check(seed.delta, noise)
        # Until it is grafted no gradient arrives, and nobody must wait for one.
        seed.delta.requires_grad_(requires_grad=False)
        if run.birth == "zero" and not silent:
            raise Conflict(
                f"kernel {run.choice.kernel_id}: expected zero output at birth, found another", reason="BIRTH"
            )
        return seed

    def attach(self, run: SeedRun, seed: SeedModule) -> None:
        """Put the seed into the host, and its alpha into the mirror."""
        run.attachment = Attachment.attach(self.model, run.site, seed)
        self.mirror.bind(seed)
        self.structure.tell(ChangeKind.ATTACHED, run, self.stage(run.index), self.structure.parameters(run.index))

    def trainer(self, seed: SeedModule) -> IsolationTrainer:
        """The private training of a seed."""
        config = self.config
        return IsolationTrainer(seed.delta, learning_rate=config.isolation_learning_rate, trust=config.isolation_trust)

    def _graft_now(self, run: SeedRun) -> None:
        assert run.attachment is not None
        self.watch.begin(run.index)
        run.losses_before = self.watch.detector.seen
        self.join(run)
        if run.isolation is not None:
            forget_graphs()  # those that tap what isolation wants
        run.isolation = None
        run.attachment.seed.capture = None
        run.attachment.seed.measuring = True
        run.blend = self.blend(run)
        run.blend.start()
        if self.shared:
            run.drift = torch.full_like(run.attachment.seed.alpha, float("nan"))
        self.groups.compensate(run.index, run.attachment.seed.alpha)

    def join(self, run: SeedRun) -> None:
        """Let the newborn learn with the host: gradients, and an optimizer group of its own."""
        run.module.requires_grad_()
        if (mesh := mesh_of(self.model.get_submodule(run.site.target), self.model)) is not None:
            shard(run.module, mesh)
        self.learners_changed = True
        site = self.model.get_submodule(run.site.target).parameters()
        self.groups.add(run.index, list(run.module.named_parameters()), site, run.choice.learning_rate_scale)

    def blend(self, run: SeedRun) -> Blend:
        """The strategy that drives the seed's alpha."""
        assert run.attachment is not None
        strategy = resolve(run.choice.blend, run.birth)
        blend = Blend(
            strategy,
            run.choice.blend_steps,
            run.attachment.seed.alpha,
            write=partial(self.layout.set_alpha, run.index),
        )
        if blend.needs_host_gradient:
            self.gradient.want()
        return blend

    def _stabilize(self, run: SeedRun) -> None:
        assert run.attachment is not None
        self.layout.set_alpha(run.index, 1.0)
        run.attachment.seed.measuring = False
        self.groups.compensate(run.index, None)
        run.blend = None
        self.groups.freeze(run.index, frozen=True)

    def _fine_tune(self, run: SeedRun) -> None:
        self.groups.freeze(run.index, frozen=False)

    def _fossilize(self, run: SeedRun) -> None:
        self.groups.merge(run.index)
        self.watch.fossilized(run.index)

    # ---- ways out ----------------------------------------------------------------------------------------------------

    def cull(self, run: SeedRun, reason: str, embargo: int) -> None:
        """Take the seed out of the host and close its site for `embargo` boundaries."""
        self._enter(run, Stage.CULLED)
        self._remove(run)
        self._enter(run, Stage.EMBARGOED)
        self.layout.close(run.index, embargo)
        self._on_end(run, Outcome.CULLED, reason)

    def cancel(self, run: SeedRun, reason: str) -> None:
        """Drop a seed that never touched the host; it is DORMANT after `release`."""
        self._enter(run, Stage.CANCELLED)
        self._remove(run)
        self._on_end(run, Outcome.CANCELLED, reason)

    def release(self, seed: int) -> list[Reason]:
        """Through RESETTING and G5 to DORMANT; reasons where G5 does not open."""
        run = self.runs[seed]
        if self.stage(seed) is not Stage.RESETTING:
            self._enter(run, Stage.RESETTING)
        return self._to_dormant(run)

    def release_cancelled(self, told: set[int]) -> None:
        """A cancelled seed is DORMANT again once the controller has seen that, and why, it was cancelled."""
        for seed in told:
            if self.stage(seed) is Stage.CANCELLED:
                self.release(seed)

    def unlock(self, seed: int) -> list[Reason]:
        """From ROLLED_BACK through G5 to DORMANT."""
        return self._to_dormant(self.runs[seed])

    def _to_dormant(self, run: SeedRun) -> list[Reason]:
        reasons = seeds.g5_reset(_facts.leftovers(run, self.model, self.groups, self.watch))
        if not reasons:
            self._enter(run, Stage.DORMANT)
            self.layout.close(run.index, 0)
            del self.runs[run.index]
        return reasons

    def roll_back(self, why: str) -> tuple[list[SeedRun], bool]:
        """Take out every newborn whose window is open and restore the host to before the first of them.

        Returns:
            The newborns, and whether the host was restored.
        """
        reshard(self.model)
        blamed, snapshot = [self.runs[seed] for seed in self.watch.seeds], self.watch.snapshot
        for run in blamed:
            run.failure = why
            lock = self.config.lock_boundaries if snapshot is not None else None
            closed = self.breakers.trip(Scope.SITE, run.site.key, why, first=lock)
            if snapshot is not None:
                self._enter(run, Stage.ROLLED_BACK)
                self._remove(run)
                self.layout.close(run.index, closed)
                self._on_end(run, Outcome.ROLLED_BACK, why)
            else:
                self.cull(run, why, closed)
        if snapshot is not None:
            snapshot.restore(self.model, self.optimizer)
        return blamed, snapshot is not None

    def lock(self, run: SeedRun, boundaries: int) -> None:
        """ROLLED_BACK for a seed that was rolled back after the checkpoint to which the run went back."""
        self._remove(run)
        self.layout.transition(run.index, Stage.ROLLED_BACK)
        self.layout.close(run.index, boundaries)

    def take_out(self, run: SeedRun) -> None:
        """Undo all that a seed is to host and optimizer, whatever its stage; fossilized ones too."""
        self.learners_changed = self.learners_changed or run.index in self.groups
        self.groups.remove(run.index)
        if run.attachment is not None:
            gone = self.structure.parameters(run.index)
            run.attachment.detach()
            self.mirror.release(run.index)
            self.structure.tell(ChangeKind.DETACHED, run, self.stage(run.index), gone)
        run.attachment = run.isolation = run.blend = run.kernel = None
        self.watch.forget(run.index)

    def _remove(self, run: SeedRun) -> None:
        self.take_out(run)
        self.layout.note_alpha(run.index, 0.0)

    # ---- clocks ------------------------------------------------------------------------------------------------------

    def tick_boundary(self) -> None:
        """Count a boundary, and see which ramps are complete: the device is in order here."""
        self.layout.tick_boundary()
        for run in self.runs.values():
            if run.blend is not None:
                run.blend.settled = run.blend.complete

    def forget_captures(self) -> None:
        """Drop what isolated seeds saw: with these gradients no optimizer step was done."""
        for run in self.runs.values():
            if run.attachment is not None:
                run.attachment.seed.capture = None

    def step(self, loss: Tensor | float | None, gradient: Gradient | None, overflowed: Tensor | None = None) -> None:
        """After an optimizer step: advance ramps, train in isolation, count the windows after grafts.

        Args:
            loss: of this step, one number.
            gradient: of the host at this step, where it was wanted.
            overflowed: above 0 where a gradient scaler skipped this step on its device after all.
        """
        if self.watch.seeds:
            self.watch.step({r.index for r in self.runs.values() if r.blend is not None and not r.blend.settled})
        for run in self.runs.values():
            if run.attachment is None:
                continue
            seed = run.attachment.seed
            if run.isolation is not None and seed.capture is not None:
                capture, seed.capture = seed.capture, None
                capture.overflowed = overflowed
                if seed.guard.fault is None:
                    self._isolated(run, seed, capture)
            elif run.blend is not None:
                run.blend.step(_facts.signals(run, self.groups, loss, gradient))
                if run.blend.needs_host_gradient:
                    self.gradient.want()
        self.mirror.push()

    @staticmethod
    def _isolated(run: SeedRun, seed: SeedModule, capture: Capture) -> None:
        assert run.isolation is not None
        outer = FLIGHT.enter(seed.guard.kernel_id, "isolation")
        try:
            run.isolation.step(capture)
        except Exception as error:  # noqa: BLE001  # as in the forward: judged after the next step
            seed.guard.failed(error)
        finally:
            FLIGHT.leave(outer)
