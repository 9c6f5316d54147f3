"""Configuration as plain data and back, and changes to it by dotted path.

`decode` is strict: an unknown field, a missing one or a value of another type is an error that names the path, what was
expected and what was found. It reads what `encode` writes, and what a person or a Struct on the wire wrote.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.tolaria.config import RunConfig

__all__ = ["apply", "decode", "encode"]

_T = TypeVar("_T")
_FIXED = frozenset({"recipe"})


def encode(config: object) -> Any:
    """A configuration as dictionaries, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: encode(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [encode(item) for item in config]
    return config


def decode(kind: type[_T], data: object) -> _T:
    """Build a configuration from plain data.

    Raises:
        InvalidInput: reason OVERRIDE_UNKNOWN or OVERRIDE_INVALID, with the path in the metadata.
    """
    return typing.cast("_T", _decode(kind, data, ""))


def apply(config: RunConfig, overrides: Mapping[str, object]) -> RunConfig:
    """Change fields by dotted path (``{"schedule.epochs": 10}``); all at once, so cross-field checks see the whole.

    Raises:
        InvalidInput: OVERRIDE_UNKNOWN for a path that does not exist (its neighbours are listed), OVERRIDE_INVALID
        for a
            value of another type, for a value out of bounds, and for fields that do not go together.
    """
    data = encode(config)
    for path, value in overrides.items():
        _replace(data, path, value)
    return decode(type(config), data)


def _replace(data: dict[str, Any], path: str, value: object) -> None:
    *sections, leaf = path.split(".")
    here: Any = data
    walked = ""
    for name in sections:
        here = here.get(name) if isinstance(here, dict) else None
        walked = f"{walked}.{name}" if walked else name
        if not isinstance(here, dict):
            raise _unknown(path, data, f"no section {walked!r}")
    if leaf not in here or path in _FIXED:
        raise _unknown(path, here, f"no field {leaf!r}" + (f" in {walked!r}" if walked else ""))
    here[leaf] = value


def _unknown(path: str, near: Mapping[str, Any], finding: str) -> InvalidInput:
    names = [name for name in near if name not in _FIXED]
    close = difflib.get_close_matches(path.rsplit(".", 1)[-1], names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InvalidInput(
        f"override {path!r}: {finding}, expected one of {', '.join(names)}{hint}",
        reason="OVERRIDE_UNKNOWN",
        metadata={"path": path, "expected": ", ".join(names)},
    )


def _wrong(path: str, expected: str, found: object) -> InvalidInput:
    text = repr(found)
    return InvalidInput(
        f"{path or 'configuration'}: expected {expected}, found {text[:80]} ({type(found).__name__})",
        reason="OVERRIDE_INVALID",
        metadata={"path": path, "expected": expected},
    )


def _decode(kind: Any, data: object, path: str) -> object:
    origin = typing.get_origin(kind)
    if origin in {typing.Union, types.UnionType}:
        return _tagged(typing.get_args(kind), data, path)
    if origin is typing.Literal:
        options = typing.get_args(kind)
        if data not in options:
            raise _wrong(path, " or ".join(repr(o) for o in options), data)
        return data
    if origin is tuple:
        return _tuple(typing.get_args(kind), data, path)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, path)
    return _scalar(kind, data, path)


def _tagged(kinds: tuple[Any, ...], data: object, path: str) -> object:
    by_tag = {next(f.default for f in dataclasses.fields(k) if f.name == "kind"): k for k in kinds}
    tag = data.get("kind") if isinstance(data, dict) else None
    if tag not in by_tag:
        raise _wrong(f"{path}.kind", " or ".join(repr(t) for t in by_tag), tag)
    return _decode(by_tag[tag], data, path)


def _tuple(kinds: tuple[Any, ...], data: object, path: str) -> object:
    if not isinstance(data, list | tuple):
        raise _wrong(path, "a list", data)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(data) != len(kinds):
        raise _wrong(path, f"a list of {len(kinds)}", data)
    return tuple(_decode(k, item, f"{path}[{i}]") for i, (k, item) in enumerate(zip(kinds, data, strict=True)))


def _dataclass(kind: Any, data: object, path: str) -> object:
    if not isinstance(data, dict):
        raise _wrong(path, "a section", data)
    hints = typing.get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise _unknown(f"{path}.{name}" if path else str(name), hints, f"no field {name!r}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise _wrong(f"{path}.{missing[0]}" if path else missing[0], "a value", None)
    return kind(**{name: _decode(hints[name], v, f"{path}.{name}" if path else name) for name, v in data.items()})


def _scalar(kind: Any, data: object, path: str) -> object:
    if kind is bool or isinstance(data, bool):
        if kind is not bool or not isinstance(data, bool):
            raise _wrong(path, "true or false" if kind is bool else _NAMES[kind], data)
        return data
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)  # JSON, and a Struct on the wire, know only one kind of number
    if kind is float and isinstance(data, int | float):
        if not math.isfinite(data):
            raise _wrong(path, "a finite number", data)
        return float(data)
    if not isinstance(data, kind):
        raise _wrong(path, _NAMES[kind], data)
    return data


_NAMES = {int: "a whole number", float: "a number", str: "a text"}
