"""One real mesh for all tests of the command, in a process of its own; the command itself is called in this process."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from esper.cli.connection import connect
from esper.cli.main import app
from esper.cli.state import State

QUICK = ("--set", "schedule.epochs=1", "--set", "control.prepare_wait_s=0")
"""A run that is over as soon as torch is there."""


class Command(subprocess.Popen):
    """The command as a process; what it writes is kept."""

    def __init__(self, *arguments, **environment):
        super().__init__(
            [sys.executable, "-m", "esper.cli", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean_environment(), **environment},
        )

    def ready(self):
        """What `up --json` or `serve --json` says once it is ready."""
        lines = []
        for line in self.stdout:
            lines.append(line)
            if line == "}\n":
                return json.loads("".join(lines))
        raise AssertionError(self.stderr.read())

    def line_with(self, text):
        """The next line of output that holds a text."""
        for line in self.stdout:
            if text in line:
                return line
        raise AssertionError(self.stderr.read())

    def end(self, number=signal.SIGTERM, timeout=60):
        """Send a signal; give the exit status, and what was still written to both streams."""
        self.send_signal(number)
        out, error = self.communicate(timeout=timeout)
        return self.returncode, out, error


@pytest.fixture
def esper():
    """Start the command as a process: `esper("up", "--port", 0)`. Whatever a test leaves running is killed."""
    started = []

    def start(*arguments, **environment):
        started.append(Command(*arguments, **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(30)
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def clean_environment():
    """The environment without settings of the developer's shell."""
    return {key: value for key, value in os.environ.items() if not key.startswith("ESPER_")}


def wait_for(look, what, timeout_s=60):
    """What `look` finds once it finds something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def gone(processes):
    """Whether none of these processes works any more."""
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


@dataclass
class Running:
    """The mesh of the session."""

    home: Path
    address: str
    process: subprocess.Popen


@pytest.fixture(scope="session")
def running_mesh(tmp_path_factory):
    """A mesh that runs while the tests of the command do."""
    home = tmp_path_factory.mktemp("cli") / "home"
    process = Command("--home", home, "up", "--port", 0, "--json", ESPER_LOGGING__LEVEL="error")
    yield Running(home, process.ready()["address"], process)
    process.end()


@pytest.fixture(scope="session")
def client(running_mesh):
    """Stubs of the running mesh: for what happens beside a command. Two commands cannot run in one process."""
    with connect(State(mesh=running_mesh.address, environ={})) as mesh:
        yield mesh


@pytest.fixture
def cli():
    """Call the command in this process: `cli("runs", "list")`."""

    def call(*arguments, code=0):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert code == done.exit_code, (done.stdout, done.stderr, done.exception)
        return done

    return call


@pytest.fixture
def mesh_cli(cli, running_mesh):
    """The same, on the home directory of the running mesh."""
    return lambda *arguments, code=0: cli("--home", running_mesh.home, *arguments, code=code)


@pytest.fixture(scope="session")
def finished_run(running_mesh, tmp_path_factory):
    """Id of a run that succeeded, and what the command wrote while it trained."""
    folder = tmp_path_factory.mktemp("report")
    done = CliRunner().invoke(
        app, ["--home", str(running_mesh.home), "train", "digits", *QUICK, "--report", str(folder), "--json"]
    )
    assert 0 == done.exit_code, (done.stdout, done.stderr, done.exception)
    return json.loads(done.stdout)["run_id"], done, folder
