"""`examples/refusals.py` shows what a user reads when something is refused, and each refusal is the right one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.cli.conftest import clean_environment

PROGRAM = Path(__file__).resolve().parents[3] / "examples" / "refusals.py"
EXPECTED = (
    ("a tampered kernel", "Kasmina: DATA_LOSS, KERNEL_CORRUPT", "its bytes have"),
    ("an unsigned kernel", "Kasmina: PERMISSION_DENIED, KERNEL_UNTRUSTED", "it carries no"),
    ("a kernel of another shape", "Kasmina: FAILED_PRECONDITION, KERNEL_UNFIT", "vector:8->9:float32 is wanted"),
    ("an unknown blueprint operation", "Urza: INVALID_ARGUMENT, BLUEPRINT_INVALID", "'run_shell' is not known"),
    ("an oversized message", "the chassis: RESOURCE_EXHAUSTED, MESSAGE_TOO_LARGE", "takes at most 4194304"),
    ("a missing deadline", "the chassis: INVALID_ARGUMENT, DEADLINE_MISSING", "was called without a deadline"),
    ("a full disk for the log", "Oona: RESOURCE_EXHAUSTED, LOG_FULL", "the log has no room"),
)


@pytest.mark.slow
def test_every_refusal_names_its_reason():
    """Seven attempts, seven blocks in order: who refused, status, reason, and a sentence with what was found."""
    done = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, timeout=200, check=False, env=clean_environment()
    )
    assert 0 == done.returncode, done.stderr
    sound, *blocks = done.stdout.split("\n\n")
    assert sound.startswith("sound: low_rank vector:8->8:float32")
    assert len(EXPECTED) == len(blocks)
    for block, parts in zip(blocks, EXPECTED, strict=True):
        for part in parts:
            assert part in block
