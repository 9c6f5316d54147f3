"""The one file that a kernel is: a deterministic zip of a manifest and the members that it lists. Torch-free.

::

    manifest.json           canonical JSON: what the kernel is, and size and digest of every other member
    blueprint.json          canonical IR of the blueprint
    parameters.safetensors  initial parameters
    portable.pt2            torch.export program of ``f(x, *parameters)``
    forward.aoti.pt2        AOTInductor package, for the target: ``(x, *parameters) -> (delta, *saved)``
    backward.aoti.pt2       the same: ``(grad, *recalled, *saved) -> (grad_x, *grad_parameters)``

The last two belong to the compiled tiers.
Members are stored without compression and with a fixed time, so equal members give equal bytes; the kernel's id is the
SHA-256 of those bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from esper.kasmina.blueprints.ir import Birth, Blueprint
from esper.kasmina.kernels.rejection import KernelCorrupt
from esper.kasmina.signature import Signature
from esper.mesh.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ANY_TARGET",
    "MAX_BUNDLE_BYTES",
    "Bundle",
    "Manifest",
    "TensorSpec",
    "Tier",
    "Trial",
    "kernel_id_of",
    "pack",
    "unpack",
]

FORMAT = 2
"""1 had compiled functions that shared nothing but their inputs; kernels of that form are built again."""
MAX_BUNDLE_BYTES = 1 << 30
ANY_TARGET = "any"
"""Target of a portable kernel."""
_MANIFEST, BLUEPRINT, PARAMETERS = "manifest.json", "blueprint.json", "parameters.safetensors"
PORTABLE, FORWARD, BACKWARD = "portable.pt2", "forward.aoti.pt2", "backward.aoti.pt2"
_EPOCH = (1980, 1, 1, 0, 0, 0)


class Tier(StrEnum):
    """How much effort a build spent."""

    PORTABLE = "portable"
    """Exported graph only."""
    STANDARD = "standard"
    """Ahead-of-time compiled forward and backward for one target, and the exported graph."""
    AGGRESSIVE = "aggressive"
    """As `STANDARD`, of several ways to compile the one that was measured to be the fastest on the target."""

    @property
    def compiled(self) -> bool:
        """Whether such a bundle holds native code."""
        return self is not Tier.PORTABLE

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members of such a bundle, the manifest excepted."""
        common = (BLUEPRINT, PARAMETERS, PORTABLE)
        return (*common, FORWARD, BACKWARD) if self.compiled else common


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter of the compiled functions."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to compile a kernel, measured by the build on its target."""

    variant: str
    positions: int
    """Of the input that was tried: samples, or samples times tokens or pixels."""
    ratio: float
    """Time of forward and backward over that of plain torch: median over interleaved pairs."""
    noise: float
    """Half the interquartile range of these ratios, as a share of their median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a kernel is; everything that can be known without loading it."""

    blueprint_id: str
    blueprint_name: str
    signature: Signature
    birth: Birth
    causal: bool
    tier: Tier
    target: str
    """``str(Target)`` of the compiled functions, or `ANY_TARGET`."""
    parameters: tuple[TensorSpec, ...]
    """In the order in which the compiled functions take them, after `x`."""
    parameter_count: int
    """Trainable scalars."""
    flops_per_position: int
    """Of the forward; what depends on the number of positions is counted at 64 of them."""
    seed: int
    """Of the initial parameters."""
    toolchain: Mapping[str, str]
    """Versions of what built it."""
    variant: str = ""
    """How the compiled functions were made; empty for the portable tier."""
    recalled: tuple[int, ...] = ()
    """Which inputs of the compiled forward the backward takes, after the gradient and before what was saved."""
    trials: tuple[Trial, ...] = ()
    """What the build measured before it chose, tier aggressive."""

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "format": FORMAT,
            "blueprint_id": self.blueprint_id,
            "blueprint_name": self.blueprint_name,
            "signature": str(self.signature),
            "birth": self.birth.value,
            "causal": self.causal,
            "tier": self.tier.value,
            "target": self.target,
            "parameters": [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype} for p in self.parameters],
            "parameter_count": self.parameter_count,
            "flops_per_position": self.flops_per_position,
            "seed": self.seed,
            "toolchain": dict(self.toolchain),
            "variant": self.variant,
            "recalled": list(self.recalled),
            "trials": [asdict(trial) for trial in self.trials],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Manifest:
        """Read `document`.

        Raises:
            KeyError, TypeError, ValueError, EsperError: it is of another form.
        """
        if document["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {document['format']!r:.20}: have it built again")
        return cls(
            blueprint_id=str(document["blueprint_id"]),
            blueprint_name=str(document["blueprint_name"]),
            signature=Signature.parse(document["signature"]),
            birth=Birth(document["birth"]),
            causal=bool(document["causal"]),
            tier=Tier(document["tier"]),
            target=str(document["target"]),
            parameters=tuple(
                TensorSpec(str(p["name"]), tuple(int(n) for n in p["shape"]), str(p["dtype"]))
                for p in document["parameters"]
            ),
            parameter_count=int(document["parameter_count"]),
            flops_per_position=int(document["flops_per_position"]),
            seed=int(document["seed"]),
            toolchain={str(key): str(value) for key, value in document["toolchain"].items()},
            variant=str(document["variant"]),
            recalled=tuple(int(n) for n in document["recalled"]),
            trials=tuple(Trial(**trial) for trial in document["trials"]),
        )


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: every member verified against the manifest."""

    manifest: Manifest
    members: Mapping[str, bytes]
    """By name, the manifest excepted."""

    @property
    def blueprint(self) -> Blueprint:
        """The blueprint that it was built from."""
        return Blueprint.from_json(self.members[BLUEPRINT])


def kernel_id_of(bundle: bytes) -> str:
    """``sha256:`` and 64 hexadecimal digits of the bytes."""
    return "sha256:" + hashlib.sha256(bundle).hexdigest()


def pack(manifest: Manifest, members: Mapping[str, bytes]) -> bytes:
    """The bytes of a bundle; equal arguments give equal bytes."""
    assert set(members) == set(manifest.tier.members)
    listing = {name: {"size": len(data), "sha256": _digest(data)} for name, data in members.items()}
    document = manifest.document() | {"members": listing}
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return write_zip({_MANIFEST: text} | {name: members[name] for name in manifest.tier.members})


def write_zip(members: Mapping[str, bytes]) -> bytes:
    """A zip of stored members in the order given, with nothing in it that depends on time or machine."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def unpack(bundle: bytes) -> Bundle:
    """Open a bundle and verify that every member is the one that the manifest lists.

    Raises:
        KernelCorrupt: it is no bundle, or a member is missing, foreign, compressed or altered; with every reason.
    """
    kernel_id = kernel_id_of(bundle)
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise KernelCorrupt(kernel_id, [f"expected a bundle of at most {MAX_BUNDLE_BYTES} bytes, found {len(bundle)}"])
    try:
        members = _members(bundle)
        document = json.loads(members.pop(_MANIFEST))
        manifest = Manifest.from_document(document)
        listing = dict(document["members"])
        reasons = _differences(manifest, listing, members)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise KernelCorrupt(kernel_id, [f"it is no kernel bundle: {type(error).__name__} {error!s:.200}"]) from error
    except EsperError as error:
        raise KernelCorrupt(kernel_id, [f"its manifest is malformed: {error.public}"]) from error
    if reasons:
        raise KernelCorrupt(kernel_id, reasons)
    return Bundle(manifest, members)


def _members(bundle: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        # Stored members cannot swell when read, and a name given twice would be read differently by different readers.
        if len(set(names)) != len(names) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("expected stored members with distinct names")
        return {name: archive.read(name) for name in names}


def _differences(manifest: Manifest, listing: Mapping[str, Any], members: Mapping[str, bytes]) -> list[str]:
    expected = set(manifest.tier.members)
    reasons = [f"member {name} is missing" for name in sorted(expected - set(members))]
    reasons += [
        f"member {name!r:.60} does not belong to tier {manifest.tier}" for name in sorted(set(members) - expected)
    ]
    for name in sorted(expected & set(members)):
        if listing[name] != {"size": len(members[name]), "sha256": _digest(members[name])}:
            reasons.append(f"member {name} is not the one that the manifest lists")
    return reasons


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
