"""What the configuration file said when a mesh was started, against what it says now: key by key, secrets untold.

The mesh leaves a `snapshot` of its file in the home directory; `differences` compares it with the file as it was read
now. Both look at the file alone: what the environment puts over it, here or there, is no drift of the file.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

from esper.mesh.settings import Loaded, flat, secret_keys

__all__ = ["differences", "masked", "snapshot"]

_MASK = "**********"
_DIGEST = "digest of a secret"
_SALT_BYTES = 16
_ABSENT = object()


def masked(loaded: Loaded[Any]) -> dict[str, Any]:
    """Every key in force with its value as JSON data, secrets that are set masked."""
    hidden = secret_keys(type(loaded.value))
    values = flat(loaded.value.model_dump(mode="json"))
    return {key: _MASK if key in hidden and value is not None else value for key, value in values}


def snapshot(loaded: Loaded[Any]) -> dict[str, Any]:
    """The keys of the file with their values as JSON data, secrets as salted digests: to compare, not to read."""
    return {
        key: _fingerprint(value, secrets.token_bytes(_SALT_BYTES)) if hidden else value
        for key, value, hidden in _file(loaded)
    }


def differences(before: Mapping[str, Any], loaded: Loaded[Any]) -> list[str]:
    """One line for each key of the file that is not what a snapshot has."""
    now = {key: (value, hidden) for key, value, hidden in _file(loaded)}
    return [
        f"{key}: started with {_told(before.get(key, _ABSENT), hidden)}, now {_told(value, hidden)}"
        for key in sorted(before.keys() | now.keys())
        for value, hidden in (now.get(key, (_ABSENT, False)),)
        if not _same(before.get(key, _ABSENT), value)
    ]


def _file(loaded: Loaded[Any]) -> list[tuple[str, Any, bool]]:
    """Keys of the file, their values as JSON data, and whether each holds a secret."""
    hidden = secret_keys(type(loaded.value))
    return [
        (key, json.loads(json.dumps(value, default=str)), any(key == s or key.startswith(f"{s}.") for s in hidden))
        for key, value in loaded.in_file.items()
    ]


def _fingerprint(value: Any, salt: bytes) -> dict[str, str]:
    # scrypt, because a secret may be short, and the note lies beside what it protects.
    digest = hashlib.scrypt(json.dumps(value).encode(), salt=salt, n=2**12, r=8, p=1)
    return {_DIGEST: f"{salt.hex()}:{digest.hex()}"}


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_DIGEST}


def _same(before: Any, now: Any) -> bool:
    if _is_fingerprint(before) and now is not _ABSENT:
        return bool(before == _fingerprint(now, bytes.fromhex(before[_DIGEST].partition(":")[0])))
    return bool(before == now)


def _told(value: Any, hidden: bool) -> str:
    if value is _ABSENT:
        return "the default"
    return _MASK if hidden or _is_fingerprint(value) else str(value)
