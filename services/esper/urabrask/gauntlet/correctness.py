"""contract.* and numerics.*: shapes, outputs and gradients against the eager reference in float64."""

import torch
from torch import Tensor, nn

from esper.urabrask.checks import TOLERANCES
from esper.urabrask.gauntlet.subject import Refuted, Subject, deviation, finite, rms

__all__ = ["gradients_agree", "gradients_of", "outputs_agree", "shapes_hold"]


def shapes_hold(subject: Subject) -> str:
    """contract.shape: output shape and dtype for every tried extent."""
    module = subject.generic()
    with torch.no_grad():
        for extents in subject.all_extents:
            x = subject.input(extents)
            expected = subject.shape(extents, subject.signature.out_features)
            found = module(x)
            if (tuple(found.shape), found.dtype) != (expected, subject.dtype):
                raise Refuted(
                    f"input {tuple(x.shape)}: expected {expected} of {subject.dtype}, "
                    f"found {tuple(found.shape)} of {found.dtype}"
                )
    return f"{len(subject.all_extents)} extents, batches of {sorted({e[0] for e in subject.all_extents})}"


def outputs_agree(subject: Subject) -> str:
    """numerics.outputs: the largest deviation over a small and a nominal input."""
    module = subject.generic()
    reference = subject.eager(subject.generic_parameters(), double=True)
    allowed = TOLERANCES[subject.signature.dtype].outputs
    worst = 0.0
    with torch.no_grad():
        for extents in (subject.generic_extents, subject.nominal_extents):
            x = subject.input(extents, seed=3)
            found, expected = module(x), reference(x.double())
            if not finite(found):
                raise Refuted(f"input {tuple(x.shape)}: expected finite outputs, found NaN or infinity")
            worst = max(worst, deviation(found, expected))
            if worst > allowed:
                raise Refuted(f"input {tuple(x.shape)}: expected a deviation of at most {allowed:g}, found {worst:.2g}")
    return f"largest deviation {worst:.2g} of the reference's rms, allowed {allowed:g}"


def gradients_of(module: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Gradients of `sum(output * cotangent)` by name, that of the input as `x`; absent ones are zero.

    Raises:
        Refuted: the output does not depend on anything in a way that autograd knows.
    """
    x = x.detach().requires_grad_()
    leaves = {"x": x, **dict(module.named_parameters())}
    out = module(x)
    if not out.requires_grad:
        raise Refuted("expected an output that gradients can flow from, found one without (dead gradient)")
    found = torch.autograd.grad(out, list(leaves.values()), cotangent, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def gradients_agree(subject: Subject) -> str:
    """numerics.gradients: the largest deviation over the input and every parameter."""
    module = subject.generic()
    reference = subject.eager(subject.generic_parameters(), double=True)
    allowed = TOLERANCES[subject.signature.dtype].gradients
    worst, where = 0.0, "x"
    for extents in (subject.generic_extents, subject.nominal_extents):
        x, cotangent = subject.input(extents, seed=4), subject.cotangent(extents)
        found = gradients_of(module, x, cotangent)
        expected = gradients_of(reference, x.double(), cotangent.double())
        # A gradient that is small beside the others is judged on their scale: it is a difference of large terms.
        floor = 1e-3 * max(rms(grad) for grad in expected.values())
        for name, grad in found.items():
            if grad.shape != expected[name].shape or not finite(grad):
                raise Refuted(f"gradient of {name}: expected finite numbers, found NaN, infinity or another shape")
            if (share := deviation(grad, expected[name], floor)) > worst:
                worst, where = share, name
        if worst > allowed:
            raise Refuted(f"gradient of {where}: expected a deviation of at most {allowed:g}, found {worst:.2g}")
    return f"largest deviation {worst:.2g} (of {where}), allowed {allowed:g}"
