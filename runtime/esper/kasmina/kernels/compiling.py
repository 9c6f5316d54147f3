"""From an exported program to native code: AOTInductor with what our kernels ask of it."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from esper.kasmina.kernels.tracing import quiet
from esper.mesh.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

    from esper.kasmina.kernels.target import Target

__all__ = ["compile_program"]


def compile_program(program: ExportedProgram, here: Target, options: Mapping[str, Any]) -> bytes:
    """An AOTInductor package of a program, for this machine.

    Args:
        program: is used up: the compiler writes what it assumes into it.
        here: its target.
        options: settings of inductor beyond those that every kernel is compiled with.

    Raises:
        InternalError: the compiler failed, with its own words (reason COMPILER_FAILED), or has fixed an extent that
            must stay free (reason KERNEL_STATIC).
    """
    from torch import _inductor

    configs: dict[str, Any] = {
        # One process per build is the forge's business; torch's own pool would outlive and escape its limits.
        "compile_threads": 1,
        # Otherwise the number of threads of the building process is baked into the kernel.
        "cpp.dynamic_threads": True,
        **options,
    }
    if here.march is not None:
        configs["cpp.march"] = here.march
    free = _symbolic(program)
    with tempfile.TemporaryDirectory(prefix="esper-build-") as folder, quiet():
        path = str(Path(folder, "kernel.pt2"))
        try:
            with _inductor.config.patch(configs), _convolutions():
                _inductor.aoti_compile_and_package(program, package_path=path)
        except Exception as error:  # whatever a compiler raises is its finding about this build
            raise InternalError(
                f"the compiler failed: {type(error).__name__}: {error}", reason="COMPILER_FAILED"
            ) from error
        if lost := free - _symbolic(program):
            where = ", ".join(f"dimension {dim} of {name}" for name, dim in sorted(lost))
            raise InternalError(f"the compiler made {where} constant", reason="KERNEL_STATIC")
        return Path(path).read_bytes()


def _symbolic(program: ExportedProgram) -> set[tuple[str, int]]:
    """Inputs and their dimensions whose extents are free."""
    found = set()
    for node in program.graph.nodes:
        value = node.meta["val"] if node.op == "placeholder" else None
        sizes: tuple[object, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                found.add((node.name, dim))
    return found


@contextmanager
def _convolutions() -> Iterator[None]:
    """Have the backward of convolutions compiled as a call of torch's own.

    The lowering of torch 2.13 asks for the strides as numbers, which makes every extent of an image or sequence
    constant, without an error: the code then reads and writes beyond smaller inputs.
    """
    from torch._inductor import lowering

    backward = torch.ops.aten.convolution_backward.default
    call = lowering.fallback_handler(backward)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with (
        mock.patch.dict(lowering.lowerings, {backward: call}),
        mock.patch.dict(lowering._maybe_layout_constraints, {backward: lowering.constrain_to_fx_strides}),  # noqa: SLF001  # has no public name
    ):
        yield
