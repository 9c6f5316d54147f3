"""The one loader of configuration: environment over file over defaults, nothing unknown, nothing secret shown."""

import difflib
import hashlib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

from esper.mesh.errors import FieldViolation, InvalidInput

T = TypeVar("T", bound=BaseModel)

SCHEMA_VERSION = 1
"""Version of the layout of `esper.toml` that this build reads."""

ENV_PREFIX = "ESPER_"
FILE_VARIABLE = "ESPER_CONFIG"
FILE_NAME = "esper.toml"
_DELIMITER = "__"


class ConfigError(InvalidInput):
    """The configuration cannot be used; the text lists every fault with its key and origin."""

    default_reason = "CONFIG_INVALID"


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A configuration, and where it came from."""

    value: T
    """The validated root."""

    file: Path | None
    """File that was read, absolute; None when there was none."""

    digest: str | None
    """`sha256:...` of the file's bytes."""

    origins: Mapping[str, str]
    """Dotted key -> `environment` or `file`; keys that are missing here are defaults."""

    in_file: Mapping[str, Any] = field(repr=False)
    """Dotted key -> value, as the file has it, whatever overrides it; out of `repr`: secrets stand in clear."""


def locate(environ: Mapping[str, str], directory: Path) -> Path | None:
    """The configuration file of this process: `$ESPER_CONFIG`, else `esper.toml` in `directory` if there is one.

    Raises:
        ConfigError: `$ESPER_CONFIG` names a file that does not exist.
    """
    named = environ.get(FILE_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ConfigError(f"{FILE_VARIABLE} names {path}, expected an existing file", reason="CONFIG_MISSING")
        return path
    path = directory / FILE_NAME
    return path if path.is_file() else None


def load(cls: type[T], *, file: Path | None, environ: Mapping[str, str]) -> Loaded[T]:
    """Load a configuration: `ESPER_OONA__MAX_BATCH=64` over `[oona] max_batch` in the file over the default.

    Args:
        cls: root model; its fields are sections or plain values.
        file: TOML file with `schema_version = 1`; None for defaults and environment alone.
        environ: the environment; callers at the edge pass `os.environ`, tests a dictionary.

    Raises:
        ConfigError: file missing or not TOML, another schema version, unknown keys, values out of bounds; all faults at
            once, with the nearest valid names, without the value of any secret.
    """
    raw, digest = _read(file)
    faults: list[FieldViolation] = []
    from_env = _environment(cls, environ, faults)
    merged = _merge(raw, from_env)
    value: T | None = None
    try:
        value = cls.model_validate(merged)
    except ValidationError as error:
        faults += _explain(cls, error, merged, dict(flat(from_env)), file)
    if faults or value is None:
        lines = "\n".join(f"  {fault.field}: {fault.description}" for fault in faults)
        raise ConfigError(f"the configuration has {len(faults)} fault(s):\n{lines}", violations=faults)
    origins = dict.fromkeys((key for key, _ in flat(raw)), "file")
    origins.update(dict.fromkeys((key for key, _ in flat(from_env)), "environment"))
    return Loaded(value, None if file is None else file.absolute(), digest, origins, dict(flat(raw)))


def secret_keys(cls: type[BaseModel], prefix: str = "") -> frozenset[str]:
    """Dotted keys of every field that holds a secret, through all nested sections."""
    found: set[str] = set()
    for name, info in cls.model_fields.items():
        for part in _parts(info.annotation):
            if part in {SecretStr, SecretBytes}:
                found.add(prefix + name)
            elif isinstance(part, type) and issubclass(part, BaseModel):
                found |= secret_keys(part, f"{prefix}{name}.")
    return frozenset(found)


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys with their values; an empty table stays one value."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(file: Path | None) -> tuple[dict[str, Any], str | None]:
    if file is None:
        return {}, None
    try:
        data = file.read_bytes()
        raw = tomllib.loads(data.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {_cause(error)}", reason="CONFIG_UNREADABLE") from error
    version = raw.pop("schema_version", None)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        found = "none" if version is None else repr(version)
        raise ConfigError(
            f"{file}: expected schema_version = {SCHEMA_VERSION} at the top of the file, found {found}",
            reason="CONFIG_SCHEMA_VERSION",
        )
    return raw, _digest(data)


class _Environment(EnvSettingsSource):
    """pydantic-settings' reading of nested variables, over an environment that is a parameter."""

    def __init__(self, cls: type[BaseModel], environ: Mapping[str, str]) -> None:
        self._environ = environ
        # The source reads `model_fields` and `model_config` only, which any model has.
        super().__init__(
            cast("type[BaseSettings]", cls),
            case_sensitive=False,
            env_prefix=ENV_PREFIX,
            env_nested_delimiter=_DELIMITER,
        )

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {key.lower(): value for key, value in self._environ.items()}


def _environment(cls: type[BaseModel], environ: Mapping[str, str], faults: list[FieldViolation]) -> dict[str, Any]:
    ours = {key: value for key, value in environ.items() if key.upper().startswith(ENV_PREFIX)}
    ours.pop(FILE_VARIABLE, None)
    usable: dict[str, str] = {}
    for key, value in ours.items():
        path = key[len(ENV_PREFIX) :].lower().split(_DELIMITER.lower())
        fault = _unknown(cls, path, f"environment {key}")
        if fault is None:
            usable[key] = value
        else:
            faults.append(fault)
    try:
        return _Environment(cls, usable)()
    except SettingsError as error:
        # The library's text quotes the value; ours names the field and the expectation only.
        name = str(error).partition('"')[2].partition('"')[0]
        text = "expected JSON for a list or table, found something else"
        faults.append(FieldViolation(f"environment {ENV_PREFIX}{name.upper()}", text))
        return {}


def _unknown(cls: type[BaseModel], path: list[str], label: str) -> FieldViolation | None:
    """Walk a path through nested models; None when it ends in (or below) a real field."""
    model: type[BaseModel] = cls
    for depth, name in enumerate(path):
        info = model.model_fields.get(name)
        if info is None:
            spelled = ENV_PREFIX + _DELIMITER.join(path[:depth]).upper() + (_DELIMITER if depth else "")
            return FieldViolation(label, _suggest(name, model, lambda n, s=spelled: s + n.upper()), "unknown")
        nested = [p for p in _parts(info.annotation) if isinstance(p, type) and issubclass(p, BaseModel)]
        if not nested:
            return None
        model = nested[0]
    return None


def _suggest(name: str, model: type[BaseModel], spell: Any = str) -> str:
    valid = list(model.model_fields)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if near:
        return "unknown key; did you mean " + " or ".join(spell(n) for n in near) + "?"
    return "unknown key; expected one of " + ", ".join(spell(n) for n in sorted(valid))


def _explain(
    cls: type[BaseModel],
    error: ValidationError,
    merged: Mapping[str, Any],
    from_env: Mapping[str, Any],
    file: Path | None,
) -> Iterator[FieldViolation]:
    secrets = secret_keys(cls)
    for fault in error.errors(include_url=False, include_context=False):
        path = [str(part) for part in fault["loc"]]
        key = ".".join(path)
        origin = "environment" if key in from_env else str(file) if _given(merged, path) else "default"
        label = f"{key or 'configuration'} ({origin})"
        if fault["type"] == "extra_forbidden":
            yield FieldViolation(label, _suggest(path[-1], _model_at(cls, path[:-1])), "unknown")
            continue
        text = fault["msg"].removeprefix("Value error, ")
        scalar = isinstance(fault["input"], str | int | float | bool)
        if scalar and not any(key == s or key.startswith(s + ".") for s in secrets):
            text += f", found {fault['input']!r}"
        yield FieldViolation(label, text, fault["type"])


def _model_at(cls: type[BaseModel], path: list[str]) -> type[BaseModel]:
    model = cls
    for name in path:
        info = model.model_fields.get(name)
        nested = [] if info is None else [p for p in _parts(info.annotation) if _is_model(p)]
        if nested:
            model = nested[0]
    return model


def _is_model(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and everything nested in it: unions, lists, mappings, Annotated."""
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def _given(data: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(data, Mapping) or name not in data:
            return False
        data = data[name]
    return True


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"expected a readable file, found: {os.strerror(error.errno) if error.errno else error}"
    if isinstance(error, UnicodeDecodeError):
        return f"expected UTF-8, found another encoding at byte {error.start}"
    return f"expected TOML, found: {error}"
