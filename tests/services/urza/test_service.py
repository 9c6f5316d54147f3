"""Urza as a service: settings, imports, the whole of it on PostgreSQL, conversions."""

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper import urza
from esper.kasmina.kernels.signing import CheckResult, Figure, SignedVerdict, Statement
from esper.mesh.errors import InvalidInput
from esper.mesh.testing import service_context
from esper.urza import convert
from esper.urza.paging import page_limit, read_token, write_token
from esper.urza.service import Config, build
from esper.urza.verdicts import LATENCY, MEMORY, figure
from tests.services.urza.urza_calls import serve_library
from tests.services.urza.urza_world import statement_over

_EDGE = {"convert.py", "servicer.py", "service.py", "announce.py"}


def test_imports() -> None:
    """The library's own modules import neither gRPC nor the contracts, and nothing imports torch."""
    for path in Path(urza.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        roots = {".".join(name.split(".")[:2]) for name in names}
        assert "torch" not in {name.split(".")[0] for name in names}, path
        if path.name not in _EDGE:
            assert not roots & {"esper.v1", "grpc", "grpc.aio", "google.protobuf"}, path


def test_no_torch_is_loaded(run_python: Any) -> None:
    """A library can run where torch is not installed: importing the service loads none of it."""
    assert "False" == run_python("import sys, esper.urza.service; print('torch' in sys.modules)").strip()


async def test_the_whole_service_on_postgres(postgres_url: str, tmp_path: Path) -> None:
    """One setting puts the library on PostgreSQL; callers cannot tell the difference, and restarts keep everything."""
    config = Config.model_validate({"database_url": postgres_url, "announce": False})
    async with serve_library(tmp_path, config) as served:
        kernel = await served.validated(b"on postgres")
    async with serve_library(tmp_path, config) as served:
        assert b"on postgres" == await served.download(kernel.id)


async def test_settings(tmp_path: Path) -> None:
    """Secrets are not printed, bounds hold, and a wrong URL ends the start with what was expected."""
    config = Config.model_validate({"database_url": "mysql://esper:hunter2@host/db"})
    assert "hunter2" not in repr(config)
    with pytest.raises(InvalidInput, match="expected sqlite"):
        await build(config, service_context("urza", tmp_path))
    (tmp_path / "blobs").write_text("in the way")
    with pytest.raises(NotADirectoryError):
        await build(Config(), service_context("urza", tmp_path))
    for wrong in ({"max_attempts": 0}, {"max_kernel_bytes": (1 << 30) + 1}, {"colour": "red"}):
        with pytest.raises(ValidationError):
            Config.model_validate(wrong)


texts = st.text(max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)
statements = st.builds(
    Statement,
    kernel_id=st.just("sha256:" + "0" * 64),
    passed=st.booleans(),
    checks=st.lists(st.builds(CheckResult, texts, st.booleans(), texts, numbers), max_size=4).map(tuple),
    measurements=st.lists(st.builds(Figure, texts, numbers, texts), max_size=4).map(tuple),
    tags=st.lists(texts, max_size=4).map(tuple),
    target=texts,
    gauntlet_version=texts,
    issued_at=st.just(statement_over("x").issued_at),
)


@given(statement=statements)
def test_what_is_signed_and_what_travels_beside_it_agree(statement: Statement) -> None:
    """A statement survives the way over the wire exactly, so that comparing it with the signed bytes is fair."""
    verdict = SignedVerdict(statement.to_bytes(), b"s" * 64, "key")
    message = convert.verdict_to_proto(verdict, statement)
    received = convert.statement_from_proto(type(message).FromString(message.SerializeToString()))
    assert statement == received
    assert received == Statement.from_bytes(verdict.statement)


def test_figures_in_other_units() -> None:
    """Measurements are compared in one unit; one in an unknown unit counts as absent."""

    def over(*measurements: Figure) -> Statement:
        return statement_over("x", measurements=measurements)

    assert 1500.0 == figure(over(Figure(LATENCY, 1.5, "ms")), LATENCY)
    assert 2048.0 == figure(over(Figure(MEMORY, 2, "KiB")), MEMORY)
    assert None is figure(over(Figure(MEMORY, 2, "ratio")), MEMORY)
    assert None is figure(over(), LATENCY)


@given(sequence=st.integers(1, (1 << 63) - 1), query=st.text(max_size=20))
def test_page_tokens(sequence: int, query: str) -> None:
    """A token gives its number back to its own query, and to no other."""
    token = write_token(sequence, query)
    assert sequence == read_token(token, query)
    with pytest.raises(InvalidInput):
        read_token(token, query + "x")


@given(st.text(min_size=1, max_size=60))
def test_foreign_page_tokens(token: str) -> None:
    """A text that was not made here is refused, whatever it is."""
    with pytest.raises(InvalidInput) as caught:
        read_token(token, "query")
    assert "PAGE_TOKEN_INVALID" == caught.value.reason


def test_page_sizes() -> None:
    """No size means a hundred, and nobody gets more than a thousand."""
    assert (100, 7, 1000) == (page_limit(0), page_limit(7), page_limit(5000))
