"""What a running mesh was configured with, against what the file says now: key by key, secrets masked."""

from collections.abc import Mapping
from typing import Any

from esper.mesh.settings import Loaded, secret_keys

__all__ = ["differences", "from_file", "masked"]

_MASK = "**********"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys; an empty table stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def masked(loaded: Loaded[Any]) -> dict[str, Any]:
    """Every key with its value as JSON data, secrets that are set masked."""
    secrets = secret_keys(type(loaded.value))
    flat = _flatten(loaded.value.model_dump(mode="json"))
    return {key: _MASK if key in secrets and value is not None else value for key, value in flat.items()}


def from_file(loaded: Loaded[Any]) -> dict[str, Any]:
    """The keys that came from the file, with their values."""
    return {key: value for key, value in masked(loaded).items() if loaded.origins.get(key) == "file"}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each key that differs."""
    return [
        f"{key}: started with {_show(before, key)}, now {_show(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _show(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "the default"
