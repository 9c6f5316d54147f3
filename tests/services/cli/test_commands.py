"""Every command against the running mesh: for people, for scripts, and its refusals."""

import json
import re
import subprocess
import sys

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from esper.cli import topics
from esper.cli.library import parse_signature, signature_text
from esper.cli.state import ExitCode, State, report
from esper.mesh.errors import FieldViolation, InvalidInput, LimitExceeded, NotFound
from esper.v1 import event_pb2, oona_service_pb2, urza_service_pb2
from esper.v1.build_pb2 import TIER_PORTABLE, Build
from tests.services.cli.conftest import wait_for


@pytest.fixture(scope="session")
def validated(client):
    """A kernel that the forge built and the engine signed."""
    wait_for(
        lambda: len(client.urza.ListBlueprints(urza_service_pb2.ListBlueprintsRequest(), timeout=5).blueprints) >= 10,
        "the catalogue",
    )
    found = client.urza.GetBlueprint(urza_service_pb2.GetBlueprintRequest(blueprint="low_rank"), timeout=5).blueprint
    order = Build(blueprint_id=found.id, signature=parse_signature("vector:8->8:float32"), tier=TIER_PORTABLE)
    client.urza.RequestBuilds(urza_service_pb2.RequestBuildsRequest(builds=[order]), timeout=5)
    listing = urza_service_pb2.ListKernelsRequest(states=[2])
    return wait_for(lambda: client.urza.ListKernels(listing, timeout=5).kernels, "a validated kernel", 120)[0]


def test_help_shows_every_command(cli):
    """`esper --help` names the commands, and each command's help has an example."""
    shown = cli("--help").stdout
    for name in ("train", "up", "serve", "runs", "kernels", "blueprints", "topics", "config", "export"):
        assert name in shown
        assert "Usage" in cli(name, "--help").stdout
    for group, leaf in (("runs", "list"), ("kernels", "show"), ("blueprints", "submit"), ("topics", "tail")):
        assert "Example: esper" in cli(group, leaf, "--help").stdout
    assert cli("--version").stdout.startswith("esper 0.")


def test_completion(tmp_path):
    """The shell completes commands and options: what `--install-completion` installs asks the command itself."""
    environment = {"_ESPER_COMPLETE": "complete_bash", "COMP_WORDS": "esper runs ", "COMP_CWORD": "2"}
    done = subprocess.run(
        [f"{sys.prefix}/bin/esper"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert {"list", "show", "watch", "pause", "resume", "stop"} <= set(done.stdout.split())
    installed = subprocess.run(
        [f"{sys.prefix}/bin/esper", "--install-completion", "bash"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert 0 == installed.returncode, installed.stderr
    assert [path for path in tmp_path.rglob("*esper*") if path.is_file()]


def test_kernels(mesh_cli, validated):
    """Kernels are listed by state and signature, and shown with verdict, figures and lineage."""
    listed = mesh_cli("kernels", "list", "--state", "validated", "--signature", "vector:8->8:float32").stdout
    digits = validated.id.removeprefix("sha256:")[:12]
    assert digits in listed
    assert "low_rank" in listed
    assert re.search(r" \d\.\d\d ", listed), "time of a step over plain torch's"
    shown = mesh_cli("kernels", "show", digits).stdout
    for part in (validated.id, "signed by", "numerics.gradients", "latency", "validated", "urabrask"):
        assert part in shown
    documents = json.loads(mesh_cli("kernels", "list", "--json", "--limit", 1).stdout)
    assert 1 == len(documents)
    assert validated.id == json.loads(mesh_cli("kernels", "show", digits, "--json").stdout)["kernel"]["id"]
    assert "no kernels" in mesh_cli("kernels", "list", "--state", "quarantined").stdout


def test_kernels_that_are_not_there(mesh_cli):
    """Wrong states and signatures are wrong usage (2), unknown ids are not found (3)."""
    assert "expected one of staged, validated" in mesh_cli("kernels", "list", "--state", "good", code=2).stderr
    assert "signature" in mesh_cli("kernels", "list", "--signature", "8x8", code=2).stderr
    assert "KERNEL_NOT_FOUND" in mesh_cli("kernels", "show", "0123456789abcdef", code=3).stderr


@pytest.mark.parametrize("text", ["vector:3->5:float32", "image:16->32:float32", "sequence:8->8:float32"])
def test_signatures_as_people_write_them(text):
    """What is shown can be typed again."""
    assert text == signature_text(parse_signature(text))


def test_blueprints(mesh_cli, validated, tmp_path):
    """A blueprint is shown as IR, changed, submitted, and found again; twice is once."""
    assert "low_rank" in mesh_cli("blueprints", "list").stdout
    images = json.loads(mesh_cli("blueprints", "list", "--layout", "image", "--json").stdout)
    assert images
    assert all("LAYOUT_IMAGE" in blueprint["layouts"] for blueprint in images)
    ir = json.loads(mesh_cli("blueprints", "show", "low_rank").stdout)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**ir, "name": "mine_too"}), encoding="utf-8")
    submit = ("blueprints", "submit", file)
    assert "mine_too stored" in mesh_cli(*submit, "--signature", "vector:8->8:float32").stdout
    assert "was there already" in mesh_cli(*submit).stdout
    assert "created" not in json.loads(mesh_cli(*submit, "--json").stdout)


def test_blueprints_that_are_refused(mesh_cli, tmp_path, validated):
    """Each problem of a blueprint is told with its node; nothing is stored."""
    ir = json.loads(mesh_cli("blueprints", "show", "low_rank").stdout)
    ir["nodes"][0]["op"] = "run_shell"
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**ir, "name": "bad"}), encoding="utf-8")
    refused = mesh_cli("blueprints", "submit", file, code=5)
    assert "'run_shell' is not known" in refused.stderr
    document = json.loads(mesh_cli("blueprints", "submit", file, "--json", code=5).stdout)
    assert "run_shell" in document["problems"][0]["message"]
    file.write_text("{{", encoding="utf-8")
    assert "BLUEPRINT_MALFORMED" in mesh_cli("blueprints", "submit", file, code=5).stderr
    assert "BLUEPRINT_NOT_FOUND" in mesh_cli("blueprints", "show", "bad", code=3).stderr
    assert "--layout: expected" in mesh_cli("blueprints", "list", "--layout", "cube", code=2).stderr


