"""Tags of a kernel from what was measured and what its manifest says; a pure function, torch-free."""

from collections.abc import Iterable, Mapping

from esper.kasmina.kernels.bundle import Manifest

__all__ = ["tags_of"]

LATENCY_BAND = 0.10
"""Ratios to eager within this band are no difference, whatever the measured noise says."""
MEMORY_BAND = 0.05
"""Allocations repeat exactly; the band only keeps a few alignment bytes from being called a difference."""
SIZES = ((1_000, "tiny"), (10_000, "small"), (100_000, "medium"), (1_000_000, "large"))
"""Upper bounds of the number of parameters, exclusive; above the last one a kernel is huge."""


def tags_of(manifest: Manifest, figures: Mapping[str, float]) -> tuple[str, ...]:
    """Sorted tags.

    Args:
        manifest: of the kernel.
        figures: measurements by name; those of latency and memory may be absent when a kernel failed before.
    """
    return tuple(sorted(_tags(manifest, figures)))


def _tags(manifest: Manifest, figures: Mapping[str, float]) -> Iterable[str]:
    yield f"layout:{manifest.signature.layout.value}"
    yield f"tier:{manifest.tier.value}"
    yield f"birth:{manifest.birth.value}"
    yield f"size:{next((name for bound, name in SIZES if manifest.parameter_count < bound), 'huge')}"
    if manifest.causal:
        yield "causal"
    if "latency.step.ratio" in figures:
        # Half the spread of the repeats: a difference that the noise could have made is none.
        band = max(LATENCY_BAND, figures.get("latency.noise", 0.0))
        yield f"latency:{_band(figures['latency.step.ratio'], band, 'faster', 'slower')}"
    if "memory.ratio" in figures:
        yield f"memory:{_band(figures['memory.ratio'], MEMORY_BAND, 'lean', 'heavy')}"


def _band(ratio: float, band: float, below: str, above: str) -> str:
    if ratio < 1 - band:
        return below
    return above if ratio > 1 + band else "par"
