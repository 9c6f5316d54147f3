"""bundle.*: the bytes are the kernel that the library was told of, and hold data only."""

from collections.abc import Mapping
from typing import Any

from esper.kasmina.kernels.archives import UnsoundArchive, sound_archive
from esper.kasmina.kernels.bundle import BACKWARD, FORWARD, PORTABLE, Bundle, Manifest, kernel_id_of, unpack
from esper.kasmina.kernels.load import load_candidate, load_exported
from esper.kasmina.kernels.rejection import KernelRejected
from esper.kasmina.kernels.target import Target
from esper.urabrask.gauntlet.subject import Refuted, Subject

__all__ = ["Elsewhere", "integrity", "load", "manifest"]


class Elsewhere(Exception):
    """The kernel was compiled for another machine: no judgement is possible here."""


def integrity(data: bytes, kernel_id: str) -> Bundle:
    """Digest, members, and the form of the archives among them.

    Raises:
        Refuted: with every reason found.
    """
    found = kernel_id_of(data)
    if found != kernel_id:
        raise Refuted(f"expected bytes with the digest {kernel_id}, found {found}")
    try:
        opened = unpack(data)
        for name in {PORTABLE, FORWARD, BACKWARD} & set(opened.members):
            sound_archive(name, opened.members[name])
    except KernelRejected as error:
        raise Refuted("; ".join(error.reasons)) from error
    except UnsoundArchive as error:
        raise Refuted(str(error)) from error
    return opened


def manifest(opened: Bundle, told: Mapping[str, Any], here: Target) -> str:
    """Compare the manifest with what the library was told.

    Raises:
        Refuted: they differ.
        Elsewhere: it is compiled for another machine.
    """
    says = facts(opened.manifest)
    wrong = [
        f"{key}: the library was told {told.get(key)}, the manifest says {says.get(key)}"
        for key in sorted({*told, *says})
        if told.get(key) != says.get(key)
    ]
    if wrong:
        raise Refuted("; ".join(wrong))
    if opened.manifest.tier.compiled and opened.manifest.target != str(here):
        raise Elsewhere(f"the kernel is compiled for {opened.manifest.target}, and this machine is {here}")
    return f"{opened.manifest.blueprint_name} {opened.manifest.signature}, tier {opened.manifest.tier.value}"


def facts(held: Manifest) -> dict[str, Any]:
    """What the library knows of a kernel, as its manifest says it."""
    told = {
        "blueprint_id": held.blueprint_id,
        "signature": str(held.signature),
        "tier": held.tier.value,
        "birth": held.birth.value,
        "causal": held.causal,
        "parameters": held.parameter_count,
    }
    return told | {"target": held.target} if held.tier.compiled else told


def load(data: bytes, kernel_id: str, here: Target) -> Subject:
    """Load the candidate: from here on its code runs.

    Raises:
        Refuted: torch or the manifest will not have it.
    """
    try:
        # The graph too: whoever has no esper, or another version of it, relies on it.
        exported = load_exported(data, kernel_id, here)
        kernel = load_candidate(data, kernel_id, target=here)
    except KernelRejected as error:
        raise Refuted("; ".join(error.reasons)) from error
    if kernel.running_tier is not kernel.manifest.tier:
        raise Refuted(
            f"expected its {kernel.manifest.tier.value} code to run, found that {kernel.running_tier.value} does"
        )
    return Subject(kernel if kernel.compiled else exported, kernel.plan, kernel)
