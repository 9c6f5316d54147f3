"""Kernels built once for all tests of this folder."""

from datetime import UTC, datetime

import pytest
import torch

from esper.kasmina.blueprints import Birth, get
from esper.kasmina.kernels import SigningKey, Statement, Tier, TrustStore, kernel_id_of
from esper.kasmina.kernels.build import build
from esper.kasmina.signature import Layout, Signature


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


VECTOR = Signature(Layout.VECTOR, 8, 8)


@pytest.fixture(scope="session")
def portable_bundle() -> bytes:
    """A portable bottleneck MLP, born at random so that outputs say something."""
    return build(get("bottleneck_mlp").with_birth(Birth.RANDOM), VECTOR, Tier.PORTABLE)


@pytest.fixture(scope="session")
def key() -> SigningKey:
    """A gauntlet's key."""
    return SigningKey.generate()


@pytest.fixture(scope="session")
def trust(key) -> TrustStore:
    """Believes that key."""
    return TrustStore([key.public])


@pytest.fixture(scope="session")
def judge(key):
    """Signs a verdict over a bundle, for or against."""

    def sign(bundle: bytes, *, passed: bool = True, kernel_id: str | None = None):
        return key.sign(
            Statement(
                kernel_id=kernel_id or kernel_id_of(bundle),
                passed=passed,
                target="cpu/x86_64/avx2/torch-2.13",
                gauntlet_version="1",
                issued_at=datetime(2026, 11, 23, tzinfo=UTC),
            )
        )

    return sign
