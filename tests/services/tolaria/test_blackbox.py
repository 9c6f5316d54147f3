"""What is known of a kernel that took its process down, and what the next process makes of it."""

from __future__ import annotations

import json

import pytest

from esper.tolaria.blackbox import BlackBox, ended_by_kernel
from esper.tolaria.core import Arm
from esper.tolaria.worker import Launch
from tests.services.tolaria.conftest import result_of, start_scripted
from tests.services.tolaria.test_worker import again

KERNEL = "sha256:" + "ab" * 32


def _dead(folder, *, stacks: str = "", call: str = f"{KERNEL} forward\n") -> None:
    """Files as a process leaves them that did not end by itself."""
    (folder / "flight").write_text(call)
    (folder / "stacks.txt").write_text(stacks)


def _opened(folder):
    box = BlackBox(folder)
    try:
        return box.open()
    finally:
        box.close()


def test_a_process_that_was_killed_from_outside_blames_nobody(tmp_path):
    """No stacks, or stacks and no call: it was not the kernel's doing."""
    assert "" == ended_by_kernel(tmp_path)
    _dead(tmp_path)
    assert ("", {}) == (ended_by_kernel(tmp_path), _opened(tmp_path))
    _dead(tmp_path, stacks="Fatal Python error: Aborted", call="")
    assert ("", {}) == (ended_by_kernel(tmp_path), _opened(tmp_path))


def test_compiled_code_is_blamed_first_then_the_kernel(tmp_path):
    """Each for good; once judged, the evidence is gone."""
    for scopes in (["code"], ["code", "kernel"]):
        _dead(tmp_path, stacks="Fatal Python error: Segmentation fault\n\n  File ...")
        assert "ended it in its forward" in ended_by_kernel(tmp_path)
        found = _opened(tmp_path)
        assert scopes == list(found)
        assert "Segmentation fault" in found[scopes[-1]][KERNEL]["reason"]
        assert all(circuits[KERNEL]["for_good"] for circuits in found.values())
        assert ("", found) == (ended_by_kernel(tmp_path), _opened(tmp_path))


def test_what_a_watchdog_saw_is_not_counted_twice(tmp_path):
    """It has written the circuits before it ended the process."""
    box = BlackBox(tmp_path)
    assert {} == box.open()
    circuits = {"code": {KERNEL: {"left": 10, "trips": 1, "for_good": True, "trying": False, "reason": "hang"}}}
    box.keep(circuits, ending=True)
    box.stacks.write("Thread 0x1 (most recent call first)")
    box.close()
    assert "did not come back" in ended_by_kernel(tmp_path)
    assert circuits == _opened(tmp_path)
    assert "" == ended_by_kernel(tmp_path)


def test_circuits_are_kept_when_they_change_and_damage_is_survived(tmp_path):
    """Written behind the training thread; what cannot be read is told and forgotten."""
    box = BlackBox(tmp_path)
    box.open()
    circuits = {"kernel": {KERNEL: {"left": 3, "trips": 1, "for_good": False, "trying": False, "reason": "it raised"}}}
    for _ in range(2):
        box.keep(circuits, ending=False)
    box.close()
    assert circuits == _opened(tmp_path)
    for damage in ("{", "[]", '{"kernel": {"x": {"left": 1, "surprise": 2}}}', '{"planet": {}}'):
        (tmp_path / "circuits.json").write_text(damage)
        assert {} == _opened(tmp_path)


@pytest.mark.timeout(120)
def test_a_run_goes_on_without_the_code_that_hung(make_run, kernel_cache):
    """The process ends, stacks are written; the next one runs the portable graph of the same kernel to the end."""
    run_dir = make_run(arm=Arm.GROWN, schedule__epochs=3, guard__kernel_hang_s=0.5)
    plan = {"kernel_id": kernel_cache.kernel_id, "germinate": 1, "site": "body", "hang": 10}
    child = start_scripted(run_dir, Launch(cache_dir=str(kernel_cache.folder)), plan)
    assert 1 == child.wait(100)
    assert f"kernel {kernel_cache.kernel_id} ended it in its forward" == ended_by_kernel(run_dir.path)
    assert "Timeout" in (run_dir.path / "stacks.txt").read_text()
    assert 0 == again(run_dir, kernel_cache, hang=10)
    assert [kernel_cache.kernel_id] == result_of(run_dir)["kernel_ids"]
    circuits = json.loads((run_dir.path / "circuits.json").read_text())
    assert circuits["code"][kernel_cache.kernel_id]["for_good"]
