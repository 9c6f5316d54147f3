"""Kernels: content-addressed bundles, built from blueprints, validated by the gauntlet, verified before loading.

Names are loaded on first use, because half of them need torch and the other half (bundles, targets, verdicts) serve
processes that have none. ``build`` is imported from its own module: ``from esper.kasmina.kernels.build import build``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.kasmina.kernels.bundle import Bundle, Manifest, TensorSpec, Tier, Trial, kernel_id_of, unpack
    from esper.kasmina.kernels.kernel import Compiled, Kernel, KernelModule
    from esper.kasmina.kernels.load import load_candidate, load_exported, load_kernel
    from esper.kasmina.kernels.rejection import KernelCorrupt, KernelRejected, KernelUnfit, KernelUntrusted
    from esper.kasmina.kernels.signing import (
        CheckResult,
        Figure,
        PublicKey,
        SignedVerdict,
        SigningKey,
        Statement,
        TrustStore,
    )
    from esper.kasmina.kernels.target import Target

__all__ = [
    "Bundle",
    "CheckResult",
    "Compiled",
    "Figure",
    "Kernel",
    "KernelCorrupt",
    "KernelModule",
    "KernelRejected",
    "KernelUnfit",
    "KernelUntrusted",
    "Manifest",
    "PublicKey",
    "SignedVerdict",
    "SigningKey",
    "Statement",
    "Target",
    "TensorSpec",
    "Tier",
    "Trial",
    "TrustStore",
    "kernel_id_of",
    "load_candidate",
    "load_exported",
    "load_kernel",
    "unpack",
]

_HOMES = {
    "bundle": ("Bundle", "Manifest", "TensorSpec", "Tier", "Trial", "kernel_id_of", "unpack"),
    "kernel": ("Compiled", "Kernel", "KernelModule"),
    "load": ("load_candidate", "load_exported", "load_kernel"),
    "rejection": ("KernelCorrupt", "KernelRejected", "KernelUnfit", "KernelUntrusted"),
    "signing": ("CheckResult", "Figure", "PublicKey", "SignedVerdict", "SigningKey", "Statement", "TrustStore"),
    "target": ("Target",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
