"""Who is calling: roles, identities, and the signed tokens that carry them.

A token is a JWT signed with one secret per mesh (HS256). Typical use::

    issuer = TokenIssuer(secret)
    token = issuer.issue(Identity("forge-3", Role.TEZZERET))
    identity = issuer.verify(token)          # Unauthenticated for anything that this issuer did not sign

A service that runs for days calls `issuer.source(identity)`: a callable that renews its token in good time.
"""

import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import jwt
from pydantic import SecretStr

from esper.mesh.errors import Unauthenticated

__all__ = ["ANONYMOUS", "Identity", "Role", "TokenIssuer", "load_or_create_secret"]

_ISSUER = "esper"
_ALGORITHM = "HS256"
_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}")
MIN_SECRET_BYTES = 32
"""A key shorter than the hash output weakens HS256 (RFC 7518, 3.2)."""

MAX_CACHED_TOKENS = 1024
"""Verified tokens remembered by one issuer: verification costs about 30 us, a lookup less than one."""

_REFUSAL = "a valid identity token is required"


class Role(StrEnum):
    """What a caller may be. Policies name sets of roles, one set per method."""

    ANONYMOUS = "anonymous"
    """Nobody we know: no token, or no trust in its origin."""

    CLIENT = "client"
    """Researchers and trainers."""

    OPERATOR = "operator"
    """People who run the mesh: locks, redrives, stops of other people's runs."""

    OONA = "oona"
    """The message bus."""

    URZA = "urza"
    """The library."""

    TEZZERET = "tezzeret"
    """The forge: the only one that completes builds."""

    URABRASK = "urabrask"
    """The evaluation engine: the only one that promotes kernels."""

    TAMIYO = "tamiyo"
    """The controller."""

    TOLARIA = "tolaria"
    """The training orchestrator."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller.

    Raises:
        ValueError: the subject is not 1 to 128 characters of letters, digits and `._@:/-`.
    """

    subject: str
    """Name of the caller, unique within its role: `alice`, `forge-3`."""

    role: Role
    """What the caller may do."""

    def __post_init__(self) -> None:
        if not _SUBJECT.fullmatch(self.subject):
            raise ValueError(
                f"subject of an identity must be 1 to 128 letters, digits or ._@:/- , found {self.subject!r}"
            )


ANONYMOUS = Identity("anonymous", Role.ANONYMOUS)
"""The identity of a caller without a token."""


class TokenIssuer:
    """Signs and verifies the identity tokens of one mesh.

    Args:
        secret: the signing key shared by the services of one mesh, at least 32 bytes.
        ttl_s: seconds that a token is valid for.
        clock: seconds since the epoch; a parameter for tests.

    Raises:
        ValueError: the secret is too short.
    """

    def __init__(
        self, secret: SecretStr | str, *, ttl_s: float = 3600.0, clock: Callable[[], float] = time.time
    ) -> None:
        key = (secret.get_secret_value() if isinstance(secret, SecretStr) else secret).encode()
        if len(key) < MIN_SECRET_BYTES:
            raise ValueError(
                f"the signing secret (auth.secret) must have at least {MIN_SECRET_BYTES} bytes, found {len(key)}"
            )
        self._key = key
        self._ttl_s = ttl_s
        self._clock = clock
        self._verified: dict[str, tuple[Identity, float]] = {}

    def issue(self, identity: Identity, *, ttl_s: float | None = None) -> str:
        """Return a signed token for an identity, valid from now for `ttl_s` seconds (default: the issuer's)."""
        now = self._clock()
        claims = {
            "iss": _ISSUER,
            "sub": identity.subject,
            "role": identity.role.value,
            "iat": now,
            "exp": now + (self._ttl_s if ttl_s is None else ttl_s),
        }
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def verify(self, token: str) -> Identity:
        """Return the identity that a token was issued for.

        Raises:
            Unauthenticated: forged, expired, malformed or foreign; which of them stands in the private text only.
        """
        known = self._verified.get(token)
        if known is None:
            known = self._decode(token)
            if len(self._verified) >= MAX_CACHED_TOKENS:
                del self._verified[next(iter(self._verified))]
            self._verified[token] = known
        identity, expires = known
        if self._clock() >= expires:
            self._verified.pop(token, None)
            raise Unauthenticated(_REFUSAL, private=f"token of {identity.role}/{identity.subject} has expired")
        return identity

    def _decode(self, token: str) -> tuple[Identity, float]:
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                # Expiry is checked against our own clock, on every use and not only on the first.
                options={"require": ["exp", "iat", "sub", "iss"], "verify_exp": False, "verify_iat": False},
            )
            return Identity(claims["sub"], Role(claims["role"])), float(claims["exp"])
        except (jwt.InvalidTokenError, KeyError, TypeError, ValueError) as error:
            raise Unauthenticated(_REFUSAL, private=f"token refused: {type(error).__name__}: {error}") from error

    def source(self, identity: Identity) -> Callable[[], str]:
        """Return a callable that gives a token of at least half its lifetime, issuing a new one when needed."""
        token = ""
        renew_at = float("-inf")

        def current() -> str:
            nonlocal token, renew_at
            now = self._clock()
            if now >= renew_at:
                token, renew_at = self.issue(identity), now + self._ttl_s / 2
            return token

        return current


def load_or_create_secret(data_dir: Path) -> SecretStr:
    """Return the signing secret kept in `data_dir/auth.key`, creating it on first use (owner-readable only).

    Every process that works on one data directory of an embedded mesh thus shares one secret without configuration.

    Raises:
        ValueError: the file exists but holds fewer than 32 bytes.
    """
    path = data_dir / "auth.key"
    data_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        staged = data_dir / f".auth.key.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(48))
        try:
            # link(), not rename(): of two processes that start together exactly one wins, and both read the winner's.
            os.link(staged, path)
        except FileExistsError:
            pass
        finally:
            staged.unlink()
    secret = path.read_text().strip()
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise ValueError(
            f"{path} must hold a secret of at least {MIN_SECRET_BYTES} bytes, found {len(secret.encode())}"
        )
    return SecretStr(secret)
