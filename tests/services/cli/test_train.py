"""Training from the command: one run, a comparison, interrupts, resumes, export, and what a user does wrong."""

import json
import signal
import subprocess
import sys
import threading

import grpc
import pytest

from esper.cli.artifacts import fetch_all
from esper.cli.connection import Mesh, connect
from esper.cli.live import state_name
from esper.cli.state import State
from esper.cli.train import parse_overrides
from esper.mesh.errors import Corrupt, InvalidInput
from esper.v1 import blob_pb2, tolaria_service_pb2
from tests.services.cli.conftest import QUICK, wait_for

LEAN = (*QUICK, "--set", "artifacts.export=false")
LONG = ("--set", "schedule.epochs=900", "--set", "control.prepare_wait_s=0")


def test_a_run_with_its_report(finished_run):
    """`train --json` writes progress to standard error, the report to standard output, and the page to the folder."""
    run_id, done, folder = finished_run
    report = json.loads(done.stdout)
    assert ("run", "grown", "digits") == (report["kind"], report["arm"], report["recipe"])
    assert run_id in done.stderr
    assert "succeeded" in done.stderr
    assert {"report.json", "report.html"} == {path.name for path in folder.iterdir()}


def test_runs_are_listed_and_shown(mesh_cli, finished_run):
    """A finished run is in the list and shown with figures and files; scripts get JSON."""
    run_id = finished_run[0]
    assert run_id in mesh_cli("runs", "list", "--state", "succeeded").stdout
    assert run_id in {run["id"] for run in json.loads(mesh_cli("runs", "list", "--json", "--limit", 400).stdout)}
    shown = mesh_cli("runs", "show", run_id).stdout
    for part in ("succeeded", "digits, seed 0", "parameters", "weights     sha256:", "export/model.pt2", "report.html"):
        assert part in shown
    document = json.loads(mesh_cli("runs", "show", run_id, "--json").stdout)
    assert "export/model.safetensors" in {artifact["name"] for artifact in document["artifacts"]}
    assert "expected one of preparing" in mesh_cli("runs", "list", "--state", "dancing", code=2).stderr
    assert "no runs" in mesh_cli("runs", "list", "--state", "interrupted").stdout


def test_a_finished_run_is_watched_and_asked_in_vain(mesh_cli, finished_run):
    """Watching it ends at once with 0; it cannot be paused, resumed or stopped any more, and says why."""
    run_id = finished_run[0]
    assert "succeeded" in mesh_cli("runs", "watch", run_id).stdout
    assert run_id == json.loads(mesh_cli("runs", "watch", run_id, "--json").stdout)["id"]
    assert "RUN_NOT_RUNNING" in mesh_cli("runs", "pause", run_id, code=5).stderr
    assert "RUN_NOT_RESUMABLE" in mesh_cli("runs", "resume", run_id, code=5).stderr
    assert "RUN_FINISHED" in mesh_cli("runs", "stop", run_id, code=5).stderr
    assert "RUN_NOT_FOUND" in mesh_cli("runs", "watch", "digits-none", code=3).stderr


def test_export_loads_without_esper(mesh_cli, finished_run, tmp_path):
    """The exported program predicts in a process that has torch and imports nothing of ours."""
    listed = mesh_cli("export", finished_run[0], "--to", tmp_path / "out").stdout
    assert "model.pt2" in listed
    assert {"model.pt2", "model.safetensors", "lineage.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "assert (5, 10) == model(torch.zeros(5, 1, 8, 8)).shape\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'esper']"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "out" / "model.pt2"], check=True, timeout=120
    )
    files = json.loads(mesh_cli("export", finished_run[0], "--to", tmp_path / "again", "--json").stdout)["files"]
    assert 3 == len(files)
    assert "RUN_NOT_FOUND" in mesh_cli("export", "digits-none", code=3).stderr
    (tmp_path / "file").touch()
    refused = mesh_cli("export", finished_run[0], "--to", tmp_path / "file" / "out", code=1).stderr
    assert f"error {tmp_path}/file/out" in refused
    assert "Not a directory (FILE_ERROR)" in refused


