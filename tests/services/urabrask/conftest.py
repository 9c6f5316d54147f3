"""Fixtures of the evaluation engine's tests."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from esper.kasmina.kernels.signing import CheckResult, Figure, SigningKey, Statement
from esper.mesh.workers import WorkerPool
from esper.urabrask.board import Judgement
from esper.urabrask.checks import CHECKS, GAUNTLET_VERSION

HERE = Path(__file__).parent
NOW = datetime(2026, 11, 23, 20, 21, 0, 123456, tzinfo=UTC)


@pytest.fixture
def clock():
    """A clock that stands still."""
    return lambda: NOW


@pytest.fixture
def signing_key():
    """A fresh key."""
    return SigningKey.generate()


@pytest.fixture
def judgement(signing_key):
    """Makes signed judgements."""

    def make(number=0, *, passed=True, key=signing_key):
        statement = Statement(
            kernel_id=f"sha256:{number:064x}",
            passed=passed,
            checks=tuple(CheckResult(spec.name, passed, "as expected", 1.25) for spec in CHECKS),
            measurements=(Figure("latency.forward.p50", 12.5, "us"), Figure("memory.peak", 4096.0, "bytes")),
            tags=("latency:par", "size:tiny"),
            target="cpu/x86_64/avx2/torch-2.13",
            gauntlet_version=GAUNTLET_VERSION,
            issued_at=NOW,
        )
        return Judgement(statement, key.sign(statement))

    return make


@pytest.fixture
async def sandbox():
    """Makes pools of one sandbox and closes them at the end."""
    pools = []

    def make(entry="esper.urabrask.gauntlet.run:evaluate", **options):
        real = entry.startswith("esper.")
        options = {
            "warm": "esper.urabrask.gauntlet.run:warm" if real else "",
            "wall_limit_s": 60.0,
            "memory_limit_bytes": 1 << 30,
            "python_path": () if real else (HERE,),
            **options,
        }
        pools.append(WorkerPool(size=1, entry=entry, **options))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()
