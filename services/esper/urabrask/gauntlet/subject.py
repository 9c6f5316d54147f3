"""A kernel under examination: inputs to try it with, parameters, and the eager reference beside it.

Every check draws from generators of its own with fixed seeds, so a verdict can be repeated.

Shapes: vector (N, C), sequence (N, T, C), image (N, C, H, W); `extents` are all but C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.blueprints.module import BlueprintModule, initial_parameters, torch_dtype
from esper.kasmina.blueprints.plan import Plan
from esper.kasmina.kernels.kernel import Kernel, KernelModule
from esper.kasmina.kernels.pace import nominal_extents
from esper.kasmina.signature import Layout, Signature

__all__ = ["Refuted", "Subject", "deviation", "finite", "rms", "same_bits"]

# Batch of 1, primes, and beyond the size at which kernels are traced; extents of 1 and unequal ones.
_EXTENTS: Mapping[Layout, tuple[tuple[int, ...], ...]] = {
    Layout.VECTOR: ((1,), (2,), (3,), (7,), (37,), (64,)),
    Layout.SEQUENCE: ((1, 1), (1, 8), (2, 5), (3, 1), (7, 13), (64, 3)),
    Layout.IMAGE: ((1, 1, 1), (1, 4, 4), (2, 5, 3), (3, 1, 7), (7, 6, 6), (41, 2, 2)),
}
_GENERIC: Mapping[Layout, tuple[int, ...]] = {Layout.VECTOR: (5,), Layout.SEQUENCE: (3, 7), Layout.IMAGE: (3, 5, 6)}


class Refuted(Exception):
    """A check did not hold; the text is what was expected and what was found."""


@dataclass(frozen=True)
class Subject:
    """A loaded candidate."""

    kernel: Kernel
    """What is judged: compiled code where there is any, else the exported graph."""
    plan: Plan
    running: Kernel
    """What the runtime would run: compiled code where there is any, else the blueprint in plain torch."""

    @property
    def signature(self) -> Signature:
        """What it maps from and to."""
        return self.kernel.signature

    @property
    def dtype(self) -> torch.dtype:
        """Of input, output and parameters."""
        return torch_dtype(self.signature.dtype)

    @property
    def all_extents(self) -> tuple[tuple[int, ...], ...]:
        """Extents that the contract is tried with."""
        return _EXTENTS[self.signature.layout]

    @property
    def generic_extents(self) -> tuple[int, ...]:
        """Small extents, all different."""
        return _GENERIC[self.signature.layout]

    @property
    def nominal_extents(self) -> tuple[int, ...]:
        """Extents at which cost is measured."""
        return nominal_extents(self.plan)

    def shape(self, extents: Sequence[int], features: int) -> tuple[int, ...]:
        """Extents and features as the layout orders them."""
        shape = list(extents)
        shape.insert(self.signature.layout.feature_dim, features)
        return tuple(shape)

    def input(self, extents: Sequence[int], seed: int = 0, scale: float = 1.0) -> Tensor:
        """A normal input."""
        return self._draw(self.shape(extents, self.signature.in_features), seed, scale)

    def cotangent(self, extents: Sequence[int], seed: int = 1) -> Tensor:
        """A normal gradient of the output."""
        return self._draw(self.shape(extents, self.signature.out_features), seed, 1.0)

    def _draw(self, shape: Sequence[int], seed: int, scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(tuple(shape), generator=generator) * scale).to(self.dtype)

    def born(self, seed: int | None = None) -> KernelModule:
        """The module at birth: with the bundle's parameters, or fresh ones by the blueprint's rules."""
        return self.kernel.instantiate(seed=seed)

    def generic_parameters(self, seed: int = 2) -> dict[str, Tensor]:
        """Parameters at which no term of the function vanishes: each the size it would have in a trained module."""
        generator = torch.Generator().manual_seed(seed)
        values = {}
        for spec in self.plan.parameter_specs:
            fan_in = math.prod(spec.shape[1:]) if len(spec.shape) > 1 else 4
            noise = torch.randn(spec.shape, generator=generator) / math.sqrt(fan_in)
            values[spec.name] = (noise + (1.0 if spec.init == "one" else 0.0)).to(self.dtype)
        return values

    def generic(self) -> KernelModule:
        """The kernel at generic parameters."""
        return KernelModule(self.kernel, self.generic_parameters())

    def eager(self, parameters: Mapping[str, Tensor], *, double: bool = False) -> BlueprintModule:
        """The blueprint in plain torch with these parameters: the reference, in float64 where asked."""
        module = BlueprintModule(self.plan, parameters=parameters)
        return module.double() if double else module

    def drawn_parameters(self, seed: int) -> dict[str, Tensor]:
        """Parameters at birth by the blueprint's rules."""
        return initial_parameters(self.plan, seed)


def rms(x: Tensor) -> float:
    """Root mean square; 0 for nothing."""
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def finite(x: Tensor) -> bool:
    """Whether every element is a number."""
    return bool(torch.isfinite(x).all())


def deviation(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference as a share of the expected root mean square (or of `floor`, where that is larger)."""
    scale = max(rms(expected), floor, 1e-30)
    worst = (found.detach().double() - expected.detach().double()).abs().max() if found.numel() else torch.zeros(())
    return float(worst) / scale


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal byte by byte, so that NaN equals itself and the two zeros differ."""
    pair = [t.detach().contiguous().view(torch.uint8) for t in (a, b)]
    return pair[0].shape == pair[1].shape and torch.equal(pair[0], pair[1])