def test_a_comparison_over_a_remote_mesh(cli, running_mesh, tmp_path):
    """`train --compare` knows nothing of the mesh but its address; it gives every arm, the differences, one verdict."""
    shown = cli(
        "--mesh", running_mesh.address, "train", "digits", "--compare", "--seeds", 1, *LEAN, "--report", tmp_path
    )
    for part in (
        "grown - host",
        "grown - static",
        "grown the host, growing",
        "static",
        f"report: {tmp_path}/report.html",
    ):
        assert part in shown.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert ["grown", "host", "static"] == [arm["arm"] for arm in report["arms"]]
    assert report["verdict"] in shown.stdout
    (grown,) = (
        path.name for path in (tmp_path / "runs").iterdir() if (path / "report.json").exists() and is_grown(path)
    )
    group = json.loads(cli("--mesh", running_mesh.address, "runs", "show", grown, "--json").stdout)["spec"]["group"]
    assert group in cli("--mesh", running_mesh.address, "runs", "show", grown).stdout
    later = ("runs", "compare", group, "--report", tmp_path / "later", "--json")
    assert report == json.loads(cli("--mesh", running_mesh.address, *later).stdout)
    assert (tmp_path / "later" / "report.html").exists()
    assert "GROUP_NOT_FOUND" in cli("--mesh", running_mesh.address, "runs", "compare", "digits-none", code=3).stderr


def is_grown(run_dir):
    """Whether a folder holds the report of a grown run."""
    return json.loads((run_dir / "report.json").read_text(encoding="utf-8"))["arm"] == "grown"


def test_interrupted_paused_resumed_stopped(mesh_cli, running_mesh, client, esper):
    """Ctrl-C pauses the run and says how to go on; resumed and watched no more, it goes on; stopped, it ends."""
    home = running_mesh.home
    trainer = esper("--home", home, "train", "digits", "--seed", 5, *LONG)
    run_id = trainer.line_with("running").split()[0]
    status, out, error = trainer.end(signal.SIGINT)
    assert 130 == status
    assert f"paused; go on with: esper runs resume {run_id}" in error
    assert "Traceback" not in out + error
    assert "paused" == state_of_run(client, run_id)
    assert "is paused" in mesh_cli("runs", "pause", run_id).stdout
    assert "CHECKPOINT_NOT_FOUND" in mesh_cli("runs", "resume", run_id, "--boundary", 800, code=3).stderr
    assert "no export" in mesh_cli("export", run_id, code=3).stderr

    resumed = esper("--home", home, "runs", "resume", run_id)
    resumed.line_with("running")
    assert 130 == resumed.end(signal.SIGINT)[0]
    assert "running" == state_of_run(client, run_id)
    watcher = esper("--home", home, "runs", "watch", run_id)
    watcher.line_with("running")
    assert f"{run_id} stopped" in mesh_cli("runs", "stop", run_id).stdout
    shown, _ = watcher.communicate(timeout=30)
    assert 1 == watcher.returncode
    assert "stopped" in shown
    assert "RUN_STATE_STOPPED" == json.loads(mesh_cli("runs", "stop", run_id, "--json").stdout)["state"]


def state_of_run(client, run_id):
    """The state as people write it."""
    return state_name(run_of(client, run_id))


def test_a_run_resumed_to_its_end(mesh_cli, client):
    """`train` ends with 0 when someone else pauses its run, and says how to go on; `runs resume` follows to the end."""
    listing = tolaria_service_pb2.ListRunsRequest()

    def pause_when_there():
        found = wait_for(
            lambda: [run for run in client.tolaria.ListRuns(listing, timeout=5).runs if run.spec.seed == 77], "the run"
        )
        client.tolaria.PauseRun(tolaria_service_pb2.PauseRunRequest(run_id=found[0].id), timeout=5)

    other = threading.Thread(target=pause_when_there)
    other.start()
    done = mesh_cli("train", "digits", "--seed", 77, *LEAN)
    other.join()
    run_id = done.stderr.rpartition("esper runs resume ")[2].strip()
    assert f"run {run_id} paused" in done.stderr
    assert run_id == json.loads(mesh_cli("runs", "resume", run_id, "--json").stdout)["id"]
    assert "succeeded" == state_of_run(client, run_id)


