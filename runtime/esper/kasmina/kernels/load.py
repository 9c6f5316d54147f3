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
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from esper.kasmina.kernels.archives import UnsoundArchive, sound_archive
from esper.kasmina.kernels.bundle import BACKWARD, FORWARD, PARAMETERS, PORTABLE, kernel_id_of, unpack
from esper.kasmina.kernels.kernel import Compiled, Kernel
from esper.kasmina.kernels.pace import Pace
from esper.kasmina.kernels.rejection import KernelCorrupt, KernelUnfit
from esper.kasmina.kernels.target import Target
from esper.kasmina.kernels.tracing import quiet
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from esper.kasmina.blueprints.plan import Plan
    from esper.kasmina.kernels.bundle import Bundle, Manifest
    from esper.kasmina.kernels.signing import SignedVerdict, Statement, TrustStore
    from esper.kasmina.signature import Signature

__all__ = ["load_candidate", "load_exported", "load_kernel", "native"]

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
        target: this machine; None finds out, for the kind of device that the kernel is for. A kernel compiled for
            another target, or measured by the gauntlet to be nowhere faster than plain torch, runs its blueprint in
            plain torch; no native code of it is loaded then.

    Raises:
        KernelCorrupt: the bytes are not the kernel asked for, or contradict their own manifest.
        KernelUntrusted: no trusted verdict validates it.
        KernelUnfit: it is for another signature.
    """
    _check_digest(bundle, expected_id)
    statement = trust.verify(verdict, expected_id)
    return _load(bundle, expected_id, signature, target, statement)


def load_candidate(
    bundle: bytes, expected_id: str, signature: Signature | None = None, target: Target | None = None
) -> Kernel:
    """Load a kernel that nobody has validated or measured yet: its compiled code runs for every input.

    Runs native code of unknown intent: for the gauntlet's sandbox, builds and tests only.

    Raises:
        KernelCorrupt, KernelUnfit: as `load_kernel`.
    """
    _check_digest(bundle, expected_id)
    return _load(bundle, expected_id, signature, target, None)


def load_exported(bundle: bytes, expected_id: str, target: Target | None = None) -> Kernel:
    """As `load_candidate`, and what runs is the portable graph of the bundle: for whoever judges it.

    Raises:
        KernelCorrupt: as `load_kernel`, or torch cannot read the graph.
    """
    _check_digest(bundle, expected_id)
    return _load(bundle, expected_id, None, target, None, graph=True)


def _check_digest(bundle: bytes, expected_id: str) -> None:
    found = kernel_id_of(bundle)
    if found != expected_id:
        raise KernelCorrupt(expected_id, [f"its bytes have the digest {found}"])


def _load(
    bundle: bytes,
    kernel_id: str,
    signature: Signature | None,
    target: Target | None,
    statement: Statement | None,
    *,
    graph: bool = False,
) -> Kernel:
    opened = unpack(bundle)
    manifest = opened.manifest
    here = _here(manifest) if target is None else target
    pace = None if statement is None else Pace.measured(statement, str(here))
    if signature is not None and manifest.signature != signature:
        raise KernelUnfit(kernel_id, [f"its signature is {manifest.signature}, and {signature} is wanted"])
    plan = _plan(opened, kernel_id)
    use_native = not graph and _compiled_here(manifest, kernel_id, here, pace)
    archives = _archives(opened, kernel_id, (PORTABLE, *((FORWARD, BACKWARD) if use_native else ())))
    parameters = safetensors.torch.load(opened.members[PARAMETERS])
    found = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in parameters.items()}
    if found != {spec.name: (spec.shape, spec.dtype) for spec in manifest.parameters}:
        raise KernelCorrupt(kernel_id, ["its initial parameters are not those that the manifest lists"])
    try:
        with _loading:
            exported = _portable(archives[PORTABLE]) if graph else None
            compiled = _compiled(archives, manifest, pace) if use_native else None
    except Exception as error:  # torch raises all kinds; to the caller it is one refusal
        raise KernelCorrupt(kernel_id, [f"torch cannot load it: {type(error).__name__}: {error!s:.300}"]) from error
    return Kernel(
        kernel_id=kernel_id,
        manifest=manifest,
        plan=plan,
        parameters=parameters,
        compiled=compiled,
        exported=exported,
        nbytes=len(bundle),
    )


def _here(manifest: Manifest) -> Target:
    """This machine as the kernel would see it: a process may have devices of several kinds."""
    try:
        return Target.here(manifest.target.partition("/")[0])
    except InvalidInput:
        return Target.here()


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


def _archives(opened: Bundle, kernel_id: str, names: Sequence[str]) -> dict[str, bytes]:
    """Archives of torch, looked through: the graph also where it is not read here."""
    try:
        return {name: sound_archive(name, opened.members[name]) for name in names}
    except UnsoundArchive as error:
        raise KernelCorrupt(kernel_id, [str(error)]) from error


def _compiled_here(manifest: Manifest, kernel_id: str, here: Target, pace: Pace | None) -> bool:
    if not manifest.tier.compiled:
        return False
    why = ""
    if manifest.target != str(here):
        why = f"it is compiled for {manifest.target}, and this machine is {here}"
    elif pace is not None and not pace.ever:
        why = "nowhere on this machine was it measured to be faster than plain torch"
    if not why:
        return True
    with _said_lock:
        first = (kernel_id, str(here)) not in _said
        _said.add((kernel_id, str(here)))
    if first:
        _log.warning("kernel runs in plain torch", kernel_id=kernel_id, why=why)
    return False


def _portable(data: bytes) -> Callable[..., Tensor]:
    with quiet():
        program = torch.export.load(io.BytesIO(data))
        # The module checks shape and type itself, in words; the program's own guards would do it again on every call.
        return program.module(check_guards=False)


def _compiled(archives: Mapping[str, bytes], manifest: Manifest, pace: Pace | None) -> Compiled:
    return Compiled(native(archives[FORWARD]), native(archives[BACKWARD]), manifest.recalled, pace)


def native(package: bytes) -> Callable[[list[Tensor]], list[Tensor]]:
    """The function of an AOTInductor package that was looked through or built here."""
    from torch import _inductor

    with tempfile.TemporaryDirectory(prefix="esper-kernel-") as folder, quiet():
        path = Path(folder, "kernel.pt2")
        path.write_bytes(package)
        # The loader keeps a copy of its own, which lives as long as the function. What torch wraps around it reads the
        # form of its arguments from JSON on every call.
        run: Callable[[list[Tensor]], list[Tensor]] = _inductor.aoti_load_package(str(path)).loader.boxed_run
    return run
