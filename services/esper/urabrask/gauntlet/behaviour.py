"""behaviour.*: causality, determinism, purity, and what becomes of inputs that no training step should see."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from esper.kasmina.signature import Layout
from esper.urabrask.checks import TOLERANCES
from esper.urabrask.gauntlet.correctness import gradients_of
from esper.urabrask.gauntlet.subject import Refuted, Subject, deviation, rms, same_bits

__all__ = ["causal_as_claimed", "deterministic", "extremes_as_eager", "pure"]

_TOKENS = 9
_REPEATS = 3
OUTPUT = "the output"
"""Its name beside those of the gradients."""


def causal_as_claimed(subject: Subject) -> str:
    """behaviour.causality: for two splits of a sequence, by values and by gradients."""
    if not subject.kernel.manifest.causal:
        return "not claimed"
    if subject.signature.layout is not Layout.SEQUENCE:
        return f"claimed, and a {subject.signature.layout.value} has no later positions"
    module = subject.generic()
    allowed = TOLERANCES[subject.signature.dtype].outputs
    x = subject.input((2, _TOKENS), seed=21)
    for split in (1, 5):
        other = x.clone()
        other[:, split:] = subject.input((2, _TOKENS), seed=22, scale=10.0)[:, split:]
        with torch.no_grad():
            early, changed = module(x)[:, :split], module(other)[:, :split]
        if (share := deviation(changed, early)) > allowed:
            raise Refuted(
                f"expected outputs before position {split} to ignore what comes later, found a change of {share:.2g}"
            )
        cotangent = subject.cotangent((2, _TOKENS), seed=23)
        cotangent[:, split:] = 0
        leak = gradients_of(module, x, cotangent)["x"]
        if (share := deviation(leak[:, split:], torch.zeros_like(leak[:, split:]), floor=1.0)) > allowed:
            raise Refuted(
                f"expected no gradient from outputs before position {split} to later inputs, found {share:.2g}"
            )
    return f"outputs before positions 1 and 5 of {_TOKENS} ignore the later ones"


def deterministic(subject: Subject) -> str:
    """behaviour.determinism: bitwise repeats, disturbed by other sizes in between."""
    module = subject.generic()
    x, cotangent = subject.input(subject.generic_extents, seed=24), subject.cotangent(subject.generic_extents, seed=25)
    first = _everything(module, x, cotangent)
    for extents in (*subject.all_extents[:_REPEATS], subject.nominal_extents):
        gradients_of(module, subject.input(extents, seed=26), subject.cotangent(extents, seed=27))
        again = _everything(module, x, cotangent)
        if differing := [name for name in first if not same_bits(first[name], again[name])]:
            raise Refuted(f"expected the same bits again, found others in {', '.join(differing)[:300]}")
    return f"{_REPEATS + 1} repeats, bitwise equal"


def pure(subject: Subject) -> str:
    """behaviour.purity: what goes in comes out unchanged, of a forward alone and of a forward with its backward."""
    module = subject.generic()
    x, cotangent = subject.input(subject.generic_extents, seed=28), subject.cotangent(subject.generic_extents, seed=29)
    held = {"input": x, "gradient of the output": cotangent, **dict(module.named_parameters())}
    before = {name: value.detach().clone() for name, value in held.items()}

    def unchanged(what: str) -> None:
        if changed := [name for name in held if not same_bits(before[name], held[name])]:
            raise Refuted(f"expected {what} to change nothing, found changes in {', '.join(changed)[:300]}")

    with torch.no_grad():
        module(x)
    unchanged("a forward")
    gradients_of(module, x, cotangent)
    unchanged("forward and backward")
    return "input, gradient and parameters unchanged"


def _everything(module: torch.nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        output = module(x)
    return {OUTPUT: output, **gradients_of(module, x, cotangent)}


_CASES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("zeros", torch.zeros_like),
    ("tiny inputs (1e-30)", lambda x: x * 1e-30),
    # As large as leaves room for their squares: beyond, float16 overflows in eager, and not where compilers widen.
    ("large inputs (1e4)", lambda x: x * min(1e4, math.sqrt(torch.finfo(x.dtype).max) / 8)),
)


def extremes_as_eager(subject: Subject) -> str:
    """behaviour.extremes: outputs and gradients as eager in the same dtype, sample by sample."""
    module, eager = subject.generic(), subject.eager(subject.generic_parameters())
    usual, cotangent = (
        subject.input(subject.generic_extents, seed=30),
        subject.cotangent(subject.generic_extents, seed=31),
    )
    wrong: list[str] = []
    for name, make in _CASES:
        wrong += _differences(
            subject, name, _everything(module, make(usual), cotangent), _everything(eager, make(usual), cotangent)
        )
    # Near the largest number sums overflow, or not, by the order of their terms, which nothing prescribes: all that is
    # asked is that the calls return.
    _everything(module, usual / usual.abs().max() * torch.finfo(usual.dtype).max, cotangent)
    calm = _everything(module, usual, cotangent)
    for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        poisoned = usual.clone()
        poisoned[0].flatten()[0] = value
        wrong += _spread(name, _everything(module, poisoned, cotangent), _everything(eager, poisoned, cotangent), calm)
    if wrong:
        raise Refuted("; ".join(wrong))
    return "zeros, tiny and large inputs as eager; NaN and infinity show in their own sample only"


def _differences(
    subject: Subject, case: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[str]:
    # Both sides round, on inputs that amplify it: ten times what is allowed against the exact reference.
    tolerance = TOLERANCES[subject.signature.dtype]
    # As in numerics.gradients: a small gradient is judged on the scale of the large ones.
    floor = 1e-3 * max(rms(e[torch.isfinite(e)]) for name, e in expected.items() if name != OUTPUT)
    for name, e in expected.items():
        sound = torch.isfinite(e)
        if wrong := int((torch.isfinite(found[name]) != sound).sum()):
            yield f"{case}: expected numbers in {name} where eager has them, found a difference in {wrong} elements"
            continue
        allowed = 10 * (tolerance.outputs if name == OUTPUT else tolerance.gradients)
        share = deviation(found[name][sound], e[sound], 0.0 if name == OUTPUT else floor)
        if share > allowed:
            yield f"{case}: expected a deviation of {name} from eager of at most {allowed:g}, found {share:.2g}"


def _spread(
    case: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], calm: Mapping[str, Tensor]
) -> Iterator[str]:
    own, reference = found[OUTPUT][0], expected[OUTPUT][0]
    if bool(torch.isfinite(own).all()) and not bool(torch.isfinite(reference).all()):
        yield f"{case} in a sample: expected it to show in that sample's output, found only finite numbers"
    # Gradients of parameters sum over samples, so they alone may know.
    for name, words in ((OUTPUT, "outputs"), ("x", "gradients")):
        if not same_bits(found[name][1:], calm[name][1:]):
            yield f"{case} in a sample: expected the other samples' {words} untouched, found changes"
