"""Loads a kernel: only one that is what it claims to be, that a trusted gauntlet validated, and that fits its place.

The order is the point: digest, signature, verdict, manifest, shape, form of the archives; and only then is the first
byte of torch or native code touched. Every refusal is a `KernelRejected` that lists its reasons::

    kernel = load_kernel(bundle, verdict, trust, expected_id, site.signature)
    module = kernel.instantiate()
"""

from __future__ import annotations

import io
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from esper.kasmina.kernels.archives import UnsoundArchive, sound_archive
from esper.kasmina.kernels.bundle import BACKWARD, FORWARD, PARAMETERS, PORTABLE, Tier, kernel_id_of, unpack
from esper.kasmina.kernels.kernel import Kernel
from esper.kasmina.kernels.rejection import KernelCorrupt, KernelUnfit
from esper.kasmina.kernels.target import Target
from esper.kasmina.kernels.tracing import quiet
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from esper.kasmina.blueprints.plan import Plan
    from esper.kasmina.kernels.bundle import Bundle, Manifest
    from esper.kasmina.kernels.signing import SignedVerdict, TrustStore
    from esper.kasmina.signature import Signature

__all__ = ["load_candidate", "load_kernel"]

_log = get_logger("esper.kasmina.kernels")
# torch.export keeps the program that it is reading in a global: two threads that load at once break one another.
_loading = threading.Lock()
_said: set[tuple[str, str]] = set()
_said_lock = threading.Lock()


def load_kernel(
    bundle: bytes,
    verdict: SignedVerdict | None,
    trust: TrustStore,
    expected_id: str,
    signature: Signature | None,
    target: Target | None = None,
) -> Kernel:
    """Verify a kernel and load it.

    Args:
        bundle: the bytes.
        verdict: of the gauntlet; None is refused like any other lack of trust.
        trust: keys that this process believes.
        expected_id: the kernel that was asked for.
        signature: of the place where it must fit; None to load it for any.
        target: this machine; None finds out. A kernel compiled for another target runs its portable graph.

    Raises:
        KernelCorrupt: the bytes are not the kernel asked for, or contradict their own manifest.
        KernelUntrusted: no trusted verdict validates it.
        KernelUnfit: it is for another signature.
    """
    _check_digest(bundle, expected_id)
    trust.verify(verdict, expected_id)
    return _load(bundle, expected_id, signature, target)


def load_candidate(
    bundle: bytes, expected_id: str, signature: Signature | None = None, target: Target | None = None
) -> Kernel:
    """Load a kernel that nobody has validated yet. Runs native code of unknown intent: for the gauntlet's sandbox only.

    Raises:
        KernelCorrupt, KernelUnfit: as `load_kernel`.
    """
    _check_digest(bundle, expected_id)
    return _load(bundle, expected_id, signature, target)


def _check_digest(bundle: bytes, expected_id: str) -> None:
    found = kernel_id_of(bundle)
    if found != expected_id:
        raise KernelCorrupt(expected_id, [f"its bytes have the digest {found}"])


def _load(bundle: bytes, kernel_id: str, signature: Signature | None, target: Target | None) -> Kernel:
    opened = unpack(bundle)
    manifest = opened.manifest
    if signature is not None and manifest.signature != signature:
        raise KernelUnfit(kernel_id, [f"its signature is {manifest.signature}, and {signature} is wanted"])
    plan = _plan(opened, kernel_id)
    here = Target.here() if target is None else target
    archives = _archives(opened, kernel_id, here)
    parameters = safetensors.torch.load(opened.members[PARAMETERS])
    found = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in parameters.items()}
    if found != {spec.name: (spec.shape, spec.dtype) for spec in manifest.parameters}:
        raise KernelCorrupt(kernel_id, ["its initial parameters are not those that the manifest lists"])
    try:
        with _loading:
            portable = _portable(archives.pop(PORTABLE))
            compiled = _compiled(archives) if archives else None
    except Exception as error:  # torch raises all kinds; to the caller it is one refusal
        raise KernelCorrupt(kernel_id, [f"torch cannot load it: {type(error).__name__}: {error!s:.300}"]) from error
    return Kernel(
        kernel_id=kernel_id,
        manifest=manifest,
        plan=plan,
        parameters=parameters,
        portable=portable,
        compiled=compiled,
        nbytes=len(bundle),
    )


def _plan(opened: Bundle, kernel_id: str) -> Plan:
    manifest = opened.manifest
    try:
        blueprint = opened.blueprint
        plan = blueprint.check(manifest.signature)
    except InvalidInput as error:
        raise KernelCorrupt(kernel_id, [f"its blueprint is wrong: {error.public}"]) from error
    reasons = []
    if blueprint.id != manifest.blueprint_id:
        reasons.append(f"its blueprint is {blueprint.id}, and the manifest says {manifest.blueprint_id:.80}")
    if (blueprint.causal, blueprint.birth) != (manifest.causal, manifest.birth):
        reasons.append("birth or causality of its blueprint is not that of the manifest")
    if [(s.name, s.shape) for s in plan.parameter_specs] != [(s.name, s.shape) for s in manifest.parameters]:
        reasons.append("the parameters of its blueprint are not those of the manifest")
    if reasons:
        raise KernelCorrupt(kernel_id, reasons)
    return plan


def _archives(opened: Bundle, kernel_id: str, here: Target) -> dict[str, bytes]:
    """The archives that torch is to read, looked through: the graph, and the compiled packages where they can run."""
    compiled = (FORWARD, BACKWARD) if _compiled_here(opened.manifest, kernel_id, here) else ()
    try:
        return {name: sound_archive(name, opened.members[name]) for name in (PORTABLE, *compiled)}
    except UnsoundArchive as error:
        raise KernelCorrupt(kernel_id, [str(error)]) from error


def _compiled_here(manifest: Manifest, kernel_id: str, here: Target) -> bool:
    if manifest.tier is Tier.PORTABLE or manifest.target == str(here):
        return manifest.tier is not Tier.PORTABLE
    with _said_lock:
        first = (kernel_id, str(here)) not in _said
        _said.add((kernel_id, str(here)))
    if first:
        _log.warning(
            "kernel runs its portable graph", kernel_id=kernel_id, compiled_for=manifest.target, here=str(here)
        )
    return False


def _portable(data: bytes) -> Callable[..., Tensor]:
    with quiet():
        program = torch.export.load(io.BytesIO(data))
        # The module checks shape and type itself, in words; the program's own guards would do it again on every call.
        return program.module(check_guards=False)


def _compiled(archives: Mapping[str, bytes]) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    from torch import _inductor

    with tempfile.TemporaryDirectory(prefix="esper-kernel-") as folder, quiet():
        loaded = []
        for name in (FORWARD, BACKWARD):
            path = Path(folder, name)
            path.write_bytes(archives[name])
            # The loader keeps a copy of its own, which lives as long as the functions.
            loaded.append(_inductor.aoti_load_package(str(path)))
    return loaded[0], loaded[1]
