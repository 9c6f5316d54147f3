"""Options of a growth session: what the loop may cost, how careful the gates are, what growth may spend."""

from __future__ import annotations

from dataclasses import dataclass

from esper.kasmina.control import SiteKind
from esper.mesh.errors import InvalidInput

__all__ = ["Config"]


@dataclass(kw_only=True, slots=True)
class Config:
    """Every option of `esper.kasmina.wrap`; the defaults suit a run of some thousand steps.

    Raises:
        InvalidInput: a number out of its bounds.
    """

    run_id: str = ""
    """Slug of the run; empty makes one."""
    task: str = ""
    """Free label of the task, for field reports."""
    total_steps: int | None = None
    """Length of the schedule in optimizer steps; None where the loop does not know."""
    decay_start: float | None = None
    """Fraction of the schedule after which the learning rate decays for the last time."""
    parameter_budget: int | None = None
    """Parameters that growth may add; None: as many as the host has."""
    max_active_seeds: int = 4
    """Seeds alive at one time, from GERMINATED to FINE_TUNING."""
    blueprints: tuple[str, ...] = ()
    """The only blueprints allowed; empty means all."""
    granularities: tuple[str, ...] = ("layer", "block", "span")
    """Kinds of places that may grow."""
    kinds: tuple[SiteKind, ...] = (SiteKind.SERIES, SiteKind.PARALLEL)
    """Ways of attaching that may be used."""
    max_sites: int = 4096
    """Sites kept at most."""
    causal: bool | None = None
    """True where positions must not see later ones; None finds out by two extra forwards without effect, and takes it
    for true where these can not tell."""
    flops_per_sample: float | None = None
    """FLOPs of the host's forward for one sample, where the loop knows them."""

    advise_deadline_s: float = 0.25
    """Longest wait for the controller at a boundary."""
    sample_every: int = 10
    """Optimizer steps between health samples in the long run, at first they are denser (`HealthSampler.due`); 0 turns
    them off. A compiled model is sampled at boundaries."""
    sites_per_sample: int = 1
    """Output modules measured on one sampled step, in rotation: each costs the training thread up to 0.1 ms."""
    drain_timeout_s: float = 1.0
    """Longest wait at a boundary for statistics that are still being computed."""

    clip_norm: float = 1.0
    """Largest gradient norm of one newborn."""
    merge_steps: int = 200
    """Steps in which a fossilized seed takes over the host's learning rate and weight decay."""
    isolation_learning_rate: float = 1e-3
    """Of the private Adam of TRAINING."""
    isolation_trust: float = 0.1
    """Trust region of TRAINING: wanted change over output."""
    isolation_min_held_out: int = 3
    """Held-out batches that G1 asks for."""
    gradient_limit: float = 1e4
    """Largest gradient norm with which G1 lets a seed pass."""

    watch_steps: int = 200
    """Steps after a graft's ramp is complete until which a loss spike rolls it back."""
    spike_threshold: float = 8.0
    """Modified z-score from which a loss counts as high."""
    spike_patience: int = 3
    """High losses in a row that make a spike."""
    snapshot_max_bytes: int = 2 << 30
    """Memory for snapshots of the host, one for each graft that is watched; where it does not suffice the host is not
    turned back, only the newborn is taken out."""
    min_graft_steps: int = 20
    """Steps that G2 wants to see after a graft."""
    drift_limit: float = 20.0
    """Largest rms(alpha * delta) / rms(y) with which G2 opens. A branch around a narrow part rightly outgrows that part
    several times; an explosion knows no bound."""
    settle_steps: int = 20
    """Steps that G3 gives running statistics of a host that has some; 20 leave 12 % of the old at momentum 0.1."""

    probation_boundaries: int = 2
    """Boundaries of FINE_TUNING before G4 judges: about two epochs."""
    probation_steps: int = 0
    """The same in optimizer steps, for loops that validate more often than once an epoch."""
    confidence: float = 0.95
    """Of the one-sided bound of the counterfactual gain."""
    price_per_million_parameters: float = 0.1
    """Loss that a million parameters must be worth."""
    price_per_gigaflop: float = 0.0
    """Loss that a billion FLOPs per sample must be worth."""
    lock_boundaries: int = 10
    """Boundaries for which a rolled-back seed stays locked."""
    embargo_boundaries: int = 5
    """Boundaries for which a site stays closed that the runtime itself closed."""
    breaker_boundaries: int = 10
    """Boundaries for which the first failure closes a kernel, or its compiled code, out; doubled by each further one.
    For sites it is `embargo_boundaries`."""
    breaker_max_boundaries: int = 640
    """Bound of all these."""
    slow_floor_s: float = 0.02
    """Time of a seed's forward, per step, below which it is never slow. Above, it is where it takes longer than all the
    rest of the step, or ten times as long as it used to."""
    slow_patience: int = 3
    """Slow steps in a row that make a fault."""
    hang_timeout_s: float = 60.0
    """Time from which a call into a kernel counts as hung; 0 never looks."""
    abort_on_hang: bool = False
    """End the process then (exit status 70), for whoever can resume it without the kernel. Off, a hang is reported
    where Python still runs, and the training thread waits for the call."""
    distributed: bool = True
    """Decide together with the other ranks where ``torch.distributed`` is initialised; False: this process grows alone,
    as one of several independent runs."""
    rank_timeout_s: float = 300.0
    """Longest wait for another rank, after which the run ends with an error."""
    kernel_timeout_s: float = 60.0
    """Longest wait for the kernels in use when a checkpoint is loaded."""

    def __post_init__(self) -> None:
        positive: tuple[str, ...] = (
            *("max_active_seeds", "max_sites", "clip_norm", "isolation_learning_rate", "isolation_trust"),
            *("breaker_boundaries", "breaker_max_boundaries", "slow_patience"),
        )
        natural: tuple[str, ...] = (
            *("sample_every", "merge_steps", "watch_steps", "min_graft_steps", "settle_steps", "lock_boundaries"),
            *("slow_floor_s", "hang_timeout_s"),
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise InvalidInput(f"growth option {name}: expected a number above 0, found {getattr(self, name)!r}")
        for name in natural:
            if getattr(self, name) < 0:
                raise InvalidInput(f"growth option {name}: expected at least 0, found {getattr(self, name)!r}")
        if not 0.5 <= self.confidence < 1.0:
            raise InvalidInput(f"growth option confidence: expected 0.5 to below 1, found {self.confidence!r}")
        unknown = set(self.granularities) - {"layer", "block", "span"}
        if unknown:
            raise InvalidInput(f"growth option granularities: expected layer, block, span, found {sorted(unknown)}")
