"""Loading: every unsound, unsigned or unfit kernel is refused with its reasons, before any of its code is touched."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

from esper.kasmina.kernels import (
    KernelCorrupt,
    KernelRejected,
    KernelUnfit,
    KernelUntrusted,
    Tier,
    TrustStore,
    kernel_id_of,
    load_candidate,
    load_kernel,
    unpack,
)
from esper.kasmina.kernels.bundle import pack, write_zip
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import Code

VECTOR = Signature(Layout.VECTOR, 8, 8)


def test_a_validated_kernel_is_loaded(portable_bundle, judge, trust):
    """Digest, verdict and signature in order: the kernel gives modules."""
    kernel_id = kernel_id_of(portable_bundle)
    kernel = load_kernel(portable_bundle, judge(portable_bundle), trust, kernel_id, VECTOR)
    assert (kernel_id, VECTOR, Tier.PORTABLE) == (kernel.id, kernel.signature, kernel.running_tier)
    assert (5, 8) == kernel.instantiate()(torch.randn(5, 8)).shape
    assert len(portable_bundle) == kernel.nbytes


def test_one_changed_byte_is_refused(portable_bundle, judge, trust):
    """A tampered kernel is refused by its digest alone."""
    tampered = portable_bundle[:-1] + bytes([portable_bundle[-1] ^ 1])
    with pytest.raises(KernelCorrupt, match="its bytes have the digest") as caught:
        load_kernel(tampered, judge(portable_bundle), trust, kernel_id_of(portable_bundle), VECTOR)
    assert caught.value.code is Code.DATA_LOSS


@pytest.mark.parametrize("forge", ["unsigned", "rejected", "other kernel", "untrusted"])
def test_a_kernel_that_nobody_validated_is_refused(portable_bundle, judge, trust, forge):
    """No verdict, a rejection, another kernel's verdict or an unknown key: not loaded."""
    verdict = {
        "unsigned": None,
        "rejected": judge(portable_bundle, passed=False),
        "other kernel": judge(portable_bundle, kernel_id="sha256:" + "0" * 64),
        "untrusted": judge(portable_bundle),
    }[forge]
    store = TrustStore() if forge == "untrusted" else trust
    with pytest.raises(KernelUntrusted):
        load_kernel(portable_bundle, verdict, store, kernel_id_of(portable_bundle), VECTOR)


def test_a_kernel_of_another_shape_is_refused(portable_bundle, judge, trust):
    """The refusal names both signatures."""
    wanted = Signature(Layout.VECTOR, 8, 9)
    with pytest.raises(KernelUnfit, match=r"vector:8->8:float32, and vector:8->9:float32 is wanted") as caught:
        load_kernel(portable_bundle, judge(portable_bundle), trust, kernel_id_of(portable_bundle), wanted)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert isinstance(caught.value, KernelRejected)


def test_refusals_cross_process_borders(portable_bundle):
    """A refusal can be pickled with its reasons, since gauntlets run in processes of their own."""
    error = KernelUnfit("sha256:00", ["one", "two"])
    again = pickle.loads(pickle.dumps(error))
    assert (error.reasons, error.public, KernelUnfit) == (again.reasons, again.public, type(again))


def repacked(bundle, *, manifest=None, **members):
    """The bundle with some fields and members replaced, digests right again."""
    opened = unpack(bundle)
    changed = opened.members | {name.replace("__", "."): data for name, data in members.items()}
    return pack(replace(opened.manifest, **(manifest or {})), changed)


