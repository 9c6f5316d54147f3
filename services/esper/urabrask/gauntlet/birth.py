"""birth.*: a newborn changes nothing, and learns."""

import torch
from torch import Tensor

from esper.kasmina.blueprints.ir import Birth
from esper.urabrask.checks import LIVING_SHARE
from esper.urabrask.gauntlet.correctness import gradients_of
from esper.urabrask.gauntlet.subject import Refuted, Subject, finite, rms, same_bits

__all__ = ["born_by_the_rules", "born_living", "born_silent"]

STEP = 0.1
"""Length of the one step, relative to the gradient's root mean square: about that of a first step with Adam at a rate
ten times the usual, so that what flows back through a zero-born matrix is well above rounding."""


def born_by_the_rules(subject: Subject) -> str:
    """birth.parameters: bit by bit what the blueprint's rules draw from the manifest's seed."""
    values = dict(subject.born().named_parameters())
    seed = subject.kernel.manifest.seed
    for name, drawn in subject.drawn_parameters(seed).items():
        value = values[name].detach()
        if not finite(value):
            raise Refuted(f"parameter {name}: expected finite numbers, found NaN or infinity")
        if not same_bits(value, drawn):
            raise Refuted(
                f"parameter {name}: expected what the rules draw from seed {seed}, {_range(drawn)}, "
                f"found other values, {_range(value)}"
            )
    return f"{len(values)} tensors as the rules draw them from seed {seed}"


def _range(value: Tensor) -> str:
    return f"from {float(value.min()):g} to {float(value.max()):g}"


def born_silent(subject: Subject) -> str:
    """birth.output: exactly zero for a zero birth; finite and alive for a random one."""
    zero = subject.kernel.manifest.birth is Birth.ZERO
    loudest = 0.0
    with torch.no_grad():
        for seed in (None, 11, 12):
            module = subject.born(seed)
            for scale in (1.0, 100.0):
                out = module(subject.input(subject.generic_extents, seed=13, scale=scale))
                if not finite(out):
                    raise Refuted("expected finite outputs at birth, found NaN or infinity")
                loudest = max(loudest, float(out.abs().max()))
                if zero and loudest:
                    raise Refuted(f"expected an output of exactly zero at birth, found {loudest:.3g}")
            if not zero and not loudest:
                raise Refuted("expected an output other than zero from a random birth, found zero")
    return "exactly zero for 6 inputs and draws" if zero else f"finite, at most {loudest:.3g}"


def born_living(subject: Subject) -> str:
    """birth.gradient: alive at birth, all alive after one step."""
    extents = subject.generic_extents
    x, cotangent = subject.input(extents, seed=14), subject.cotangent(extents, seed=15)
    module = subject.born()
    first = _of_parameters(gradients_of(module, x, cotangent))
    if not first:
        return "no parameters"
    if not (awake := _alive(first)):
        raise Refuted("expected a gradient at birth for at least one parameter, found none (dead gradient)")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in awake:
                parameter.sub_(STEP * first[name] / rms(first[name]))
    second = _of_parameters(gradients_of(module, x, cotangent))
    if asleep := sorted(set(second) - _alive(second)):
        raise Refuted(
            f"expected a gradient for every parameter after one step, found none for {', '.join(asleep)[:300]}"
        )
    return f"{len(awake)} of {len(first)} parameters alive at birth, all after one step"


def _of_parameters(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, grad in gradients.items():
        if not finite(grad):
            raise Refuted(f"gradient of {name}: expected finite numbers, found NaN or infinity")
    return {name: grad for name, grad in gradients.items() if name != "x"}


def _alive(gradients: dict[str, Tensor]) -> set[str]:
    sizes = {name: rms(grad) for name, grad in gradients.items()}
    bar = LIVING_SHARE * max(sizes.values())
    return {name for name, size in sizes.items() if size > bar}
