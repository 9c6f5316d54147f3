"""Builds kernels and compares them with their eager reference."""

import torch

from esper.kasmina.kernels import Tier, kernel_id_of, load_candidate
from esper.kasmina.kernels.build import build


def kernel_of(blueprint, signature, tier=Tier.PORTABLE, seed=0):
    """A kernel built and loaded here."""
    bundle = build(blueprint, signature, tier, seed=seed)
    return load_candidate(bundle, kernel_id_of(bundle), signature)


def shapes_of(layout, width):
    """Batches and extents unlike those of the trace, ones included."""
    return {
        "vector": [(1, width), (2, width), (37, width), (64, width)],
        "sequence": [(1, 1, width), (2, 9, width), (9, 2, width), (3, 3, width)],
        "image": [(1, width, 1, 1), (2, width, 5, 3), (3, width, 3, 3), (5, width, 1, 8), (2, width, 16, 21)],
    }[layout.value]


def assert_same_mathematics(module, x, tolerance):
    """Output and every gradient of a module equal those of its eager twin, relative to their size."""
    eager = module.eager()
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(ours), eager(reference)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    module.zero_grad()
    y.backward(grad)
    expected.backward(grad)
    pairs = [("output", y, expected), ("x", ours.grad, reference.grad)]
    pairs += [(n, p.grad, q.grad) for (n, p), q in zip(module.named_parameters(), eager.parameters(), strict=True)]
    for name, found, wanted in pairs:
        scale = wanted.abs().max().clamp_min(0.1)
        assert (found - wanted).abs().max() <= tolerance * scale, (name, tuple(x.shape))
