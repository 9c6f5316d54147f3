"""What the trainer's runtime and the controller tell each other, as plain frozen data without torch or gRPC.

The runtime describes its sites once (`RunHello`), sends one `BoundaryState` after each validation and applies the
`Decision` objects of the `Advice` that answers it. Everything a controller must remember of a run travels in
``Advice.controller_state``: the runtime checkpoints it and hands it back when it opens again, so a controller may be
restarted, moved or replaced between two boundaries. A value that was not measured is ``None``, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.kasmina.signature import Signature

__all__ = [
    "Action",
    "Advice",
    "BlendStrategy",
    "BoundaryState",
    "ControlPlane",
    "Counterfactual",
    "Decision",
    "FieldReport",
    "HealthColumns",
    "KernelChoice",
    "Outcome",
    "RunHello",
    "SeedState",
    "SiteDescriptor",
    "SiteHealth",
    "SiteKind",
    "Stage",
]


class Stage(IntEnum):
    """Where a seed stands in its life; the numbers are those of ``esper.v1.SeedStage``."""

    DORMANT = 1
    GERMINATED = 2
    LOADING = 3
    TRAINING = 4
    GRAFTING = 5
    STABILIZING = 6
    EVALUATING = 7
    FINE_TUNING = 8
    FOSSILIZED = 9
    CULLED = 10
    EMBARGOED = 11
    RESETTING = 12
    CANCELLED = 13
    ROLLED_BACK = 14


class SiteKind(StrEnum):
    """How a seed is attached at a site."""

    SERIES = "series"
    """``y + alpha * delta(y)``"""
    PARALLEL = "parallel"
    """``y + alpha * delta(x)``: a branch around the module, its input pooled to the extent of its output."""


class BlendStrategy(StrEnum):
    """How alpha goes from 0 to 1 during GRAFTING."""

    IMMEDIATE = "immediate"
    """Full alpha at once: for modules whose output is zero at birth."""
    FIXED_RAMP = "fixed_ramp"
    """Linear over a number of optimizer steps."""
    PERFORMANCE = "performance"
    """Advances while the training loss does not rise above its moving band."""
    DRIFT = "drift"
    """Advances while downstream activations drift less than a limit."""
    GRADIENT_NORM = "gradient_norm"
    """Advances while the newborn's gradient norm stays within a band around the host's."""


class Action(StrEnum):
    """What a decision asks the runtime to do at the boundary that it answers."""

    GERMINATE = "germinate"
    """Put a kernel into the dormant seed of a site."""
    ADVANCE = "advance"
    """Move a seed forward to ``to_stage``, through each gate on the way."""
    CULL = "cull"
    """Take a seed out; the site is embargoed for ``embargo_boundaries``."""
    CANCEL = "cancel"
    """Drop a seed that has not touched the host yet (GERMINATED, LOADING, TRAINING)."""
    RELEASE = "release"
    """EMBARGOED to DORMANT, through RESETTING and the reset gate."""
    UNLOCK = "unlock"
    """ROLLED_BACK to DORMANT: an operator released the lock or it expired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDescriptor:
    """A place of the host where a module can grow; constant over a run."""

    index: int
    """Dense index of the site, and of its one seed, in this run."""
    name: str
    """Qualified name of the module, or ``first..last`` for a span of a container."""
    kind: SiteKind
    granularity: str
    """``layer``, ``block`` or ``span``."""
    module_type: str
    """Class name of the module, for people."""
    signature: Signature
    """What a kernel at this site must map from and to."""
    narrowest_width: int
    """Smallest feature width inside the site: a branch around a narrow part can repair it, an adapter cannot."""
    parameters: int
    """Host parameters inside the site."""
    depth: float
    """Position along the forward order, 0 at the input to 1 at the output."""
    causal: bool = False
    """True where positions of a sequence must not see later ones: only causal blueprints may grow there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHello:
    """First words of a run to its controller."""

    run_id: str
    target: str
    """Machine that will run the kernels, as ``str(Target)``."""
    total_steps: int | None
    """Length of the schedule in optimizer steps; None where the loop did not say."""
    decay_start: float | None
    """Fraction of the schedule after which the learning rate decays for the last time; None where unknown."""
    host_parameters: int
    parameter_budget: int
    """Parameters that growth may add over the whole run."""
    max_active_seeds: int
    """Seeds that may be alive (germinated to fine-tuning) at one time."""
    sites: tuple[SiteDescriptor, ...]
    blueprints: tuple[str, ...] = ()
    """Names of the only blueprints allowed; empty means all in the library."""
    task: str = ""
    """Free label of the task, for field reports."""
    controller_state: bytes = b""
    """What the last `Advice` of this run carried; empty for a fresh run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteHealth:
    """Statistics of a site's output on recent data; None where not measured."""

    index: int
    effective_rank: float | None = None
    """exp of the entropy of the normalised eigenvalues of the feature covariance; 1 to the feature width."""
    saturation: float | None = None
    """effective_rank / narrowest_width, 0 to 1: near 1 means that the site's width is used up."""
    dead_fraction: float | None = None
    """Fraction of features that are (almost) constant over the sample."""
    gradient_norm: float | None = None
    """L2 norm of the task loss's gradient at the site's output, per element root mean square."""
    bottleneck: float | None = None
    """Share of the change that the loss asks of the site's output which a linear branch would give and the host's own
    weights there can not, over the squared effective rank of what these read: 0 to 1, larger is narrower. None also
    where no linear branch could add anything: series sites, and branches beside a single layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """The same network with the seed off and on, on the same held-out batches."""

    mean_gain: float
    """Mean over batches of loss(off) - loss(on)."""
    lower_bound: float
    """Lower bound of the mean gain at `confidence`, paired over batches."""
    confidence: float
    batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedState:
    """One seed at a boundary; None where not measured."""

    index: int
    stage: Stage
    boundaries_in_stage: int
    """Boundaries passed since the stage was entered."""
    steps_in_stage: int
    ready: bool
    """True when the gate of the next stage would open now."""
    blocked_by: str = ""
    """Reason of the gate that would not open; empty when ready or when no gate is due."""
    alpha: float = 0.0
    kernel_id: str = ""
    parameters: int = 0
    isolation_gain: float | None = None
    """Relative improvement of the local objective on held-out activations during TRAINING."""
    gradient_norm: float | None = None
    weight_norm: float | None = None
    counterfactual: Counterfactual | None = None
    failure: str = ""
    """Why the runtime itself took the seed out (spike, kernel failure, not finite); empty otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryState:
    """What the controller sees of a run at one boundary."""

    run_id: str
    boundary: int
    """Counts validations from 1; never goes back, except by resuming from a checkpoint."""
    step: int
    """Optimizer steps done."""
    epoch: float | None
    train_loss: float | None
    """Mean training loss since the last boundary; not finite where one of them was not."""
    validation_loss: float | None
    """Not finite where that was measured: the host is not well, and nothing should grow."""
    validation_accuracy: float | None
    learning_rate: float | None
    gradient_norm: float | None
    parameters_added: int
    """Parameters of living and fossilized seeds."""
    flops_per_sample: float | None
    seconds: float
    """Wall time since the run began."""
    seeds: tuple[SeedState, ...]
    """Every seed that is not DORMANT, by index."""
    sites: tuple[SiteHealth, ...]
    """Sites measured since the last boundary, by index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The kernel of a GERMINATE decision and how to bring it in."""

    kernel_id: str
    blueprint_name: str
    blend: BlendStrategy
    blend_steps: int
    """Length of a fixed ramp, and the shortest ramp of the others, in optimizer steps."""
    learning_rate_scale: float
    """Learning rate of the newborn over that of the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One command for one seed, with its reason."""

    decision_id: str
    """Unique within the run; derived from run, boundary and seed, so that a replay gives the same id."""
    boundary: int
    seed: int
    action: Action
    reason: str
    """UPPER_SNAKE code, stable for programs: PLATEAU, PROBATION_PASSED, NO_GAIN, ..."""
    explanation: str
    """One sentence with the numbers that decided."""
    to_stage: Stage | None = None
    """Target of ADVANCE."""
    kernel: KernelChoice | None = None
    """Set for GERMINATE."""
    embargo_boundaries: int = 0
    """For CULL: boundaries for which the site stays closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The controller's answer to one boundary; no decisions is an answer too."""

    boundary: int
    decisions: tuple[Decision, ...]
    explanation: str
    """Why nothing (more) was done, or a summary; one sentence."""
    controller_state: bytes
    """Opaque; checkpoint it and hand it back in `RunHello`."""
    prefetch: tuple[str, ...] = ()
    """Kernel ids that are likely next: fetched into the cache in the background."""


