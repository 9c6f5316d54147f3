"""Learns where a model can grow from a forward that happens anyway, and samples its health on some later ones.

A compiled training forward shows its hooks nothing, and is never made to: it would be compiled again, or compute other
bits than the model alone. There one validation is run without the compiler, at the first boundary, to learn the sites
and the inputs of its first forward; that forward is repeated at each boundary for the health of the sites. Gradients at
sites are not measured then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.kasmina._causal import is_causal
from esper.kasmina._compile import compiler_loaded, eagerly, is_compiled
from esper.kasmina._probe import Call, ForwardWatch, Recorder
from esper.kasmina._quiet import evaluating
from esper.kasmina.distributed import ALONE
from esper.kasmina.health import HealthSampler, HostCopy, Worker
from esper.kasmina.signature import Layout
from esper.kasmina.sites import Discovery, Selection, discover, observe
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle

    from esper.kasmina._gradient import Gradient
    from esper.kasmina._lifecycle import Lifecycle
    from esper.kasmina.config import Config
    from esper.kasmina.control import SiteDescriptor
    from esper.kasmina.distributed import Ranks
    from esper.kasmina.sites import Refusal

__all__ = ["Observation"]

_log = get_logger("esper.kasmina.growth")
_MAX_MISSES = 3
_PER_BOUNDARY = 64


class Observation:
    """The hooks that only look.

    Args:
        life: the seeds of the host; it is given the sites that are found.
        config: options.
        select: keeps a site when true.
        ready: called when the sites are known.
        ranks: all grow where the leading one finds that they can.
    """

    def __init__(
        self,
        life: Lifecycle,
        config: Config,
        select: Callable[[SiteDescriptor], bool] | None,
        ready: Callable[[], None],
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self.worker = Worker()
        self.sampler: HealthSampler | None = None
        self.refusals: tuple[Refusal, ...] = ()
        self.gradient_norm: float | None = None
        """L2 norm of the host's gradient at a recent sampled step."""
        self.compiled = is_compiled(life.model)
        """True where training forwards are compiled; what can not be known is seen at the first step."""
        self._life = life
        self._model = life.model
        self._config = config
        self._select = select
        self._ready = ready
        self._seen: tuple[Recorder, tuple[Any, ...], Mapping[str, Any]] | None = None
        self._watch: ForwardWatch | None = None
        self._inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        """Of a validation's first forward, where training forwards are compiled."""
        self._due = False
        """True where the step that is under way is a sampled one of a compiled model."""
        self._misses = 0

    def look(self, example_inputs: tuple[Any, ...] | None) -> None:
        """Learn the sites from example inputs now, or from the next forward with gradients."""
        if example_inputs is None:
            # Hooks on a forward that is about to be compiled would be compiled in.
            self._watch = None if self.compiled else self._discovering(graded=True)
            return
        with eagerly():
            calls = observe(self._model, example_inputs)
        self._settle(calls, example_inputs, {})

    def _discovering(self, *, graded: bool) -> ForwardWatch:
        recorder = Recorder(self._model)

        def enter(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[RemovableHandle]:
            self._seen = (recorder, args, kwargs)
            return recorder.install()

        def leave(output: object) -> None:
            if output is None:
                self._seen = None
                recorder.calls.clear()

        return ForwardWatch(self._model, enter, leave, graded=graded)

    def look_at_validation(self, validate: Callable[[], object]) -> None:
        """Where training forwards are compiled: learn sites and health from held-out data.

        Args:
            validate: runs it; called once in a run, afterwards one forward is enough.
        """
        if not self.compiled or not (self._config.sample_every or self.sampler is None):
            return
        if self._inputs is None:
            watch = self._discovering(graded=False)
            try:
                with eagerly():
                    validate()
            finally:
                watch.disarm()
            if self._seen is None:
                return
            self._inputs = self._seen[1:]
            if self.sampler is None:
                self.settle()
            self._seen = None
        args, kwargs = self._inputs
        if self.sampler is not None and self._config.sample_every:
            with eagerly(), evaluating(self._model):
                handles = self.sampler.install(count=_PER_BOUNDARY, graded=False)
                try:
                    self._model(*args, **kwargs)
                finally:
                    for handle in handles:
                        handle.remove()
            self.sampler.collect()

    @property
    def pending(self) -> bool:
        """True where the forward that was waited for has happened, and the sites are not found yet."""
        return self._seen is not None

    def settle(self) -> None:
        """Find the sites, where `pending`."""
        if self._seen is not None:
            (recorder, args, kwargs), self._seen = self._seen, None
            self._watch = None
            self._settle(recorder.calls, args, kwargs)

    def _settle(self, calls: Mapping[str, Call], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        config = self._config

        def keep(site: SiteDescriptor) -> bool:
            allowed = site.granularity in config.granularities and site.kind in config.kinds
            return allowed and (self._select is None or self._select(site))

        def find(*, causal: bool) -> Discovery:
            return discover(self._model, calls, select=keep, causal=causal, max_sites=config.max_sites)

        def find_out() -> Discovery:
            found = find(causal=bool(config.causal))
            sequences = any(site.y.layout is Layout.SEQUENCE for site in found.sites)
            if config.causal is None and sequences:
                with eagerly():
                    causal = is_causal(self._model, args, kwargs)
                if causal is None:
                    _log.warning("sequences are taken to be causal: an experiment could not tell; say it with causal=")
                if causal is not False:
                    found = find(causal=True)
            return found

        found = self._ranks.together(find_out)[0]
        self.refusals = found.refusals
        if isinstance(self._select, Selection):
            self._select.check(found.refusals)
        self._life.settle(found.sites)
        self.begin()

    def begin(self) -> None:
        """The sites are known."""
        life, config = self._life, self._config
        self.sampler = HealthSampler(
            self._model, life.sites, self.worker, config.sites_per_sample, life.layout.statistics
        )
        self._ready()

    def arm(self, step: int) -> None:
        """Have the next forward sampled when it is its turn."""
        every = self._config.sample_every
        if self._watch is not None and self._watch.armed and compiler_loaded():
            # A step was made, and the forward before it did not run its hooks.
            self._watch.disarm()
            self._watch, self.compiled = None, True
            _log.info("the model is compiled: sites and health are learnt from validations")
        if self._watch is not None and self.sampler is not None and self.sampler.wants_gradient:
            # Its forward may come at any step; the gradient is wanted on that one.
            self._life.gradient.want()
        if not every or (self.sampler is None and not self.compiled) or self._misses >= _MAX_MISSES:
            return
        if self._watch is not None:
            self._miss(step % every == 0)
        elif self.compiled:
            if step % every == 0:
                self._due = True
                self._life.gradient.want()
        elif self.sampler is not None and self.sampler.due(step, every):
            self._sample(self.sampler)

    def _miss(self, count: int) -> None:
        # A model that is called around its forward never shows its hooks one.
        self._misses += count
        if self._misses == _MAX_MISSES:
            self.reset()
            _log.warning("health samples end: the model's forward does not run its hooks")

    def _sample(self, sampler: HealthSampler) -> None:
        for run in self._life.runs.values():
            if run.attachment is not None:
                run.attachment.seed.measuring = True
        self._watch = ForwardWatch(
            self._model, lambda _args, _kwargs: sampler.install(self._life.blending), lambda _output: None
        )
        if sampler.wants_gradient:
            self._life.gradient.want()

    def collect(self, gradient: Gradient | None) -> bool:
        """After a step: hand what its forward gave to the worker; False where it was not a sampled one.

        Args:
            gradient: the host's at this step, where it is known.
        """
        if self._due:
            self._due = False
        elif self.sampler is None or self._watch is None or self._watch.armed:
            return False
        else:
            self._watch = None
            self._misses = 0
            self.sampler.collect()
        if gradient is not None:
            norm = HostCopy([gradient.norm])

            def read() -> None:
                self.gradient_norm = float(norm.wait()[0])

            self.worker.submit(read)
        return True

    def reset(self) -> None:
        """Remove every observing hook."""
        if self._watch is not None:
            self._watch.disarm()
            self._watch = None
        self._due, self._inputs = False, None
        self._life.gradient.take()
        self._seen = None