def test_a_comparison_whose_grown_run_does_not_succeed(mesh_cli, running_mesh, client, esper):
    """The command ends once every run has: the static twin, which would wait for ever, pauses with its grown run."""
    trainer = esper("--home", running_mesh.home, "train", "digits", "--compare", "--seeds", 1, *LONG)
    static = trainer.line_with("waits for run").split()[0]
    twin = run_of(client, static)
    grown = twin.spec.reference_run_id
    listing = tolaria_service_pb2.ListRunsRequest(group=twin.spec.group)
    ids = {run.id for run in client.tolaria.ListRuns(listing, timeout=5).runs}
    assert f"waits for run {grown}" == twin.progress.phase
    (host,) = ids - {static, grown}
    for run_id in (host, grown):
        client.tolaria.PauseRun(tolaria_service_pb2.PauseRunRequest(run_id=run_id), timeout=5)
    _, error = trainer.communicate(timeout=120)
    assert 0 == trainer.returncode
    for run_id in ids:
        assert f"run {run_id} paused\ngo on with: esper runs resume {run_id}" in error
    assert f"report with: esper runs compare {twin.spec.group}" in error
    assert "found 3 of 3 that have not" in mesh_cli("runs", "compare", twin.spec.group, code=5).stderr
    assert f"waits for run {grown}, which is paused" == resumed_phase(client, static)
    for run_id in (static, host, grown):  # the twin first: without the run that it waits for, it fails by itself
        client.tolaria.StopRun(tolaria_service_pb2.StopRunRequest(run_id=run_id), timeout=30)
    assert "COMPARISON_STOPPED" in mesh_cli("runs", "compare", twin.spec.group, code=5).stderr


def run_of(client, run_id):
    """The run as it is now."""
    return client.tolaria.GetRun(tolaria_service_pb2.GetRunRequest(run_id=run_id), timeout=5).run


def resumed_phase(client, run_id):
    """What a run does right after it was resumed."""
    request = tolaria_service_pb2.ResumeRunRequest(run_id=run_id)
    return client.tolaria.ResumeRun(request, timeout=5).run.progress.phase


def test_a_mesh_that_asks_for_tokens(cli, tmp_path, esper):
    """Commands on its home, or with its secret, are clients; so are training processes; nobody else is let in."""
    strict = tmp_path / "strict.toml"
    strict.write_text('schema_version = 1\n[auth]\nanonymous_role = "none"\n', encoding="utf-8")
    address = esper("--config", strict, "--home", tmp_path / "h", "up", "--port", 0, "--json").ready()["address"]
    asked = ("--set", "control.advise_deadline_s=60", "--set", "artifacts.export=false")
    cli("--config", strict, "--home", tmp_path / "h", "train", "digits", *QUICK, *asked)
    (history,) = (tmp_path / "h" / "tolaria" / "runs").glob("*/history.json")
    assert [True] == [entry["control_plane"] for entry in json.loads(history.read_text(encoding="utf-8"))]
    assert "valid identity token" in cli("--mesh", address, "runs", "list", code=5).stderr
    secret = (tmp_path / "h" / "auth.key").read_text(encoding="utf-8")
    strict.write_text(f'schema_version = 1\n[auth]\nsecret = "{secret}"\n', encoding="utf-8")
    assert "SUCCEEDED" in cli("--config", strict, "--mesh", address, "runs", "list", "--json").stdout


