"""Calls compiled code as if it might fail, and computes by the portable form what it failed to give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from esper.kasmina.blueprints.module import in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Form", "attempted", "portable_gradients"]


class Form(NamedTuple):
    """What a tensor must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Form:
        """That of `x`."""
        return cls(tuple(x.shape), x.dtype, x.device)

    def __str__(self) -> str:
        return f"{self.shape} of {str(self.dtype).removeprefix('torch.')} on {self.device}"


def attempted(
    call: Callable[[], Sequence[Any]], forms: Sequence[Form | None], *, more: bool = False
) -> tuple[list[Any], str]:
    """What a call of compiled code gives, or one sentence of why that cannot be used.

    Args:
        call: the code.
        forms: of each tensor that it must give; None for one that nobody looks at.
        more: whether it may give more of them.
    """
    try:
        given: Any = call()
    except Exception as error:  # noqa: BLE001  # whatever native code raises, the portable form can answer
        return [], f"raised {type(error).__name__}: {error!s:.300}"
    found = list(given) if isinstance(given, list | tuple) else [given]
    if len(found) < len(forms) or (len(found) > len(forms) and not more):
        return [], f"gave {len(found)} tensors for {len(forms)}"
    for value, form in zip(found, forms, strict=False):
        if form is None:
            continue
        given = Form.of(value) if isinstance(value, Tensor) else type(value).__name__
        if given != form:
            return [], f"gave {given} for {form}"
    return found, ""


def portable_gradients(
    portable: Callable[..., Tensor], grad: Tensor, saved: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the portable form at the inputs that are `wanted`.

    Args:
        portable: ``f(x, *parameters)``.
        grad: at its output.
        saved: x and parameters.
        wanted: for each of them.
    """
    inputs = [t.detach().requires_grad_(need) for t, need in zip(saved, wanted, strict=True)]
    asked = [t for t, need in zip(inputs, wanted, strict=True) if need]
    with torch.enable_grad():
        y = portable(in_order(inputs[0]), *inputs[1:])
        found = iter(torch.autograd.grad(y, asked, grad, allow_unused=True))
    return [next(found) if need else None for need in wanted]
