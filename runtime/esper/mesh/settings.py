"""Settings of every process: nested sections, environment over `esper.toml` over defaults.

Typical use, once, at the edge of a process::

    loaded = load(Settings, file=locate(os.environ, Path.cwd()), environ=os.environ)
    settings = loaded.value

A section derives from `Section`, documents each field by the docstring below it, and keeps secrets in `SecretStr`.
Variables are spelled `ESPER_<SECTION>__<KEY>`, deeper sections with further double underscores.
"""

from esper.mesh._loader import (
    FILE_NAME,
    FILE_VARIABLE,
    SCHEMA_VERSION,
    ConfigError,
    Loaded,
    flat,
    load,
    locate,
    secret_keys,
)
from esper.mesh._sections import (
    AuthSettings,
    ChannelOptions,
    KeepAlive,
    LoggingSettings,
    RetryPolicy,
    Section,
    ServerOptions,
    ServerSettings,
    check_exposure,
)

__all__ = [
    "FILE_NAME",
    "FILE_VARIABLE",
    "SCHEMA_VERSION",
    "AuthSettings",
    "ChannelOptions",
    "ConfigError",
    "KeepAlive",
    "Loaded",
    "LoggingSettings",
    "RetryPolicy",
    "Section",
    "ServerOptions",
    "ServerSettings",
    "check_exposure",
    "flat",
    "load",
    "locate",
    "secret_keys",
]
