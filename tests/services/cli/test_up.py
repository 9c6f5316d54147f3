"""The mesh as a process: ready soon, stopped cleanly, nothing left behind, nothing forgotten."""

import json
import os
import signal
import socket
import threading
import time

import psutil
import pytest
from typer.testing import CliRunner

from esper.cli.connection import connect
from esper.cli.lock import find_running
from esper.cli.main import app
from esper.cli.roster import SERVICES
from esper.cli.state import State
from esper.v1 import oona_service_pb2, urza_service_pb2
from tests.services.cli.conftest import gone, wait_for

QUIET = {"ESPER_LOGGING__LEVEL": "error"}


def workers_of(process):
    """The worker processes of a mesh, once both pools have theirs."""
    return wait_for(
        lambda: (found := psutil.Process(process.pid).children(recursive=True)) and len(found) >= 2 and found,
        "the start of the workers",
    )


def show_blueprint(home):
    """The IR of a blueprint as the command writes it; nothing while the library does not have it yet."""
    done = CliRunner().invoke(app, ["--home", str(home), "blueprints", "show", "low_rank"])
    return done.stdout if done.exit_code == 0 else ""


def test_life_of_a_mesh(tmp_path, cli, esper):
    """A mesh is ready soon and stops without a trace; the next one knows what it knew; kill -9 leaves no worker behind.

    SIGINT ends the first, SIGKILL the second, SIGTERM the third.
    """
    home = tmp_path / "home"
    first = esper("--home", home, "up", "--port", 0, "--json", **QUIET)
    ready = first.ready()
    assert list(SERVICES) == ready["services"]
    assert (first.pid, ready["address"]) == (find_running(home).pid, find_running(home).address)
    used = sum(psutil.Process(first.pid).cpu_times()[:2])
    assert used < 5, f"{used} s of processor time until ready"
    mapped = {entry.path for entry in psutil.Process(first.pid).memory_maps()}
    assert not [path for path in mapped if "libtorch" in path]
    ir = json.loads(wait_for(lambda: show_blueprint(home), "the catalogue in the library"))
    (tmp_path / "mine.json").write_text(json.dumps({**ir, "name": "mine"}), encoding="utf-8")
    assert "stored" in cli("--home", home, "blueprints", "submit", tmp_path / "mine.json").stdout
    workers = workers_of(first)
    assert (0, "", "") == first.end(signal.SIGINT)
    assert gone(workers)
    assert find_running(home) is None

    second = esper("--home", home, "up", "--port", 0, "--json", **QUIET)
    second.ready()
    assert "mine" in cli("--home", home, "blueprints", "show", "mine").stdout
    workers = workers_of(second)
    second.kill()
    second.wait(30)
    wait_for(lambda: gone(workers), "the end of the workers")
    assert find_running(home) is None

    third = esper("--home", home, "up", "--port", 0, **QUIET)
    line = third.stdout.readline()
    assert "ready at" in line
    assert str(home) in line
    assert 0 == third.end()[0]


def test_stopping_while_starting(tmp_path, esper):
    """SIGTERM before the mesh is ready ends it just as cleanly."""
    process = esper("--home", tmp_path, "up", "--port", 0, **QUIET)
    wait_for((tmp_path / "mesh.lock").exists, "the lock")
    time.sleep(0.1)
    assert process.end()[0] in {0, -signal.SIGTERM}
    assert find_running(tmp_path) is None


def test_the_home_is_in_use(running_mesh, cli):
    """A second mesh on the same home is refused with the address of the first."""
    refused = cli("--home", running_mesh.home, "up", "--port", 0, code=5).stderr
    assert "HOME_IN_USE" in refused
    assert running_mesh.address in refused
    assert "HOME_IN_USE" in cli("--home", running_mesh.home, "serve", "oona", code=5).stderr


def test_the_port_is_in_use(running_mesh, cli, tmp_path):
    """A port that is taken, or an address that is not ours, is said with its number."""
    port = running_mesh.address.rpartition(":")[2]
    refused = cli("--home", tmp_path, "serve", "oona", "--port", port, code=4).stderr
    assert "MESH_START_FAILED" in refused
    assert port in refused


def test_wrong_service_and_wrong_place(cli, tmp_path):
    """`serve` takes services that exist; a host that others can reach asks for tokens."""
    assert "expected one of oona" in cli("--home", tmp_path, "serve", "nissa", code=2).stderr
    refused = cli("--home", tmp_path, "up", "--host", "0.0.0.0", "--port", 0, code=2).stderr
    assert "anonymous_role" in refused
    assert not (tmp_path / "mesh.lock").exists()


def test_served_in_this_process_until_a_signal(cli, tmp_path):
    """One service alone is ready, says where, and ends with 0 on SIGTERM."""

    def stop_when_ready():
        wait_for((tmp_path / "oona.json").exists, "the note")
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_when_ready)
    stopper.start()
    done = cli("--home", tmp_path, "serve", "oona", "--port", 0)
    stopper.join()
    assert "oona ready at 127.0.0.1:" in done.stdout
    assert not (tmp_path / "oona.json").exists()


def free_ports(count):
    """Ports that nobody has; held together, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for held in sockets:
        held.close()
    return ports


@pytest.mark.slow
def test_services_apart_find_each_other(tmp_path, cli, esper):
    """Six processes, each with one service, work as one mesh does.

    The forge fills the library, the engine registers its key there, the library announces on the bus.
    """
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    lines = ["schema_version = 1", f"home = '{tmp_path}/home'", "[logging]", "level = 'error'", "[addresses]"]
    lines += [f"{name} = '127.0.0.1:{port}'" for name, port in ports.items()]
    config = tmp_path / "esper.toml"
    config.write_text("\n".join(lines), encoding="utf-8")
    processes = [
        esper("--config", config, "serve", name, "--port", port, "--json", **QUIET) for name, port in ports.items()
    ]
    try:
        for name, process in zip(SERVICES, processes, strict=True):
            assert [name] == process.ready()["services"]

        def at(name):
            return connect(State(mesh=f"127.0.0.1:{ports[name]}"))

        with at("urza") as mesh:
            listing = urza_service_pb2.ListBlueprintsRequest()
            wait_for(lambda: len(mesh.urza.ListBlueprints(listing, timeout=5).blueprints) >= 10, "the catalogue")
            keys = urza_service_pb2.ListSigningKeysRequest()
            wait_for(lambda: mesh.urza.ListSigningKeys(keys, timeout=5).keys, "the engine's key")
        with at("oona") as mesh:
            topic = oona_service_pb2.GetTopicRequest(name="library-events")

            def announced():
                found = mesh.oona.GetTopic(topic, timeout=5).topic.partition_statuses
                return sum(part.next_offset for part in found)

            wait_for(announced, "the library's announcements")
        address = f"127.0.0.1:{ports['tolaria']}"
        assert "no runs" in cli("--mesh", address, "runs", "list").stdout
        # A service that is not at this address says so; it is no crash of the command.
        assert "error" in cli("--mesh", address, "topics", "list", code=5).stderr
    finally:
        statuses = [process.end()[0] for process in processes]
    assert [0] * len(SERVICES) == statuses
