"""Roles, tokens, and the secret that signs them."""

import base64
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jwt
import pytest
from pydantic import SecretStr

from esper.mesh.errors import Unauthenticated
from esper.mesh.identity import MAX_CACHED_TOKENS, Identity, Role, TokenIssuer, load_or_create_secret

SECRET = "s" * 40
ALICE = Identity("alice", Role.CLIENT)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_token_gives_back_its_identity() -> None:
    """Every role survives the way through a token, and again from the cache."""
    issuer = TokenIssuer(SecretStr(SECRET))
    for role in Role:
        identity = Identity("forge-3", role)
        token = issuer.issue(identity)
        assert identity == issuer.verify(token) == issuer.verify(token)


def _unsigned(claims: dict[str, object]) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims)}."


CLAIMS = {"iss": "esper", "sub": "eve", "role": "operator", "iat": 1, "exp": 9e9}


@pytest.mark.parametrize(
    "token",
    [
        "",
        "nonsense",
        _unsigned(CLAIMS),
        jwt.encode(CLAIMS, "another secret of enough bytes 123456", algorithm="HS256"),
        jwt.encode(CLAIMS, SECRET + "x" * 30, algorithm="HS512"),
        jwt.encode({**CLAIMS, "iss": "somebody"}, SECRET, algorithm="HS256"),
        jwt.encode({**CLAIMS, "role": "emperor"}, SECRET, algorithm="HS256"),
        jwt.encode({**CLAIMS, "sub": "a b\n"}, SECRET, algorithm="HS256"),
        jwt.encode({k: v for k, v in CLAIMS.items() if k != "role"}, SECRET, algorithm="HS256"),
        jwt.encode({k: v for k, v in CLAIMS.items() if k != "exp"}, SECRET, algorithm="HS256"),
    ],
)
def test_what_this_issuer_did_not_sign_is_refused_without_telling_why(token: str) -> None:
    """Unsigned, foreign, altered and incomplete tokens all get the same public sentence."""
    with pytest.raises(Unauthenticated) as caught:
        TokenIssuer(SECRET).verify(token)
    assert "a valid identity token is required" == caught.value.public
    assert caught.value.private


def test_tokens_expire_even_when_they_were_verified_before() -> None:
    """The cache of verified tokens does not prolong anybody's life."""
    clock = Clock()
    issuer = TokenIssuer(SECRET, ttl_s=60, clock=clock)
    token = issuer.issue(ALICE)
    assert ALICE == issuer.verify(token)
    clock.now += 61
    for _ in range(2):
        with pytest.raises(Unauthenticated) as caught:
            issuer.verify(token)
        assert "expired" in (caught.value.private or "")


def test_a_source_renews_its_token_at_half_its_life() -> None:
    """A service that runs for days always sends a token that is good for a while."""
    clock = Clock()
    issuer = TokenIssuer(SECRET, ttl_s=100, clock=clock)
    source = issuer.source(ALICE)
    first = source()
    clock.now += 49
    assert first == source()
    clock.now += 2
    second = source()
    assert first != second
    clock.now += 60
    assert ALICE == issuer.verify(second)


def test_the_cache_of_tokens_is_bounded() -> None:
    """Somebody who makes many tokens cannot fill the memory."""
    issuer = TokenIssuer(SECRET)
    for number in range(MAX_CACHED_TOKENS + 10):
        issuer.verify(issuer.issue(Identity(f"c{number}", Role.CLIENT)))
    assert MAX_CACHED_TOKENS == len(issuer._verified)


def test_weak_secrets_and_odd_subjects_are_refused() -> None:
    """A short key and a subject with blanks name the expectation."""
    with pytest.raises(ValueError, match="at least 32 bytes, found 5"):
        TokenIssuer("short")
    with pytest.raises(ValueError, match="1 to 128 letters"):
        Identity("a b", Role.CLIENT)


def test_processes_that_start_together_share_one_secret(tmp_path: Path) -> None:
    """Whoever comes first makes the secret, everybody reads that one, and only the owner may."""
    with ThreadPoolExecutor(8) as pool:
        secrets = {s.get_secret_value() for s in pool.map(load_or_create_secret, [tmp_path / "d"] * 16)}
    assert 1 == len(secrets)
    assert 0o600 == stat.S_IMODE((tmp_path / "d" / "auth.key").stat().st_mode)
    assert ["auth.key"] == [path.name for path in (tmp_path / "d").iterdir()]


def test_a_damaged_secret_is_named(tmp_path: Path) -> None:
    """A truncated key file is an error that names the file, not a new identity for everybody."""
    (tmp_path / "auth.key").write_text("short")
    with pytest.raises(ValueError, match=r"auth\.key must hold"):
        load_or_create_secret(tmp_path)