def test_nothing_is_loaded_before_everything_is_verified(portable_bundle, judge, trust):
    """Code that would fail to load is never reached while trust or shape is missing; only then is it found wanting."""
    broken = repacked(portable_bundle, portable__pt2=b"this is no program")
    kernel_id = kernel_id_of(broken)
    with pytest.raises(KernelUntrusted):
        load_kernel(broken, None, trust, kernel_id, VECTOR)
    with pytest.raises(KernelUnfit):
        load_kernel(broken, judge(broken), trust, kernel_id, Signature(Layout.VECTOR, 1, 1))
    with pytest.raises(KernelCorrupt, match="it is no archive of torch"):
        load_kernel(broken, judge(broken), trust, kernel_id, VECTOR)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        ({"blueprint_id": "sha256:" + "1" * 64}, "its blueprint is sha256:"),
        ({"causal": False}, "birth or causality"),
        ({"signature": Signature(Layout.VECTOR, 8, 9)}, "parameters of its blueprint are not those of the manifest"),
        ({"signature": Signature(Layout.VECTOR, 8, 8, "float64")}, "not those that the manifest lists"),
    ],
)
def test_a_manifest_that_lies_about_its_members_is_refused(portable_bundle, manifest, complaint):
    """A digest-sound bundle whose parts contradict one another is corrupt."""
    if "float64" in str(manifest.get("signature")):
        parameters = tuple(replace(p, dtype="float64") for p in unpack(portable_bundle).manifest.parameters)
        manifest = manifest | {"parameters": parameters}
    lying = repacked(portable_bundle, manifest=manifest)
    with pytest.raises(KernelCorrupt, match=complaint):
        load_candidate(lying, kernel_id_of(lying))


def test_a_blueprint_that_is_wrong_makes_the_kernel_corrupt(portable_bundle):
    """The IR in the bundle is judged like any other."""
    document = json.loads(unpack(portable_bundle).members["blueprint.json"])
    document["nodes"][0]["op"] = "conv9d"
    wrong = repacked(portable_bundle, blueprint__json=json.dumps(document).encode())
    with pytest.raises(KernelCorrupt, match="'conv9d' is not known"):
        load_candidate(wrong, kernel_id_of(wrong))


def test_a_kernel_for_another_machine_runs_in_plain_torch_and_says_so_once(portable_bundle, capfd):
    """Compiled code of a foreign target is not even opened; training goes on with the blueprint."""
    foreign = repacked_standard(portable_bundle, target="cpu/riscv64/default/torch-2.13")
    kernels = [load_candidate(foreign, kernel_id_of(foreign)) for _ in range(3)]
    assert {Tier.PORTABLE} == {kernel.running_tier for kernel in kernels}
    assert {Tier.STANDARD} == {kernel.manifest.tier for kernel in kernels}
    assert 1 == capfd.readouterr().err.count("kernel runs in plain torch")
    x = torch.randn(4, 8)
    same = load_candidate(portable_bundle, kernel_id_of(portable_bundle)).instantiate()(x)
    assert torch.equal(same, kernels[0].instantiate()(x))


def test_native_code_that_cannot_be_loaded_is_a_refusal(portable_bundle):
    """Garbage where this machine's compiled code should be ends in one refusal, not in a crash."""
    from esper.kasmina.kernels import Target

    broken = repacked_standard(portable_bundle, target=str(Target.here()))
    with pytest.raises(KernelCorrupt, match="torch cannot load it"):
        load_candidate(broken, kernel_id_of(broken))


def test_the_machine_is_that_of_the_kernels_own_kind_of_device(portable_bundle, monkeypatch):
    """Beside a GPU the code for it is what runs, though the process has a CPU too; without one it is foreign."""
    from esper.kasmina.kernels import Target
    from esper.kasmina.kernels.load import native

    gpu, cpu = Target("cuda", "nvidia", "sm_90", "2.13"), Target.here()
    bundle = repacked_standard(portable_bundle, target=str(gpu))
    assert Tier.PORTABLE is load_candidate(bundle, kernel_id_of(bundle)).running_tier
    monkeypatch.setattr(Target, "here", lambda device="cpu": gpu if device == "cuda" else cpu)
    monkeypatch.setattr(f"{native.__module__}.native", lambda package: None)
    assert Tier.STANDARD is load_candidate(bundle, kernel_id_of(bundle)).running_tier


def repacked_standard(bundle, *, target):
    """The bundle as if it had compiled members, whose libraries are garbage."""
    opened = unpack(bundle)
    package = write_zip(
        {"kernel/archive_format": b"pt2", "kernel/data/aotinductor/model/c.wrapper.so": b"\x7fELF garbage"}
    )
    members = opened.members | {"forward.aoti.pt2": package, "backward.aoti.pt2": package}
    return pack(replace(opened.manifest, tier=Tier.STANDARD, target=target), members)
