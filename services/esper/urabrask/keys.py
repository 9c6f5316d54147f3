"""The engine's signing keys: one that signs, and those that it must sign with no more.

`signing.key` holds the private key (JSON, mode 0600). A key that the library has revoked is retired: its public half is
kept in `retired.json`, so that its verdicts are known and refused, and a new key is made.
"""

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from esper.kasmina.kernels.signing import PublicKey, SigningKey, TrustStore
from esper.mesh.errors import Conflict, EsperError

__all__ = ["KeyRing"]

_KEY, _RETIRED = "signing.key", "retired.json"


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of one engine."""

    current: SigningKey
    """Signs."""
    create_time: datetime
    """When the current key was made, UTC."""
    retired: tuple[PublicKey, ...] = ()
    """Revoked by the library."""

    @property
    def trust(self) -> TrustStore:
        """What verifies this engine's verdicts."""
        return TrustStore([self.current.public, *self.retired])

    @classmethod
    def open(cls, directory: Path, clock: Callable[[], datetime]) -> "KeyRing":
        """Load the keys of a data directory, making the first one where there is none.

        Raises:
            Conflict: reason KEY_EXPOSED: others can read the private key; reason KEY_UNREADABLE: it is no key.
        """
        path = directory / _KEY
        if not path.exists():
            _write_new(path, SigningKey.generate(), clock())
        current, create_time = _read(path)
        try:
            listing = json.loads((directory / _RETIRED).read_text())
        except FileNotFoundError:
            listing = []
        return cls(current, create_time, tuple(PublicKey(bytes.fromhex(text), revoked=True) for text in listing))

    @classmethod
    def renew(cls, directory: Path, clock: Callable[[], datetime]) -> "KeyRing":
        """Retire the current key and make another."""
        old = cls.open(directory, clock)
        listing = [key.raw.hex() for key in (*old.retired, old.current.public)]
        # The list first: a crash in between leaves a key that is current and retired, which counts as retired.
        _replace(directory / _RETIRED, json.dumps(listing).encode())
        _write_new(directory / _KEY, SigningKey.generate(), clock())
        return cls.open(directory, clock)


def _write_new(path: Path, key: SigningKey, now: datetime) -> None:
    document = {"key": key.to_bytes().hex(), "create_time": now.astimezone(UTC).isoformat()}
    _replace(path, json.dumps(document).encode())


def _replace(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all, readable by its owner alone from its first byte on."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> tuple[SigningKey, datetime]:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise Conflict(
            f"signing key of the evaluation engine: expected a file for its owner alone (0600), found {mode:04o}",
            reason="KEY_EXPOSED",
            private=str(path),
        )
    try:
        document = json.loads(path.read_bytes())
        return SigningKey.from_bytes(bytes.fromhex(document["key"])), datetime.fromisoformat(document["create_time"])
    except (ValueError, KeyError, TypeError, EsperError) as error:
        raise Conflict(
            "signing key of the evaluation engine: expected the file that this engine wrote, found something else",
            reason="KEY_UNREADABLE",
            private=f"{path}: {error!r}",
        ) from error
