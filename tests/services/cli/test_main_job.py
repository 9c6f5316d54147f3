"""The main job from end to end, with the waiting that a user gets: built, tested, signed, grown, kept, exported."""

import json

import pytest
import torch

from esper.cli.connection import connect
from esper.cli.state import State
from esper.kasmina.kernels.signing import PublicKey, SignedVerdict, TrustStore
from esper.tolaria.core import RunState
from esper.tolaria.rundir import RunDir
from esper.v1 import urza_service_pb2
from tests.services.cli.conftest import wait_for

SETTINGS = {
    # One place and one blueprint: whatever else the library builds meanwhile, equal runs have equal choices.
    "growth.sites": ["body"],
    "growth.kinds": ["parallel"],
    "growth.blueprints": ["conv_bottleneck"],
    "schedule.epochs": 20,
    "control.on_loss": "pause",
    # The controller of a busy machine is slow, not away.
    "control.advise_deadline_s": 60,
}
TRAIN = (
    "train",
    "digits",
    *(part for key, value in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(value)}")),
)
QUIET = {"ESPER_LOGGING__LEVEL": "error"}


def boundaries(run_dir):
    """Boundaries that a run has passed, from the lines that it leaves."""
    path = run_dir.path / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if '"kind": "boundary"' in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_seed_lives_to_be_exported_and_the_death_of_the_mesh_changes_nothing(tmp_path, cli, esper):
    """A seed of a library kernel, signed by the engine, is fossilized and exported as plain torch.

    The same run, whose mesh is killed in the midst and started again, waits for it and ends with the same weights.
    """
    home = tmp_path / "h"
    first = esper("--home", home, "up", "--port", 0, "--json", **QUIET)
    address = first.ready()["address"]
    report = json.loads(cli("--mesh", address, *TRAIN, "--report", tmp_path / "report", "--json").stdout)
    kept = [seed for seed in report["growth"] if seed["outcome"] == "fossilized"]
    assert [("body", "conv_bottleneck")] == [(seed["site"], seed["blueprint_name"]) for seed in kept]
    assert report["result"]["kernel_ids"] == [kept[0]["kernel_id"]]
    assert {"germinate", "advance"} <= {decision["action"] for decision in report["decisions"]}

    with connect(State(mesh=address, environ={})) as mesh:
        request = urza_service_pb2.GetKernelRequest(kernel=kept[0]["kernel_id"])
        verdict = mesh.urza.GetKernel(request, timeout=30).kernel.verdict
        keys = mesh.urza.ListSigningKeys(urza_service_pb2.ListSigningKeysRequest(), timeout=30).keys
    trust = TrustStore([PublicKey(key.public_key, key.revoked) for key in keys])
    signed = SignedVerdict(verdict.statement, verdict.signature, verdict.key_id)
    assert trust.verify(signed, kept[0]["kernel_id"]).passed

    follower = esper("--mesh", address, *TRAIN)
    run_dir = RunDir(home / "tolaria" / "runs" / follower.line_with("grown").split()[0])
    wait_for(lambda: len(boundaries(run_dir)) >= 3, "growth", 300)
    first.kill()
    first.wait(30)
    state = wait_for(lambda: (s := run_dir.status()).state is not RunState.RUNNING and s.state, "the pause", 120)
    assert RunState.PAUSED is state
    again = esper("--home", home, "up", "--port", address.rpartition(":")[2], "--json", **QUIET)
    assert address == again.ready()["address"]
    resumed = json.loads(cli("--mesh", address, "runs", "resume", run_dir.run_id, "--json").stdout)
    assert report["result"]["weights_digest"] == resumed["result"]["weights_digest"]
    assert report["result"]["kernel_ids"] == resumed["result"]["kernel_ids"]
    cli("--mesh", address, "export", run_dir.run_id, "--to", tmp_path / "out")
    (adaptation,) = json.loads((tmp_path / "out" / "lineage.json").read_text(encoding="utf-8"))["adaptations"]
    assert (kept[0]["kernel_id"], "fossilized") == (adaptation["kernel_id"], adaptation["outcome"])
    assert ["GERMINATED", "FOSSILIZED"] == [adaptation["stages"][at]["stage"] for at in (0, -1)]
    model = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert (3, 10) == model(torch.zeros(3, 1, 8, 8)).shape
