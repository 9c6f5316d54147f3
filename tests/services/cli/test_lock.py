"""One mesh per home directory, found by everybody else on it."""

import os
import subprocess
import sys

import pytest

from esper.cli.lock import HomeLock, find_running
from esper.mesh.errors import Conflict


def test_a_running_mesh_is_found_by_its_note(tmp_path):
    """Whoever asks on the same home directory learns address, process and configuration of the mesh."""
    lock = HomeLock(tmp_path)
    lock.announce("127.0.0.1:7600", "sha256:abc")
    found = find_running(tmp_path)
    assert found is not None
    assert ("127.0.0.1:7600", os.getpid(), "sha256:abc") == (found.address, found.pid, found.config_digest)
    lock.release()


def test_a_second_mesh_is_refused_and_told_where_the_first_is(tmp_path):
    """Two processes never write to one home directory; the refusal names the process and the address."""
    lock = HomeLock(tmp_path)
    lock.announce("127.0.0.1:7600")
    with pytest.raises(Conflict, match=f"in use by process {os.getpid()}, listening at 127.0.0.1:7600") as refusal:
        HomeLock(tmp_path)
    assert refusal.value.reason == "HOME_IN_USE"
    lock.release()


def test_nothing_is_left_after_release(tmp_path):
    """A home directory that was given back can be taken again, and no mesh is found on it."""
    HomeLock(tmp_path).release()
    assert find_running(tmp_path) is None
    HomeLock(tmp_path).release()


def test_the_note_of_a_killed_mesh_is_not_believed(tmp_path, run_python):
    """A process that died without a word leaves its note behind, but not its lock: the note counts for nothing."""
    run_python(
        "import os, sys; from pathlib import Path; from esper.cli.lock import HomeLock\n"
        "HomeLock(Path(sys.argv[1])).announce('127.0.0.1:1'); os._exit(0)",
        str(tmp_path),
    )
    assert (tmp_path / "mesh.json").exists()
    assert find_running(tmp_path) is None


def test_those_who_ask_never_keep_a_mesh_from_starting(tmp_path):
    """Commands that look for a running mesh take nothing from the one that starts, and miss none."""
    poll = (
        "import sys; from pathlib import Path; from esper.cli.lock import find_running\n"
        "print(flush=True)\n"
        "while True: find_running(Path(sys.argv[1]))"
    )
    (tmp_path / "mesh.lock").touch()
    poller = subprocess.Popen([sys.executable, "-c", poll, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert poller.stdout is not None
        poller.stdout.readline()
        for number in range(200):
            lock = HomeLock(tmp_path)
            lock.announce(f"127.0.0.1:{number}")
            found = find_running(tmp_path)
            assert found is not None
            assert f"127.0.0.1:{number}" == found.address
            lock.release()
    finally:
        poller.kill()
        poller.communicate()


def test_a_mesh_that_is_still_starting_is_not_found(tmp_path):
    """Before it is ready a mesh has the lock and no note."""
    lock = HomeLock(tmp_path)
    assert find_running(tmp_path) is None
    lock.release()


def test_services_that_run_apart_lock_apart(tmp_path):
    """Two single services may share a home directory; two of the same name may not."""
    oona, urza = HomeLock(tmp_path, "oona"), HomeLock(tmp_path, "urza")
    with pytest.raises(Conflict):
        HomeLock(tmp_path, "oona")
    oona.release()
    urza.release()


def test_a_mesh_shares_its_home_with_no_single_service(tmp_path):
    """Two processes on one service's files would destroy them, whoever came first."""
    oona = HomeLock(tmp_path, "oona")
    oona.announce("127.0.0.1:7601")
    with pytest.raises(Conflict, match=r"listening at 127\.0\.0\.1:7601"):
        HomeLock(tmp_path)
    assert find_running(tmp_path) is None
    oona.release()
    mesh = HomeLock(tmp_path)
    with pytest.raises(Conflict):
        HomeLock(tmp_path, "oona")
    mesh.release()
