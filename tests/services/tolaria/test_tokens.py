"""Training processes call with a token that is always a fresh one."""

from __future__ import annotations

import stat
from dataclasses import replace

from esper.mesh.identity import Identity, Role
from esper.mesh.testing import issuer, service_context
from esper.tolaria.service import Config, build
from esper.tolaria.tokens import TokenReader, TokenWriter
from esper.tolaria.worker import Launch


def test_a_reader_has_the_token_that_was_written_last(tmp_path):
    """Renewed when the source gives another one; the owner's alone; kept in mind while the file is away."""
    tokens = ["one"]
    writer, read = TokenWriter(tmp_path / "token", lambda: tokens[-1]), TokenReader(tmp_path / "token")
    assert "" == read()
    writer.renew()
    assert "one" == read()
    assert 0o600 == stat.S_IMODE(writer.path.stat().st_mode)
    written = writer.path.stat().st_mtime_ns
    writer.renew()
    assert written == writer.path.stat().st_mtime_ns
    tokens.append("two")
    writer.renew()
    assert "two" == read()
    writer.path.unlink()
    assert "two" == read()
    assert [] == list(tmp_path.iterdir())


def test_a_token_that_cannot_be_written_is_written_later(tmp_path):
    """A full or missing disk ends nothing."""
    writer = TokenWriter(tmp_path / "home" / "token", lambda: "one")
    writer.renew()
    (tmp_path / "home").mkdir()
    writer.renew()
    assert "one" == TokenReader(writer.path)()


async def test_the_service_issues_tokens_of_clients(tmp_path):
    """The identity of training processes is there as soon as the service is built."""
    context = replace(service_context("tolaria", tmp_path), issuer=issuer)
    service = await build(Config(), context)
    token = Launch(token_file=str(tmp_path / "trainer.token")).token()
    assert token is not None
    assert Identity("trainer", Role.CLIENT) == issuer.verify(token())
    assert Launch().token() is None
    await service.close()
