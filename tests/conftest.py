"""Fixtures of the whole suite."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

# A shell starts its background jobs with SIGINT ignored, and every process below inherits that: the commands under test
# would never see the Ctrl-C that a test sends them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    lacking = {
        "compiler": None if shutil.which("g++") else "needs a C++ compiler (Debian package g++)",
        "browser": None if shutil.which("chromium") else "needs Chromium (Debian package chromium)",
        "gpu": None if _has_gpu() else "needs a CUDA device",
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    # Asking the driver's own file keeps torch out of the runs that need none.
    return Path("/proc/driver/nvidia/version").exists()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in [name for name in os.environ if name.startswith("ESPER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Run code in a fresh interpreter; gives its standard output, fails the test when it fails."""

    def run(code: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def _no_training_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Training outlives its service on purpose, but not the test that began it, even where that failed half-way."""
    inside = request.node.path.is_relative_to(ROOT / "tests" / "services")
    if "tmp_path" not in request.fixturenames or not inside or request.node.path.parent.name not in {"tolaria", "cli"}:
        yield
        return
    # Asked for now: when the test is over, its folder may be gone before we are.
    folder = str(request.getfixturevalue("tmp_path"))
    yield
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or ()
        if "esper.tolaria.worker" in command and any(part.startswith(folder) for part in command):
            process.kill()
