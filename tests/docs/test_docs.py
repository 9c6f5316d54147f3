"""The documentation does what it says: every command and program of every page runs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import INERT, RUNNABLE, Block, blocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
_LIMIT_S = 240


class Session:
    """A new user at a shell: one working directory per page, everything from this environment on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "Makefile").symlink_to(ROOT / "Makefile")
        for name in (
            "examples",
            "proto",
            "third_party",
            "buf.yaml",
            "docs",
            "loadtests",
            "deploy",
            "pyproject.toml",
            "constraints.txt",
        ):
            (folder / name).symlink_to(ROOT / name)
        bin_dir = Path(sys.executable).parent
        self.environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "COLUMNS": "160", "NO_COLOR": "1"}
        self.background: list[subprocess.Popen] = []

    def run(self, block: Block) -> None:
        """Run one block as its language and its comment say."""
        if block.language == "python":
            self._run([sys.executable, "-c", block.body], block)
        elif block.language == "toml":
            (self.folder / "esper.toml").write_text(block.body, encoding="utf-8")
            self._run(["esper", "config", "check"], block)
            (self.folder / "esper.toml").unlink()
        elif block.test.startswith("background"):
            self._leave_running(block)
        elif block.test.startswith("instead"):
            self._run(["bash", "-c", block.test.removeprefix("instead ")], block)
        else:
            expected = int(block.test.removeprefix("exit ")) if block.test.startswith("exit") else 0
            for index, line in enumerate(block.commands):
                last = index == len(block.commands) - 1
                self._run(["bash", "-c", line], block, expected if last else 0)

    def _run(self, command: list[str], block: Block, expected: int = 0) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        shown = command[-1] if block.language != "python" else f"program of line {block.line}"
        assert expected == done.returncode, f"line {block.line}: {shown}\n{done.stdout}\n{done.stderr}"

    def _leave_running(self, block: Block) -> None:
        wanted = block.test.partition('"')[2].rpartition('"')[0]
        log = self.folder / f"background-{block.line}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {block.commands[0]}"],
                cwd=self.folder,
                env=self.environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.background.append(process)
        deadline = time.monotonic() + 60
        while wanted not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def close(self) -> None:
        """Stop what was left running."""
        for process in self.background:
            process.send_signal(signal.SIGTERM)
        for process in self.background:
            process.wait(30)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.timeout(900)
def test_every_block_runs(page, tmp_path):
    """A reader who types what a page shows, from top to bottom, gets no error that the page does not show."""
    session = Session(tmp_path)
    try:
        for block in blocks(page):
            assert block.language in RUNNABLE | INERT, f"line {block.line}: a block of {block.language!r} is not tested"
            if block.language in RUNNABLE:
                session.run(block)
    finally:
        session.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every relative link and picture of a page exists."""
    targets = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
