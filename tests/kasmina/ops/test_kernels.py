"""The Triton kernels, by the interpreter and the compiler where there is no device, and on a device where there is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kasmina.ops.table import CASES, check

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def _lines(module: str, folder: Path, **environment: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What went wrong in each case under the interpreter, which a process has from its start or never."""
    lines = _lines("tests.kasmina.ops.table", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")
    return {line["case"]: line["error"] for line in lines}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_plain_torch(case, interpreted):
    """Blend, its gradients and all statistics, for every dtype and layout, by Triton's interpreter."""
    assert "" == interpreted[str(case)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_plain_torch_on_a_device(case):
    """The same table on a CUDA device."""
    check(case, "cuda")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the compiler made of the launches."""
    return _lines("tests.kasmina.ops.compiled", tmp_path_factory.mktemp("triton"))


def test_kernels_compile_for_devices_that_are_absent(compiled):
    """Every launch assembles for two generations, keeps its accumulators in registers and reads 16 bytes at a time."""
    assert {80, 90} == {line["capability"] for line in compiled}
    assert {"_forward", "_backward", "_parts", "_merge"} == {line["kernel"] for line in compiled}
    assert [] == [line for line in compiled if line["spilled"] or not line["wide"]]


def test_many_seeds_fit_into_shared_memory(compiled):
    """A launch never asks for more than the 99 KiB that the smallest supported device grants, whatever the seeds."""
    assert max(line["shared"] for line in compiled) <= 99 * 1024