class Outcome(StrEnum):
    """How a seed's life ended, for the field report."""

    FOSSILIZED = "fossilized"
    CULLED = "culled"
    ROLLED_BACK = "rolled_back"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldReport:
    """What became of one kernel at one site in one run: the experience that policies and authors learn from."""

    run_id: str
    task: str
    site: SiteDescriptor
    kernel_id: str
    blueprint_name: str
    outcome: Outcome
    germinated_boundary: int
    ended_boundary: int
    parameters: int
    counterfactual: Counterfactual | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthColumns:
    """Statistics of all living seeds at one step, one entry per seed in every column; NaN means not measured."""

    run_id: str
    step: int
    seed: tuple[int, ...]
    stage: tuple[int, ...]
    alpha: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    weight_norm: tuple[float, ...]
    output_ratio: tuple[float, ...]
    """Root mean square of alpha * delta over that of the host's output."""
    bottleneck: tuple[float, ...]
    """Bottleneck score of the seed's site, as last measured."""


class ControlPlane(Protocol):
    """The runtime's only door to the mesh. No method blocks the training thread, except `advise` up to its deadline.

    Implemented by ``esper.kasmina.link.MeshLink`` over gRPC. A control plane that is away answers None, at once when it
    is known to be away.
    """

    def open(self, hello: RunHello) -> None:
        """Announce the run; connecting happens in the background."""

    def advise(self, state: BoundaryState, deadline_s: float) -> Advice | None:
        """The answer to this boundary, or None when none came within the deadline or the controller is away."""

    def request_kernel(self, kernel_id: str, signature: Signature) -> None:
        """Begin to fetch, verify and load a kernel in the background, and hold it; idempotent."""

    def hold_kernels(self, kernel_ids: Sequence[str]) -> None:
        """Hold these kernels and let go of all others: what living and fossilized seeds use, told at each boundary."""

    def prefetch(self, kernel_ids: Sequence[str]) -> None:
        """Begin to fetch what is likely to be wanted soon; failures are forgotten, `request_kernel` will tell."""

    def under_way(self, kernel_ids: Sequence[str]) -> frozenset[str]:
        """Those of these kernels that are still being fetched.

        One that is neither there nor among them was refused, or not kept for want of room: it will not come by waiting.
        """

    def kernel(self, kernel_id: str) -> object | None:
        """The loaded ``esper.kasmina.kernels.Kernel``, or None while it is not there yet.

        Raises:
            esper.mesh.errors.EsperError: the kernel was refused or could not be fetched; the reasons are in the error.
        """

    def faster_kernel(self, kernel_id: str) -> object | None:
        """A loaded kernel that computes the same as this one, faster on this machine; None where there is none."""

    def publish_health(self, columns: HealthColumns) -> None:
        """Hand telemetry over; dropped and counted when the buffer is full."""

    def report(self, report: FieldReport) -> None:
        """Hand a field report over; kept until delivered or the buffer of reports is full, then an error is logged."""

    def event(self, kind: str, fields: dict[str, object]) -> None:
        """Leave an event of the run (transition, rollback, decision applied) on the bus."""

    def close(self, timeout_s: float) -> None:
        """Deliver what is buffered, at most for `timeout_s`, and let go of the mesh."""


def living(seeds: Sequence[SeedState]) -> int:
    """Number of seeds between GERMINATED and FINE_TUNING."""
    return sum(Stage.GERMINATED <= seed.stage <= Stage.FINE_TUNING for seed in seeds)
