"""The bundle: equal contents give equal bytes, and no byte can change unnoticed."""

import io
import json
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.kasmina.kernels import KernelCorrupt, Tier, kernel_id_of, unpack
from esper.kasmina.kernels.bundle import MAX_BUNDLE_BYTES, pack, write_zip
from esper.mesh.errors import Code


def members_of(bundle):
    """Every member of a zip."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def refusal(bundle):
    """Why a bundle cannot be opened."""
    with pytest.raises(KernelCorrupt) as caught:
        unpack(bundle)
    assert caught.value.code is Code.DATA_LOSS
    return "; ".join(caught.value.reasons)


def test_packing_what_was_unpacked_gives_the_same_bytes(portable_bundle):
    """A bundle is a function of manifest and members."""
    opened = unpack(portable_bundle)
    assert portable_bundle == pack(opened.manifest, opened.members)


def test_the_manifest_tells_what_the_kernel_is(portable_bundle):
    """Everything that a library or controller asks about stands in the manifest."""
    opened = unpack(portable_bundle)
    manifest = opened.manifest
    assert opened.blueprint.id == manifest.blueprint_id
    assert ("bottleneck_mlp", "vector:8->8:float32", "random", True) == (
        manifest.blueprint_name,
        str(manifest.signature),
        manifest.birth,
        manifest.causal,
    )
    assert (Tier.PORTABLE, "any") == (manifest.tier, manifest.target)
    assert ["norm.weight", "norm.bias", "down.weight", "down.bias", "out.weight", "out.bias"] == [
        p.name for p in manifest.parameters
    ]
    assert manifest.parameter_count == sum(1 if not p.shape else _product(p.shape) for p in manifest.parameters)
    assert {"esper", "torch"} <= set(manifest.toolchain)


def _product(shape):
    total = 1
    for n in shape:
        total *= n
    return total


def test_bundles_hold_no_time_and_no_compression(portable_bundle):
    """Nothing in the archive depends on when it was written."""
    with zipfile.ZipFile(io.BytesIO(portable_bundle)) as archive:
        assert {(1980, 1, 1, 0, 0, 0)} == {entry.date_time for entry in archive.infolist()}
        assert {zipfile.ZIP_STORED} == {entry.compress_type for entry in archive.infolist()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_byte_is_ever_the_same_kernel(portable_bundle, data):
    """Any flipped bit gives another id, and mostly cannot even be opened."""
    at = data.draw(st.integers(0, len(portable_bundle) - 1))
    bit = data.draw(st.integers(0, 7))
    tampered = bytearray(portable_bundle)
    tampered[at] ^= 1 << bit
    assert kernel_id_of(bytes(tampered)) != kernel_id_of(portable_bundle)
    try:
        opened = unpack(bytes(tampered))
    except KernelCorrupt:
        return
    # What still opens differs in the archive's own bookkeeping or in the manifest, never in a member.
    assert unpack(portable_bundle).members == opened.members


def test_altered_missing_and_foreign_members_are_all_named(portable_bundle):
    """Every difference from the manifest is a reason of its own."""
    members = members_of(portable_bundle)
    members["portable.pt2"] += b"!"
    del members["parameters.safetensors"]
    members["native.so"] = b"\x7fELF"
    reasons = refusal(write_zip(members))
    assert "member parameters.safetensors is missing" in reasons
    assert "member 'native.so' does not belong to tier portable" in reasons
    assert "member portable.pt2 is not the one that the manifest lists" in reasons


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"not a zip at all", write_zip({"a": b"b"}), write_zip({"manifest.json": b"3"})]
)
def test_other_files_are_no_bundles(data):
    """Anything else is refused in one sentence."""
    assert "it is no kernel bundle" in refusal(data)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("format", 1, "expected format 2, found 1: have it built again"),
        ("tier", "reckless", "reckless"),
        ("tier", "aggressive", "member forward.aoti.pt2 is missing"),
        ("signature", "cube:1->1:float32", "manifest is malformed"),
        ("toolchain", 3, "no kernel bundle"),
    ],
)
def test_malformed_manifests_are_refused(portable_bundle, key, value, complaint):
    """The manifest is read strictly."""
    members = members_of(portable_bundle)
    document = json.loads(members["manifest.json"]) | {key: value}
    assert complaint in refusal(write_zip(members | {"manifest.json": json.dumps(document).encode()}))


def test_compressed_and_doubled_members_are_refused(portable_bundle):
    """A member that swells when read, or stands there twice, is not opened."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members_of(portable_bundle).items():
            archive.writestr(name, data)
    assert "expected stored members" in refusal(buffer.getvalue())
    doubled = io.BytesIO(portable_bundle)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(doubled, "a") as archive:
        archive.writestr("portable.pt2", b"other")
    assert "distinct names" in refusal(doubled.getvalue())


def test_oversized_bundles_are_not_opened(monkeypatch, portable_bundle):
    """There is a ceiling, looked at before anything is read."""
    assert MAX_BUNDLE_BYTES == 1 << 30
    monkeypatch.setattr("esper.kasmina.kernels.bundle.MAX_BUNDLE_BYTES", 1000)
    assert "at most 1000 bytes" in refusal(portable_bundle)