def test_what_a_user_does_wrong(mesh_cli, tmp_path):
    """A wrong recipe, path or value, and missing data, each name the thing and what was expected."""
    assert "expected one of cifar10, digits, stdlib-lm" in mesh_cli("train", "digit", code=3).stderr
    assert "did you mean 'epochs'" in mesh_cli("train", "digits", "--set", "schedule.epoch=3", code=5).stderr
    assert "schedule.epochs" in mesh_cli("train", "digits", "--set", "schedule.epochs=many", code=5).stderr
    assert "use --seed" in mesh_cli("train", "digits", "--set", "seed=7", code=5).stderr
    assert "--compare" in mesh_cli("train", "digits", "--seeds", 5, code=2).stderr
    (tmp_path / "file").touch()
    refused = mesh_cli("train", "digits", "--report", tmp_path / "file" / "report", code=2).stderr
    assert f"cannot be written to {tmp_path}/file/report: Not a directory" in refused
    assert "--set: expected KEY=VALUE" in mesh_cli("train", "digits", "--set", "epochs", code=2).stderr
    assert "--data-dir" in mesh_cli("train", "cifar10", code=5).stderr
    missing = mesh_cli("train", "cifar10", "--data-dir", tmp_path, code=5).stderr
    assert "DATA_MISSING" in missing
    assert str(tmp_path) in missing


def test_a_run_that_fails(mesh_cli, tmp_path):
    """A run that ends with an error ends the command with 1 and the error."""
    (tmp_path / "empty.py").touch()
    failed = mesh_cli("train", "stdlib-lm", "--set", f"data.dir={tmp_path}", *QUICK, code=1)
    assert "failed" in failed.stderr


def test_overrides():
    """Values are JSON where they are JSON, else text."""
    told = parse_overrides(["a.b=3", "c=[1, 2]", "d=text", "e=x=y", "f="])
    assert {"a.b": 3, "c": [1, 2], "d": "text", "e": "x=y", "f": ""} == told
    with pytest.raises(InvalidInput):
        parse_overrides(["=3"])


class Files:
    """A Tolaria that sends what it is given; wrong bytes are hard to get from a right one."""

    def __init__(self, name, digest):
        self.name, self.digest = name, digest

    def ListArtifacts(self, request, timeout):  # noqa: N802  # the contract's name
        return tolaria_service_pb2.ListArtifactsResponse(artifacts=[{"name": self.name}])

    def DownloadArtifact(self, request, timeout):  # noqa: N802  # the contract's name
        yield tolaria_service_pb2.DownloadArtifactResponse(artifact={"name": self.name})
        yield tolaria_service_pb2.DownloadArtifactResponse(chunk=blob_pb2.BlobChunk(data=b"bytes"))
        yield tolaria_service_pb2.DownloadArtifactResponse(digest=blob_pb2.BlobDigest(digest=self.digest))


def test_a_download_is_whole_and_stays_in_its_folder(tmp_path):
    """Bytes without their digest, and names that lead elsewhere, are refused; nothing is left of them."""
    with grpc.insecure_channel("127.0.0.1:9") as channel:
        mesh = Mesh("", channel)
        mesh.tolaria = Files("a.json", "sha256:00")
        with pytest.raises(Corrupt, match="expected sha256:00"):
            fetch_all(mesh, "run", tmp_path)
        mesh.tolaria = Files("../a.json", "sha256:00")
        with pytest.raises(InvalidInput, match="below the run's folder"):
            fetch_all(mesh, "run", tmp_path)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_goes_on_while_the_mesh_restarts(tmp_path, esper):
    """A command follows its run through a mesh that is killed and started again there; the run never stopped."""
    home, quiet = tmp_path / "h", {"ESPER_LOGGING__LEVEL": "error"}
    first = esper("--home", home, "up", "--port", 0, "--json", **quiet)
    address = first.ready()["address"]
    trainer = esper("--mesh", address, "train", "digits", *LONG)
    run_id = trainer.line_with("running").split()[0]
    first.kill()
    first.wait(30)
    again = esper("--home", home, "up", "--port", address.rpartition(":")[2], "--json", **quiet)
    assert address == again.ready()["address"]
    with connect(State(mesh=address, environ={})) as client:
        wait_for(lambda: state_of_run(client, run_id) == "running", "the run in the new mesh")
    status, _, error = trainer.end(signal.SIGTERM)
    assert 130 == status
    assert f"paused; go on with: esper runs resume {run_id}" in error
    assert 0 == again.end()[0]
