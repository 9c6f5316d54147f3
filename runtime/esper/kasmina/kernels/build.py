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
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

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
from esper.kasmina.kernels.tracing import export_forward, quiet
from esper.mesh.errors import Conflict, InvalidInput

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
    if tier.compiled and compiler() is None:
        return [f"tier {tier} needs a C++ compiler: expected CXX, g++ or clang++ on the PATH, found none"]
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
    device = target.device if target is not None and tier.compiled else "cpu"
    here = Target.here(device)
    if tier.compiled and target not in {None, here}:
        raise InvalidInput(f"target: expected this machine ({here}), found {target}", reason="TARGET_NOT_HERE")
    progress("exporting")
    values = initial_parameters(plan, seed)
    members = {
        BLUEPRINT: blueprint.canonical_json().encode(),
        PARAMETERS: safetensors.torch.save(values),
        PORTABLE: _save(export_forward(plan)),
    }
    manifest = _manifest(plan, tier, here, seed)
    if tier.compiled:
        # Late: it imports the compiler, which takes seconds and which portable builds do without.
        from esper.kasmina.kernels import tuning

        progress("compiling")
        tried = [tuning.STANDARD] if tier is Tier.STANDARD else tuning.variants(plan, device)
        made, trials = tuning.tune(plan, manifest, here, tried)
        members |= {FORWARD: made.forward, BACKWARD: made.backward}
        manifest = replace(manifest, variant=made.variant.name, recalled=made.recalled, trials=trials)
    return pack(manifest, members)


def _manifest(plan: Plan, tier: Tier, here: Target, seed: int) -> Manifest:
    dtype = plan.signature.dtype
    return Manifest(
        blueprint_id=plan.blueprint.id,
        blueprint_name=plan.blueprint.name,
        signature=plan.signature,
        birth=plan.blueprint.birth,
        causal=plan.blueprint.causal,
        tier=tier,
        target=str(here) if tier.compiled else ANY_TARGET,
        parameters=tuple(TensorSpec(spec.name, spec.shape, dtype) for spec in plan.parameter_specs),
        parameter_count=plan.parameters,
        flops_per_position=round(plan.flops),
        seed=seed,
        toolchain=_toolchain(tier),
    )


def _toolchain(tier: Tier) -> dict[str, str]:
    versions = {"esper": version("esper"), "torch": torch.__version__}
    if tier.compiled and (path := compiler()) is not None:
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
