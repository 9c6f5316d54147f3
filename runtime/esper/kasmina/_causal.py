"""Finds out by experiment whether a model's positions must not see later ones.

The last position of the input is changed and everything else kept: where the output at earlier positions stays as it
was, the model is causal, and a seed that mixed positions both ways would leak the future into its training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper.kasmina._ports import first_tensor
from esper.kasmina._quiet import untouched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["is_causal"]


def is_causal(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True where the model gives an output for every position and none depends on a later input.

    Runs two forwards in evaluation mode without gradients; flags, buffers and random state are as before afterwards.
    A model whose output has no positions (a classifier of sequences) is not causal: there, later positions may be
    seen.
    """
    x = first_tensor(args, kwargs)
    if x is None or x.dim() < 2 or x.shape[1] < 2:
        return False
    changed = x.clone()
    # Another sample's token is as valid as this one's; with a single sample, an earlier position's is.
    last = changed[:, -1]
    changed[:, -1] = last.roll(1, 0) if len(x) > 1 and not torch.equal(last, last.roll(1, 0)) else changed[:, 0]
    if torch.equal(changed, x):
        return False
    with untouched(model), torch.no_grad():
        model.eval()
        before = _by_position(model(*args, **kwargs), x)
        after = _by_position(
            model(*_swap(args, x, changed), **{k: changed if v is x else v for k, v in kwargs.items()}), x
        )
    if before is None or after is None:
        return False
    moved = not torch.allclose(before[:, -1], after[:, -1], rtol=1e-3, atol=1e-5)
    return moved and torch.allclose(before[:, :-1], after[:, :-1], rtol=1e-3, atol=1e-5)


def _swap(args: tuple[Any, ...], x: Tensor, changed: Tensor) -> tuple[Any, ...]:
    return tuple(changed if value is x else value for value in args)


def _by_position(output: Any, x: Tensor) -> Tensor | None:
    """The output as (N, T, ...), or None where it has no positions."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else (output,)
    for value in values:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        n, t = x.shape[:2]
        if value.dim() >= 3 and value.shape[:2] == (n, t):
            return value
        if value.shape[0] == n * t:
            return value.view(n, t, *value.shape[1:])
    return None
