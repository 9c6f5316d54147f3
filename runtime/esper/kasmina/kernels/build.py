"""From blueprint and signature to the bytes of a kernel.

This is CPU work of seconds: never on an event loop or a training thread::

    bundle = build(get("bottleneck_mlp"), Signature(Layout.VECTOR, 64, 64), Tier.STANDARD, Target.here())
    kernel_id = kernel_id_of(bundle)

Compiling writes files: give each build a process and a directory of its own (the forge does).
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from esper.kasmina.blueprints.module import initial_parameters
from esper.kasmina.kernels.bundle import (
    ANY_TARGET,
    BACKWARD,
    BLUEPRINT,
    FORWARD,
    PARAMETERS,
    PORTABLE,
    Manifest,
    TensorSpec,
    Tier,
    pack,
    write_zip,
)
from esper.kasmina.kernels.target import Target
from esper.kasmina.kernels.tracing import export_backward, export_forward, quiet
from esper.mesh.errors import Conflict, InternalError, InvalidInput

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from esper.kasmina.blueprints.ir import Blueprint
    from esper.kasmina.blueprints.plan import Plan
    from esper.kasmina.signature import Signature

__all__ = ["Progress", "build", "compiler", "limitations"]

Progress = Callable[[str], None]
"""Is told ``exporting`` and ``compiling`` as these begin."""


def compiler(environ: dict[str, str] | None = None) -> str | None:
    """Path of the C++ compiler that a standard build would use, or None."""
    names = [(os.environ if environ is None else environ).get("CXX", ""), "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def limitations(tier: Tier) -> list[str]:
    """Why this machine cannot build a tier, one sentence each; empty when it can."""
    if tier is Tier.STANDARD and compiler() is None:
        return ["tier standard needs a C++ compiler: expected CXX, g++ or clang++ on the PATH, found none"]
    return []


def build(
    blueprint: Blueprint,
    signature: Signature,
    tier: Tier,
    target: Target | None = None,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> bytes:
    """Build a kernel.

    Args:
        blueprint: what to build.
        signature: where it must fit.
        tier: effort. A portable build of the same arguments by the same toolchain has the same bytes.
        target: machine of the compiled functions; None means this one.
        seed: of the initial parameters.
        progress: is told what begins.

    Returns:
        The bytes of the bundle.

    Raises:
        InvalidInput: the blueprint does not fit the signature, or the target is another machine: nothing is
            cross-compiled.
        Conflict: this machine lacks a tool; reason TOOL_MISSING.
        InternalError: the compiler failed, with its own words.
    """
    plan = blueprint.check(signature)
    if reasons := limitations(tier):
        raise Conflict("; ".join(reasons), reason="TOOL_MISSING")
    device = target.device if target is not None and tier is Tier.STANDARD else "cpu"
    here = Target.here(device)
    if tier is Tier.STANDARD and target not in {None, here}:
        raise InvalidInput(f"target: expected this machine ({here}), found {target}", reason="TARGET_NOT_HERE")
    progress("exporting")
    values = initial_parameters(plan, seed)
    members = {
        BLUEPRINT: blueprint.canonical_json().encode(),
        PARAMETERS: safetensors.torch.save(values),
        PORTABLE: _save(export_forward(plan)),
    }
    if tier is Tier.STANDARD:
        forward, backward = export_forward(plan, device), export_backward(plan, device)
        progress("compiling")
        members[FORWARD] = _compile(forward, here)
        members[BACKWARD] = _compile(backward, here)
    return pack(_manifest(plan, tier, here, seed), members)


def _manifest(plan: Plan, tier: Tier, here: Target, seed: int) -> Manifest:
    dtype = plan.signature.dtype
    return Manifest(
        blueprint_id=plan.blueprint.id,
        blueprint_name=plan.blueprint.name,
        signature=plan.signature,
        birth=plan.blueprint.birth,
        causal=plan.blueprint.causal,
        tier=tier,
        target=str(here) if tier is Tier.STANDARD else ANY_TARGET,
        parameters=tuple(TensorSpec(spec.name, spec.shape, dtype) for spec in plan.parameter_specs),
        parameter_count=plan.parameters,
        flops_per_position=round(plan.flops),
        seed=seed,
        toolchain=_toolchain(tier),
    )


def _toolchain(tier: Tier) -> dict[str, str]:
    versions = {"esper": version("esper"), "torch": torch.__version__}
    if tier is Tier.STANDARD and (path := compiler()) is not None:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=30)  # noqa: S603  # the compiler that torch runs too
        versions |= {"compiler": run.stdout.partition("\n")[0][:200], "python": platform.python_version()}
    return versions


def _save(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    # Tensors of the trace, which only take room.
    program.example_inputs = None
    with quiet():
        torch.export.save(program, buffer)
    # torch writes times into the archive; written anew, equal programs have equal bytes.
    with zipfile.ZipFile(buffer) as archive:
        return write_zip({name: archive.read(name) for name in archive.namelist()})


def _compile(program: ExportedProgram, here: Target) -> bytes:
    from torch import _inductor

    configs: dict[str, Any] = {
        # One process per build is the forge's business; torch's own pool would outlive and escape its limits.
        "compile_threads": 1,
        # Otherwise the number of threads of the building process is baked into the kernel.
        "cpp.dynamic_threads": True,
    }
    if here.march is not None:
        configs["cpp.march"] = here.march
    with tempfile.TemporaryDirectory(prefix="esper-build-") as folder, quiet():
        path = str(Path(folder, "kernel.pt2"))
        try:
            with _inductor.config.patch(configs):
                _inductor.aoti_compile_and_package(program, package_path=path)
        except Exception as error:  # whatever a compiler raises is its finding about this build
            raise InternalError(
                f"the compiler failed: {type(error).__name__}: {error}", reason="COMPILER_FAILED"
            ) from error
        return Path(path).read_bytes()
