"""The grown network as plain PyTorch, loaded where there is no Esper."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch

from esper.kasmina._ports import Port
from esper.kasmina.attach import Attachment, SeedModule
from esper.kasmina.blueprints import get
from esper.kasmina.blueprints.module import BlueprintModule
from esper.kasmina.control import SiteDescriptor, SiteKind
from esper.kasmina.seeds import Execution
from esper.kasmina.signature import Layout, Signature
from esper.kasmina.sites import Site, discover, observe
from esper.mesh.errors import Corrupt, InternalError
from esper.tolaria import data, export
from esper.tolaria.attach import Attached, attach, from_bundle
from esper.tolaria.core import Arm
from esper.tolaria.growing import HostNetwork, weights_digest
from tests.services.tolaria.test_worker import grow

FOREIGN = textwrap.dedent(
    """
    import json, sys
    sys.path = [p for p in sys.path if not any(part in p for part in ("/gen", "/runtime", "/services"))]
    sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
    sys.path_hooks = [h for h in sys.path_hooks if "editable" not in repr(h).lower()]
    sys.path_importer_cache.clear()
    try:
        import esper.tolaria
    except ImportError:
        pass
    else:
        sys.exit("esper can be imported here: the test proves nothing")
    import torch
    torch.set_num_threads(1)
    folder = sys.argv[1]
    given = torch.load(folder + "/given.pt", weights_only=True)
    model = torch.export.load(folder + "/model.pt2").module()
    assert torch.equal(model(given["x"]), given["y"]), "predicts something else"
    assert model(given["x"][:1]).shape == (1, 10)
    assert not [name for name in sys.modules if name.split(".")[0] == "esper"]
    print(json.load(open(folder + "/lineage.json"))["adaptations"][0]["kernel_id"])
    """
)


def test_the_export_predicts_identically_where_esper_cannot_be_imported(make_run, kernel_cache):
    """model.pt2 and lineage.json are enough, in a process with torch alone; batches of any size."""
    run_dir = make_run(arm=Arm.GROWN, schedule__epochs=7, artifacts__export=True)
    assert grow(run_dir, kernel_cache) == 0
    config = run_dir.config()
    x = data.load(config.data, 0).test()[0][0]
    with torch.no_grad():
        y = torch.export.load(run_dir.export / "model.pt2").module()(x)
    torch.save({"x": x, "y": y}, run_dir.export / "given.pt")
    child = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(run_dir.export)],
        capture_output=True,
        text=True,
        cwd=run_dir.path,
        check=False,
    )
    assert 0 == child.returncode, child.stderr
    assert kernel_cache.kernel_id == child.stdout.strip()
    weights = safetensors.torch.load_file(run_dir.export / "model.safetensors")
    program = torch.export.load(run_dir.export / "model.pt2")
    assert set(weights) == set(program.state_dict)
    assert all(torch.equal(weights[name], value) for name, value in program.state_dict.items())
    assert json.loads((run_dir.path / "result.json").read_text())["weights_digest"] == weights_digest(weights)
    lineage = json.loads((run_dir.export / "lineage.json").read_text())
    assert "the script germinates here" == lineage["decisions"][0]["explanation"]


def test_an_export_that_differs_from_the_run_is_not_written(make_run, monkeypatch):
    """Logits are compared before anything is written."""
    run_dir = make_run()
    config = run_dir.config()
    network, dataset = HostNetwork(config), data.load(config.data, 0)
    honest = export.plain_network

    def wrong(*args):
        plain = honest(*args)
        with torch.no_grad():
            plain.host.head.bias += 1.0
        return plain

    monkeypatch.setattr(export, "plain_network", wrong)
    with pytest.raises(InternalError, match="difference of 1"):
        export.export_run(run_dir, config, network, dataset)
    assert not run_dir.export.exists()


def test_a_language_model_exports_with_positions_kept(make_run, tmp_path):
    """Tokens in, logits per position out."""
    from esper.tolaria import recipes
    from esper.tolaria.overrides import apply

    (tmp_path / "src").mkdir()
    for number in range(40):
        (tmp_path / "src" / f"m{number}.py").write_text("x = 1\n" * 60)
    config = apply(
        recipes.get("stdlib-lm").build(),
        {"data.dir": str(tmp_path / "src"), "data.context": 16, "data.eval_batches": 2},
    )
    run_dir = make_run()
    network, dataset = HostNetwork(config), data.load(config.data, 0)
    export.export_run(run_dir, config, network, dataset)
    x = dataset.test()[0][0][:5]
    found = torch.export.load(run_dir.export / "model.pt2").module()(x)
    assert (5, 16, 256) == tuple(found.shape)
    assert torch.allclose(network.model(x), found, atol=1e-5)


def _site(kind: SiteKind, source: str = "0", target: str = "0") -> Site:
    descriptor = SiteDescriptor(
        index=0,
        name=target,
        kind=kind,
        granularity="layer",
        module_type="Linear",
        signature=Signature(Layout.VECTOR, 4, 4),
        narrowest_width=4,
        parameters=20,
        depth=0.5,
    )
    port = Port(Layout.VECTOR, 1)
    return Site(descriptor, source, target, port, port, (2, 4), (2, 4))


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_attached_modules_add_in_series_and_in_parallel(alpha):
    """Y + alpha * delta(y), y + alpha * delta(x), and without hooks y again."""
    host = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    delta, x = torch.nn.Linear(4, 4), torch.rand(2, 4)
    plain = host(x)
    first = host[0](x)
    handles = attach(host, _site(SiteKind.SERIES), delta, alpha)
    assert torch.allclose(host[1](first + alpha * delta(first)), host(x))
    for handle in handles:
        handle.remove()
    handles = attach(host, _site(SiteKind.PARALLEL, "0", "1"), delta, alpha)
    assert torch.allclose(plain + alpha * delta(x), host(x))
    for handle in handles:
        handle.remove()
    assert torch.equal(plain, host(x))


@pytest.mark.parametrize("kind", SiteKind)
def test_a_module_at_a_volume_computes_what_the_seed_computed(kind):
    """Three spatial dimensions are folded for the kernel and unfolded again, as in the run."""
    host = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.Conv3d(3, 4, 3, stride=2)).eval()
    x = torch.rand(2, 2, 9, 11, 7)
    found = discover(host, observe(host, (x,))).sites
    site = next(s for s in found if (s.descriptor.name, s.descriptor.kind) == ("1", kind))
    signature = site.descriptor.signature
    delta = BlueprintModule(get("conv_bottleneck").check(signature))
    for parameter in delta.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    seed = SeedModule(delta, site)
    seed.mode = Execution.BLENDED
    seed.alpha.fill_(0.5)
    attachment = Attachment.attach(host, site, seed)
    grown = host(x)
    attachment.detach()
    assert not torch.allclose(host(x), grown)
    attach(host, site, delta, 0.5)
    assert torch.allclose(grown, host(x))


def test_a_module_from_a_bundle_is_the_kernel_at_birth(kernel_cache):
    """Zero output, and a bundle with one other byte is refused."""
    module = from_bundle(kernel_cache.kernel_id, kernel_cache.bundle)
    assert not module(torch.rand(2, 8, 4, 4)).any()
    with pytest.raises(Corrupt, match="digest"):
        from_bundle(kernel_cache.kernel_id, kernel_cache.bundle[:-1] + b"\x01")


def test_attached_documents_are_read_as_written():
    """What a static twin reads is what the grown run wrote."""
    attached = Attached(
        site=_site(SiteKind.SERIES),
        kernel_id="sha256:" + "0" * 64,
        blueprint_name="low_rank",
        learning_rate_scale=3.0,
        newborn_steps=70,
        alpha=0.5,
    )
    assert attached == Attached.from_document(json.loads(json.dumps(attached.document())))