def publish(client, topic, *events):
    """Store events."""
    batch = oona_service_pb2.PublishRequest(topic=topic, events=events)
    answer = next(iter(client.oona.Publish(iter([batch]))))
    assert not answer.HasField("error"), answer


def test_topics(mesh_cli, client):
    """Topics are listed with their size; a tail shows the newest events and changes nothing."""
    publish(
        client,
        "decisions",
        event_pb2.Event(id="cli-1", key="[bold]k", type="application/json", payload=b'{"said": "[red]"}'),
        event_pb2.Event(
            id="cli-2", key="[bold]k", type="esper.v1.Event", payload=event_pb2.Event(id="x").SerializeToString()
        ),
        event_pb2.Event(id="cli-3", key="[bold]k", type="application/json", payload=b"not"),
        event_pb2.Event(id="cli-4", key="[bold]k", type="unknown/type", payload=b"1234"),
        event_pb2.Event(id="cli-5", key="[bold]k", type="application/json", payload=json.dumps("x" * 999).encode()),
    )
    assert "decisions" in mesh_cli("topics", "list").stdout
    shown = mesh_cli("topics", "tail", "decisions", "--last", 5).stdout
    assert '[bold]k application/json {"said": "[red]"}' in shown
    assert '{"id": "x"}' in shown
    assert "3 bytes that are not JSON" in shown
    assert '"4 bytes"' in shown
    assert "all of it with --json" in shown
    lines = [json.loads(line) for line in mesh_cli("topics", "tail", "decisions", "--json").stdout.splitlines()]
    assert ["cli-1", "cli-2", "cli-3", "cli-4", "cli-5"] == [line["event"]["id"] for line in lines]
    assert "x" * 999 == lines[-1]["event"]["payload"]
    only = mesh_cli("topics", "tail", "decisions", "--last", 1, "--json").stdout.splitlines()
    assert ["cli-5"] == [json.loads(line)["event"]["id"] for line in only]


def test_topics_that_are_empty_or_not_there(mesh_cli):
    """An empty topic ends at once and says so; an unknown one is not found."""
    assert "holds no events" in mesh_cli("topics", "tail", "field-reports.dead").stderr
    assert "TOPIC_NOT_FOUND" in mesh_cli("topics", "tail", "nosuch", code=3).stderr


def test_following_a_topic(mesh_cli, client, monkeypatch):
    """With --follow new events are shown as they come, for as long as nobody interrupts."""
    monkeypatch.setattr(topics, "_line", showing := Showing(client))
    mesh_cli("topics", "tail", "field-reports", "--follow", "--last", 1, code=130)
    assert ["follow-0", "follow-1", "follow-2"] == showing.seen


class Showing:
    """Publishes the next event when one was shown; interrupts after the third."""

    def __init__(self, client):
        self.client, self.seen = client, []
        publish(client, "field-reports", event_pb2.Event(id="follow-0", key="k"))

    def __call__(self, delivery, as_json):
        self.seen.append(delivery.event.id)
        if len(self.seen) == 3:
            raise KeyboardInterrupt
        publish(self.client, "field-reports", event_pb2.Event(id=f"follow-{len(self.seen)}", key="k"))
        return ""


def test_errors_for_people(capsys):
    """An error shows its sentence, reason, fields and when to try again; its class decides the exit status."""
    field = FieldViolation("topic", "must not be empty")
    assert ExitCode.REFUSED == report(InvalidInput("wrong [bold]input", violations=[field]))
    assert ExitCode.REFUSED == report(LimitExceeded("full", retry_after_s=2.5))
    assert ExitCode.NOT_FOUND == report(NotFound("nothing"))
    shown = capsys.readouterr().err
    assert "wrong [bold]input (INVALID_INPUT)" in shown or "wrong [bold]input" in shown
    assert "topic: must not be empty" in shown
    assert "try again in 2.5 s" in shown


def test_documents_for_scripts(capsys):
    """Whatever is emitted is one JSON document with the contract's own names."""
    State(environ={}).emit({"topic": event_pb2.Topic(name="a", max_attempts=3), "other": Timestamp})
    assert {"name": "a", "max_attempts": 3} == json.loads(capsys.readouterr().out)["topic"]


def test_state_is_asked_for_in_vain(cli):
    """Without the root command there is no state: a defect of ours, told as one."""
    import typer

    from esper.cli.state import state_of

    class Context:
        def find_root(self):
            return type("Root", (), {"obj": None})()

    with pytest.raises(TypeError, match="leaves a State"):
        state_of(typer.Context(typer.main.get_command(typer.Typer(callback=lambda: None))))
