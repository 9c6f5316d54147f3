"""Runs without a mesh: recipes cut short, kernels built here, decisions by a script."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from esper.kasmina.blueprints.catalogue import get
from esper.kasmina.cache import DiskStore, Fetched
from esper.kasmina.kernels.build import build
from esper.kasmina.kernels.bundle import Tier, kernel_id_of
from esper.kasmina.kernels.signing import SignedVerdict, SigningKey, Statement
from esper.kasmina.signature import Layout, Signature
from esper.tolaria import recipes
from esper.tolaria.core import Arm, RunRecord, RunSpec
from esper.tolaria.overrides import apply
from esper.tolaria.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.tolaria.worker import Launch

SCRIPTED = Path(__file__).with_name("scripted_worker.py")
SHORT = {"schedule.epochs": 3, "control.prepare_wait_s": 0, "artifacts.export": False, "artifacts.html": False}
BODY = Signature(Layout.IMAGE, 8, 12)


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """Sessions set threads, determinism and seeds of their process; here that process is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.use_deterministic_algorithms(mode=False)
    torch.set_num_threads(threads)


def signed(key: SigningKey, kernel_id: str, *, passed: bool = True) -> SignedVerdict:
    """A verdict as the gauntlet would sign it."""
    statement = Statement(
        kernel_id=kernel_id,
        passed=passed,
        target="any",
        gauntlet_version="test",
        issued_at=datetime(2026, 11, 23, tzinfo=UTC),
    )
    return key.sign(statement)


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A kernel cache on disk with one portable kernel that fits around the body of the digits host."""
    folder = tmp_path_factory.mktemp("kernels")
    key = SigningKey.generate()
    bundle = build(get("conv_bottleneck"), BODY, Tier.PORTABLE)
    kernel_id = kernel_id_of(bundle)
    DiskStore(folder, 1 << 30).write(kernel_id, Fetched(bundle, signed(key, kernel_id)))
    return SimpleNamespace(folder=folder, kernel_id=kernel_id, bundle=bundle, key=key)


@pytest.fixture
def make_run(tmp_path: Path):
    """Write the folder of a run as the service does."""

    def make(
        name: str = "digits-1", *, arm: Arm = Arm.HOST, reference: str = "", seed: int = 0, **overrides: object
    ) -> RunDir:
        run_dir = RunDir(tmp_path / "runs" / name)
        run_dir.path.mkdir(parents=True)
        now = datetime.now(UTC)
        spec = RunSpec(recipe="digits", seed=seed, arm=arm, reference_run_id=reference)
        changed = {**SHORT, **{key.replace("__", "."): value for key, value in overrides.items()}, "seed": seed}
        run_dir.write_config(apply(recipes.get("digits").build(), changed))
        run_dir.write_record(RunRecord(id=name, spec=spec, create_time=now, update_time=now))
        return run_dir

    return make


def start_scripted(run_dir: RunDir, launch: Launch, plan: dict[str, object]) -> subprocess.Popen[bytes]:
    """Start a training process whose controller follows a script."""
    (run_dir.path / "plan.json").write_text(json.dumps(plan))
    with (run_dir.path / "log.txt").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, str(SCRIPTED), str(run_dir.path)], stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    assert child.stdin is not None
    child.stdin.write(launch.line().encode())
    child.stdin.close()
    return child


def result_of(run_dir: RunDir) -> dict[str, object]:
    """Final figures."""
    found: dict[str, object] = json.loads((run_dir.path / "result.json").read_text())
    return found
