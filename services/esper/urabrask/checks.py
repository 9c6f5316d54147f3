"""What the gauntlet asks, in order, and how much it forgives; torch-free. docs/gauntlet.md says why.

A change of a check or of a threshold is a new `GAUNTLET_VERSION`: verdicts name the version that they passed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "CHECKS",
    "GAUNTLET_VERSION",
    "LATENCY_CEILING",
    "LATENCY_FLOOR_US",
    "LIVING_SHARE",
    "MEMORY_CEILING",
    "MEMORY_FLOOR_BYTES",
    "TOLERANCES",
    "CheckSpec",
    "Tolerance",
]

GAUNTLET_VERSION = "3"


@dataclass(frozen=True, slots=True)
class CheckSpec:
    """One test of the gauntlet."""

    name: str
    """As in verdicts: `area.question`."""
    description: str
    """What it asks, a sentence or two."""


CHECKS: tuple[CheckSpec, ...] = (
    CheckSpec(
        "bundle.integrity",
        "The bytes have the digest that names the kernel; every member is stored, listed and has its listed digest; "
        "the archives of torch among them hold what builds write and nothing else, so that reading them runs nothing.",
    ),
    CheckSpec(
        "bundle.manifest",
        "The manifest says what the library was told: blueprint, signature, tier, target, birth, causality and size.",
    ),
    CheckSpec("bundle.load", "Torch loads the exported graph, the initial parameters and, if any, the compiled code."),
    CheckSpec(
        "contract.shape",
        "Output shape and dtype follow the signature for batches of 1, of primes and beyond the traced size, and for "
        "every tried extent of sequences and images.",
    ),
    CheckSpec(
        "numerics.outputs",
        "At generic parameters the output agrees with an eager float64 reference made from the blueprint.",
    ),
    CheckSpec(
        "numerics.gradients",
        "At generic parameters the gradients of the input and of every parameter agree with the same reference.",
    ),
    CheckSpec(
        "birth.parameters",
        "The initial parameters are, bit by bit, what the blueprint's rules draw from the manifest's seed.",
    ),
    CheckSpec(
        "birth.output",
        "Born at zero: the output is exactly zero for every input, initial parameters and fresh draws alike. Born at "
        "random: it is finite and not zero.",
    ),
    CheckSpec(
        "birth.gradient",
        "Some parameter has a gradient at birth, and after one step of plain gradient descent every parameter has one.",
    ),
    CheckSpec(
        "behaviour.causality",
        "Where causality is claimed of a sequence, later positions influence neither earlier outputs nor gradients.",
    ),
    CheckSpec(
        "behaviour.determinism",
        "Outputs and gradients repeat bit by bit, also after calls with other inputs and sizes.",
    ),
    CheckSpec("behaviour.purity", "Forward and backward leave input, gradient and parameters as they were."),
    CheckSpec(
        "behaviour.extremes",
        "Zeros, tiny and large inputs give outputs and gradients as eager gives them, the largest return at all; NaN "
        "and infinity show in their own sample where eager shows them, and in no other's output or gradient.",
    ),
    CheckSpec("cost.memory", "Peak memory of forward and backward stays within a multiple of eager's."),
    CheckSpec(
        "cost.latency",
        "Forward and backward take no more than a multiple of eager's time, measured interleaved; a compiled kernel "
        "at a small, a nominal and a large input, by which the runtime knows for which inputs to run it.",
    ),
)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest deviation from the float64 reference, as a share of the root mean square of the reference."""

    outputs: float
    gradients: float


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        # float32: correct kernels of the whole catalogue, at widths from 1 to 512, stayed below 4e-6 (outputs) and 4e-5
        # (gradients), while a scale that is 1 % off gives 2e-2. The bounds stand between, nearer to the correct ones.
        "float64": Tolerance(1e-10, 1e-9),
        "float32": Tolerance(1e-4, 5e-4),
        "float16": Tolerance(5e-2, 1e-1),
        "bfloat16": Tolerance(2e-1, 4e-1),
    }
)

LIVING_SHARE = 1e-6
"""A parameter is alive when the root mean square of its gradient is above this share of the largest one's. Rounding
alone leaves about 1e-8 where the true gradient is zero."""

MEMORY_CEILING = 4.0
"""Peak memory, as a multiple of eager's, above which a kernel is refused ..."""
MEMORY_FLOOR_BYTES = 4 << 20
"""... unless it stays below this many bytes: on small shapes ratios are noise of allocation granularity."""

LATENCY_CEILING = 10.0
"""Time, as a multiple of eager's, above which a kernel is refused: growing would hurt more than it could help ..."""
LATENCY_FLOOR_US = 1000.0
"""... unless it takes less than this, where call overhead is all that is measured."""
