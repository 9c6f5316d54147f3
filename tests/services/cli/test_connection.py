"""How a command reaches a mesh, and what it says where there is none."""

import json
import signal

import psutil
import pytest

from esper.cli.connection import connect, embedded
from esper.cli.lock import HomeLock, find_running
from esper.cli.state import State
from esper.mesh.errors import Unavailable
from tests.services.cli.conftest import clean_environment, gone, wait_for


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended while we looked
        return ""


def test_a_mesh_of_its_own_for_one_command(cli, tmp_path):
    """With no mesh on the home directory, a command that needs one starts it, and leaves nothing running."""
    topics = json.loads(cli("--home", tmp_path / "h", "topics", "list", "--json").stdout)
    assert "run-events" in {topic["name"] for topic in topics}
    assert find_running(tmp_path / "h") is None
    assert not [p for p in psutil.Process().children(recursive=True) if str(tmp_path) in _command(p)]


def test_a_killed_command_takes_its_mesh_along(tmp_path, esper):
    """`kill -9` of a command ends the mesh that it had started, and the workers of that.

    The run outlives it; resumed by a command that starts a mesh for it, Ctrl-C does not leave it without a controller.
    """
    home = tmp_path / "h"
    settings = ("--set", "schedule.epochs=900", "--set", "control.prepare_wait_s=0")
    follower = esper("--home", home, "train", "digits", *settings)
    run_id = follower.line_with("grown").split()[0]
    mesh = psutil.Process(wait_for(lambda: find_running(home), "the start of the mesh").pid)
    training = wait_for(lambda: [p for p in mesh.children() if "tolaria" in " ".join(p.cmdline())], "the training")
    workers = [p for p in mesh.children(recursive=True) if p not in training]
    try:
        follower.kill()
        follower.wait(30)
        wait_for(lambda: gone([mesh, *workers]), "the end of the mesh")
    finally:
        for process in training:  # it outlives every mesh, on purpose
            process.kill()
    resumed = esper("--home", home, "runs", "resume", run_id)
    resumed.line_with("running")
    status, out, error = resumed.end(signal.SIGINT)
    assert 130 == status
    assert f"paused; go on with: esper runs resume {run_id}" in error
    assert "Traceback" not in out + error


def test_nothing_answers(cli, tmp_path):
    """An address where nothing listens, a home directory without a mesh for a command that starts none: status 4."""
    assert "no mesh answers at 127.0.0.1:9" in cli("--mesh", "127.0.0.1:9", "runs", "list", code=4).stderr
    refused = cli("--home", tmp_path, "runs", "watch", "digits-x", code=4).stderr
    assert "start one with 'esper up'" in refused


def test_a_mesh_that_is_not_ready(running_mesh):
    """A server without a mesh behind it, or one that drains, is told apart from none at all."""
    import asyncio

    from esper.mesh.testing import serve

    async def main():
        async with serve() as (server, _):
            await server._health.enter_graceful_shutdown()
            address = server.target

            def ask():
                with connect(State(mesh=address, environ={})):
                    pass

            with pytest.raises(Unavailable, match="starting or stopping"):
                await asyncio.to_thread(ask)

    asyncio.run(main())


def test_an_embedded_mesh_that_cannot_start(tmp_path):
    """What stopped it is told: here, that a service runs on the same home directory."""
    lock = HomeLock(tmp_path, "urza")
    with (
        pytest.raises(Unavailable, match="HOME_IN_USE") as refusal,
        embedded(State(home=tmp_path, environ=clean_environment())),
    ):
        pass
    assert "MESH_START_FAILED" == refusal.value.reason
    lock.release()


def test_ctrl_c_is_an_exit_code(running_mesh, esper):
    """A command that is interrupted ends with 130 and no traceback."""
    process = esper("--home", running_mesh.home, "topics", "tail", "run-events", "--follow", "--json")
    wait_for(lambda: psutil.Process(process.pid).num_threads() > 3, "the subscription")
    status, out, error = process.end(signal.SIGINT)
    assert 130 == status
    assert "Traceback" not in out + error
