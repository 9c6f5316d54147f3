"""Verdicts: who may say that a kernel runs, and everything that makes such a word worthless."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from esper.kasmina.kernels import (
    CheckResult,
    Figure,
    KernelUntrusted,
    PublicKey,
    SignedVerdict,
    SigningKey,
    Statement,
    TrustStore,
)
from esper.kasmina.kernels.signing import MAX_STATEMENT_BYTES
from esper.mesh.errors import Code, InvalidInput

KERNEL = "sha256:" + "a" * 64
STATEMENT = Statement(
    kernel_id=KERNEL,
    passed=True,
    checks=(CheckResult("contract.shape", True, "found (5, 8)", 0.25),),  # noqa: FBT003  # a test's result
    measurements=(Figure("latency.forward.p50", 12.5, "us"),),
    tags=("latency:fast",),
    target="cpu/x86_64/avx2/torch-2.13",
    gauntlet_version="1",
    issued_at=datetime(2026, 11, 23, 12, 30, tzinfo=UTC),
)


def test_a_statement_survives_its_canonical_bytes():
    """What is signed can be read back whole, and equal statements have equal bytes in any time zone."""
    assert STATEMENT == Statement.from_bytes(STATEMENT.to_bytes())
    elsewhere = replace(STATEMENT, issued_at=STATEMENT.issued_at.astimezone(timezone(timedelta(hours=5))))
    assert STATEMENT.to_bytes() == elsewhere.to_bytes()


def test_a_trusted_verdict_is_believed(key, trust):
    """A verdict by a trusted key over this kernel gives its statement."""
    assert STATEMENT == trust.verify(key.sign(STATEMENT), KERNEL)


def test_a_key_survives_its_bytes(key):
    """A stored private key makes signatures that the old public key verifies."""
    again = SigningKey.from_bytes(key.to_bytes())
    assert key.public == again.public
    assert STATEMENT == TrustStore([key.public]).verify(again.sign(STATEMENT), KERNEL)


def test_a_private_key_is_not_printed(key):
    """Logging a key by accident shows nothing of it."""
    assert "SigningKey()" == repr(key)


def test_a_key_of_another_length_is_refused():
    """Half a key is no key."""
    with pytest.raises(InvalidInput, match="expected 32 bytes, found 16"):
        SigningKey.from_bytes(b"0" * 16)


def refusal(store, verdict, kernel_id=KERNEL):
    """Why a verdict is not believed."""
    with pytest.raises(KernelUntrusted) as caught:
        store.verify(verdict, kernel_id)
    assert caught.value.code is Code.PERMISSION_DENIED
    assert kernel_id in caught.value.public
    return caught.value.reasons


def test_no_verdict_is_no_trust(trust):
    """An unsigned kernel is refused."""
    assert ("it carries no signed verdict",) == refusal(trust, None)


def test_a_foreign_key_is_not_believed(trust):
    """A perfectly good signature by a stranger is worth nothing."""
    (reason,) = refusal(trust, SigningKey.generate().sign(STATEMENT))
    assert "not trusted here" in reason


def test_a_revoked_key_is_not_believed(key):
    """Revocation reaches back to everything that the key ever signed, however often the key is listed."""
    store = TrustStore([PublicKey(key.public.raw, revoked=True), key.public])
    assert 1 == len(store.keys)
    (reason,) = refusal(store, key.sign(STATEMENT))
    assert "was revoked" in reason


def test_one_changed_byte_of_the_statement_is_noticed(key, trust):
    """The signature covers every byte: a rejection cannot be turned into an acceptance."""
    verdict = key.sign(replace(STATEMENT, passed=False))
    forged = replace(verdict, statement=verdict.statement.replace(b'"passed":false', b'"passed":true'))
    (reason,) = refusal(trust, forged)
    assert "does not fit the statement" in reason


def test_a_short_signature_is_refused_like_a_wrong_one(key, trust):
    """Bytes that are no signature at all are a refusal, not a crash."""
    (reason,) = refusal(trust, replace(key.sign(STATEMENT), signature=b"short"))
    assert "does not fit" in reason


def test_all_reasons_are_told(key, trust):
    """A rejection of another kernel is wrong twice, and says so, with the failed checks."""
    failed = (CheckResult("numerics.outputs", False, "error 0.3, expected below 1e-5"),)  # noqa: FBT003  # a result
    other = replace(STATEMENT, passed=False, checks=failed)
    reasons = refusal(trust, key.sign(other), "sha256:" + "b" * 64)
    assert 2 == len(reasons)
    assert "is about kernel " + KERNEL in reasons[0]
    assert "rejects it (numerics.outputs)" in reasons[1]


@pytest.mark.parametrize(
    "data", [b"{}", b"[1]", b"\xff", b'{"type":"esper.v1.Verdict"}', b" " * (MAX_STATEMENT_BYTES + 1)]
)
def test_signed_nonsense_is_nonsense(key, trust, data):
    """A trusted key over bytes that are no verdict validates nothing."""
    signed = SignedVerdict(data, key._key.sign(data), key.public.key_id)
    (reason,) = refusal(trust, signed)
    assert "verdict statement: expected" in reason
