"""bundle.*: the bytes are the kernel that the library was told of, and hold data only."""

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from esper.kasmina.kernels.bundle import Bundle, Manifest, Tier, kernel_id_of, unpack
from esper.kasmina.kernels.load import load_candidate
from esper.kasmina.kernels.rejection import KernelRejected
from esper.kasmina.kernels.target import Target
from esper.urabrask.gauntlet.subject import Refuted, Subject

__all__ = ["Elsewhere", "integrity", "load", "manifest"]

MAX_INNER_BYTES = 1 << 30
"""Bytes that the archives inside a bundle may hold unpacked."""
_ARCHIVES = (".pt2",)
_PICKLE_PROTOCOLS = tuple(bytes((0x80, version)) for version in range(2, 6))


class Elsewhere(Exception):
    """The kernel was compiled for another machine: no judgement is possible here."""


def integrity(data: bytes, kernel_id: str) -> Bundle:
    """Digest, members, and what the archives among them hold.

    Raises:
        Refuted: with every reason found.
    """
    found = kernel_id_of(data)
    if found != kernel_id:
        raise Refuted(f"expected bytes with the digest {kernel_id}, found {found}")
    try:
        opened = unpack(data)
    except KernelRejected as error:
        raise Refuted("; ".join(error.reasons)) from error
    reasons = [
        f"{name}: {reason}"
        for name, content in opened.members.items()
        if name.endswith(_ARCHIVES)
        for reason in _archive(content)
    ]
    if reasons:
        raise Refuted("; ".join(reasons[:8]))
    return opened


def _archive(content: bytes) -> list[str]:
    """What is wrong with an archive of torch: paths that leave it, pickles, more than it may hold."""
    reasons, total = [], 0
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                path = PurePosixPath(entry.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in entry.filename:
                    reasons.append(f"entry {entry.filename!r:.80} leaves its folder")
                total += entry.file_size
                if total > MAX_INNER_BYTES:
                    return [*reasons, f"expected at most {MAX_INNER_BYTES} bytes inside, found more"]
                if path.suffix in {".pkl", ".pickle"} or _is_pickle(archive.read(entry)):
                    reasons.append(f"entry {entry.filename!r:.80} is a pickle")
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        reasons.append(f"it is no archive: {error!s:.120}")
    return reasons


def _is_pickle(data: bytes) -> bool:
    """Whether bytes begin like a pickle and parse as one to its end; native code merely begins like one, by chance."""
    if data[:2] not in _PICKLE_PROTOCOLS:
        return False
    try:
        return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(data))
    except Exception:  # noqa: BLE001  # pickletools raises all kinds on bytes that are no pickle
        return False


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
    if opened.manifest.tier is not Tier.PORTABLE and opened.manifest.target != str(here):
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
    return told if held.tier is Tier.PORTABLE else told | {"target": held.target}


def load(data: bytes, kernel_id: str, here: Target) -> Subject:
    """Load the candidate: from here on its code runs.

    Raises:
        Refuted: torch or the manifest will not have it.
    """
    try:
        kernel = load_candidate(data, kernel_id, target=here)
    except KernelRejected as error:
        raise Refuted("; ".join(error.reasons)) from error
    if kernel.running_tier is not kernel.manifest.tier:
        raise Refuted(
            f"expected its {kernel.manifest.tier.value} code to run, found that {kernel.running_tier.value} does"
        )
    return Subject(kernel, kernel.plan)
