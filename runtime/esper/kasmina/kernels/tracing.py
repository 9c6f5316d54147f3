"""The forward of a blueprint as an exported graph with free batch, sequence and spatial extents.

It is a function of tensors only: ``f(x, *parameters) -> delta``.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints.module import BlueprintModule, torch_dtype
from esper.kasmina.signature import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.export import ExportedProgram

    from esper.kasmina.blueprints.plan import Plan

__all__ = [
    "ForwardFunction",
    "anonymous",
    "example_input",
    "example_parameters",
    "export_forward",
    "free",
    "quiet",
]

# The batch is traced at a prime, the other extents at others: torch takes equal sizes for one size and would make the
# kernel static. They are small, because example tensors of wide modules are held in memory while tracing.
_BATCH = 37
_EXTENTS = (11, 13, 17, 19, 23, 29, 31, 41, 43, 47, 53, 59, 61, 67, 71, 73)
_DIMENSIONS = {Layout.VECTOR: (), Layout.SEQUENCE: ("tokens",), Layout.IMAGE: ("height", "width")}


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings about its own use of its own deprecated interfaces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class ForwardFunction(nn.Module):
    """``f(x, *parameters)`` of a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        # Values do not matter to a trace; names and shapes do. A tuple hides the module and its parameters from export.
        self._hidden = (BlueprintModule(plan),)
        self._names = [spec.name for spec in plan.parameter_specs]

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """``delta(x)`` in one order of memory."""
        held = dict(zip(self._names, parameters, strict=True))
        result = torch.func.functional_call(self._hidden[0], held, (x,))
        assert isinstance(result, Tensor)
        return result.contiguous()


def example_input(plan: Plan, features: int | None = None) -> Tensor:
    """A tensor of the signature's layout whose free extents equal no size inside the module."""
    taken = {size for spec in plan.parameter_specs for size in spec.shape} | {n.flow.features for n in plan.nodes}
    taken |= {plan.signature.in_features, plan.signature.out_features}
    free = [prime for prime in (_BATCH, *_EXTENTS) if prime not in taken]
    extents = free[: 1 + len(_DIMENSIONS[plan.signature.layout])]
    shape = list(extents)
    shape.insert(plan.signature.layout.feature_dim, plan.signature.in_features if features is None else features)
    return torch.randn(shape, dtype=torch_dtype(plan.signature.dtype), generator=torch.Generator().manual_seed(0))


def example_parameters(plan: Plan) -> list[Tensor]:
    """Tensors of the shapes of the parameters; a trace looks at nothing else of them."""
    return [torch.zeros(spec.shape, dtype=torch_dtype(plan.signature.dtype)) for spec in plan.parameter_specs]


def free(plan: Plan) -> dict[int, Any]:
    """The dimensions of the input whose extents are free, as torch.export names them."""
    layout = plan.signature.layout
    names = ["batch", *_DIMENSIONS[layout]]
    dims = [dim for dim in range(layout.rank) if dim != layout.feature_dim]
    return {dim: torch.export.Dim(name, min=1) for dim, name in zip(dims, names, strict=True)}


def export_forward(plan: Plan, device: str = "cpu") -> ExportedProgram:
    """``f(x, *parameters)`` as an exported program."""
    x = example_input(plan).to(device)
    held = [p.to(device) for p in example_parameters(plan)]
    static = (None,) * len(held)
    with quiet():
        program = torch.export.export(ForwardFunction(plan), (x, *held), dynamic_shapes=(free(plan), static))
    return anonymous(program)


def anonymous(program: ExportedProgram) -> ExportedProgram:
    """Drop stack traces: they name files of the building machine and would make equal kernels differ."""
    for graph_node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            graph_node.meta.pop(key, None)
    return program
