"""Finds out by experiment whether a model's positions must not see later ones.

One position in the middle of an input is changed and everything else kept: where the output at earlier positions stays
as it was, the model is causal, and a seed that mixed positions both ways would leak the future into its training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper.kasmina._ports import first_tensor
from esper.kasmina._quiet import evaluating

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["is_causal"]


def is_causal(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
    """True where the model gives an output for every position of an input and none depends on a later one.

    Every tensor with positions is tried: an encoder-decoder sees all of its first input and must not look ahead in its
    second one. Runs a forward for each and one more, in evaluation mode without gradients; flags, buffers and random
    state are as before afterwards. A model that gives one output for a whole sample (a classifier of sequences) is not
    causal: there, later positions may be seen. None where this can not tell: no two positions, inputs that are all
    alike or without memory, an output of neither kind (a loss alone), or one that the change does not move.
    """
    first = first_tensor(args, kwargs)
    named = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value is not first]
    inputs = [x for x in (first, *named) if x is not None and not x.is_meta and x.dim() >= 2 and x.shape[1] >= 2]
    pairs = [(x, changed) for x in inputs if (changed := _changed(x)) is not None]
    if not pairs:
        return None
    found: list[bool | None] = []
    with evaluating(model):
        before = _tensors(model(*args, **kwargs))
        for x, changed in pairs:
            others = dict(zip(kwargs, _swap(tuple(kwargs.values()), x, changed), strict=True))
            after = _tensors(model(*_swap(args, x, changed), **others))
            found.append(_verdict(before, after, x))
    return True if True in found else False if False in found else None


def _changed(x: Tensor) -> Tensor | None:
    """The input with another value in its middle position; None where there is no other value to take."""
    changed, at = x.clone(), x.shape[1] // 2
    here = x[:, at]
    # Another sample's token is as valid as this one's; with a single sample, an earlier position's is.
    changed[:, at] = here.roll(1, 0) if len(x) > 1 and not torch.equal(here, here.roll(1, 0)) else x[:, 0]
    return None if torch.equal(changed, x) else changed


def _verdict(before: list[Tensor], after: list[Tensor], x: Tensor) -> bool | None:
    for a, b in zip(before, after, strict=True):
        readings = list(zip(_by_position(a, x), _by_position(b, x), strict=True))
        if readings:
            found = [_looks_back(*reading) for reading in readings]
            return True if True in found else None if None in found else False
    return False if any(a.shape[0] == x.shape[0] for a in before) else None


def _looks_back(before: Tensor, after: Tensor) -> bool | None:
    """Whether earlier positions stayed as they were while a later one moved; None where nothing moved at all."""
    at = before.shape[1] // 2
    if not torch.allclose(before[:, :at], after[:, :at], rtol=1e-3, atol=1e-5):
        return False
    return None if torch.allclose(before[:, at:], after[:, at:], rtol=1e-3, atol=1e-5) else True


def _swap(args: tuple[Any, ...], x: Tensor, changed: Tensor) -> tuple[Any, ...]:
    return tuple(changed if value is x else value for value in args)


def _tensors(output: Any) -> list[Tensor]:
    """What an output holds that could have positions, in its order."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else (output,)
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2]


def _by_position(value: Tensor, x: Tensor) -> list[Tensor]:
    """A tensor as (N, T, ...), in every way in which its shape can be read so; none where it has no positions."""
    n, t = x.shape[:2]
    if value.dim() >= 3 and value.shape[0] == n:
        # Logits come as (N, T, V) and, as cross entropy wants them, as (N, V, T).
        first = [value] if value.shape[1] == t else []
        return [*first, value.movedim(-1, 1)] if value.shape[-1] == t else first
    return [value.reshape(n, t, *value.shape[1:])] if value.shape[0] == n * t else []
