"""Environment over file over defaults; nothing unknown, nothing secret shown, drift reported."""

import time
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from esper.mesh.settings import (
    AuthSettings,
    ChannelOptions,
    ConfigError,
    KeepAlive,
    LoggingSettings,
    Section,
    ServerOptions,
    ServerSettings,
    check_exposure,
    load,
    locate,
    secret_keys,
)

SECRET = "correct horse battery staple, 32 bytes"


class Deep(Section):
    """A section inside a section."""

    limit: int = 3
    """A number."""

    key: SecretStr | None = None
    """A secret that is nested."""


class OonaLike(Section):
    """A service's section."""

    max_batch: int = 128
    """Messages in one batch."""

    max_bytes: int = 1024
    """Bytes in one batch."""

    tags: list[str] = []  # noqa: RUF012  # pydantic copies defaults
    """A list."""

    labels: dict[str, int] = {}  # noqa: RUF012  # pydantic copies defaults
    """A table."""

    deep: Deep = Deep()
    """Nested."""

    maybe: Deep | None = None
    """Nested and optional."""


class Root(Section):
    """A root as a process has it."""

    data_dir: Path = Path(".esper")
    """A plain value at the top."""

    server: ServerSettings = ServerSettings()
    """Server."""

    auth: AuthSettings = AuthSettings()
    """Identity."""

    logging: LoggingSettings = LoggingSettings()
    """Logs."""

    channel: ChannelOptions = ChannelOptions()
    """Channels."""

    oona: OonaLike = OonaLike()
    """A service."""


@pytest.fixture
def write(tmp_path: Path):
    """Writes esper.toml with the schema version on top."""

    def write(text: str, version: str = "schema_version = 1\n") -> Path:
        path = tmp_path / "esper.toml"
        path.write_text(version + text)
        return path

    return write


def test_environment_beats_file_beats_default(write) -> None:
    """Each value comes from the strongest place that has it, and says which that was."""
    file = write('data_dir = "/d"\n[oona]\nmax_batch = 7\nmax_bytes = 8\n[oona.deep]\nlimit = 9\n')
    environ = {"ESPER_OONA__MAX_BATCH": "70", "ESPER_OONA__DEEP__KEY": "k", "HOME": "/root", "OTHER_OONA__X": "1"}
    loaded = load(Root, file=file, environ=environ)
    oona = loaded.value.oona
    assert (70, 8, 9, []) == (oona.max_batch, oona.max_bytes, oona.deep.limit, oona.tags)
    assert oona.deep.key is not None
    assert "k" == oona.deep.key.get_secret_value()
    assert {
        "data_dir": "file",
        "oona.max_batch": "environment",
        "oona.max_bytes": "file",
        "oona.deep.limit": "file",
        "oona.deep.key": "environment",
    } == loaded.origins


def test_lists_and_tables_come_as_json_from_the_environment() -> None:
    """Complex values are JSON; entries of a table may also be variables of their own."""
    environ = {"ESPER_OONA__TAGS": '["a", "b"]', "ESPER_OONA__LABELS__x": "4", "ESPER_DATA_DIR": "/x"}
    value = load(Root, file=None, environ=environ).value
    assert (["a", "b"], {"x": 4}, Path("/x")) == (value.oona.tags, value.oona.labels, value.data_dir)


def test_without_file_and_environment_the_defaults_hold() -> None:
    """Nothing at all is a valid configuration."""
    loaded = load(Root, file=None, environ={})
    assert (Root(), None, {}) == (loaded.value, loaded.file, loaded.origins)
    assert {} == loaded.in_file


def test_all_faults_are_reported_at_once_with_the_nearest_valid_names(write) -> None:
    """Unknown keys and bad values, from file and environment, in one report that names key, origin and expectation."""
    file = write('[server]\nprot = 1\n[oona]\nmax_batch = "many"\n[oona.deep]\nlimti = 1\n[urzza]\nx = 1\n')
    environ = {
        "ESPER_OONA__MAXBATCH": "1",
        "ESPER_OONNA__MAX_BATCH": "1",
        "ESPER_SERVER__PORT": "70000",
        "ESPER_QQQQ": "1",
    }
    with pytest.raises(ConfigError) as caught:
        load(Root, file=file, environ=environ)
    text = str(caught.value)
    assert len(caught.value.violations) == 8
    for line in (
        "environment ESPER_OONA__MAXBATCH: unknown key; did you mean ESPER_OONA__MAX_BATCH",
        "environment ESPER_OONNA__MAX_BATCH: unknown key; did you mean ESPER_OONA?",
        "environment ESPER_QQQQ: unknown key; expected one of ESPER_AUTH, ESPER_CHANNEL",
        f"server.prot ({file}): unknown key; did you mean port",
        f"oona.max_batch ({file}): Input should be a valid integer",
        "found 'many'",
        f"oona.deep.limti ({file}): unknown key; did you mean limit?",
        f"urzza ({file}): unknown key",
        "server.port (environment): Input should be less than or equal to 65535, found '70000'",
    ):
        assert line in text


@pytest.mark.parametrize("spoilt", ['[auth]\nsecret = "hunter2"', '[oona.deep]\nkey = ["hunter2"]'])
def test_a_bad_secret_is_reported_without_its_value(write, spoilt: str) -> None:
    """Even the report of a fault does not show what was meant to be secret."""
    with pytest.raises(ConfigError) as caught:
        load(Root, file=write(spoilt), environ={})
    assert "hunter2" not in repr(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_secret_that_is_no_json_is_not_quoted_either() -> None:
    """A list that is not JSON is named, its text is not."""
    with pytest.raises(ConfigError, match="ESPER_OONA: expected JSON") as caught:
        load(Root, file=None, environ={"ESPER_OONA__TAGS": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_secrets_are_never_printed(write) -> None:
    """Neither the settings, nor where they came from, nor their dump show a secret."""
    loaded = load(Root, file=write(f'[auth]\nsecret = "{SECRET}"\n[oona.deep]\nkey = "inner-secret"\n'), environ={})
    shown = f"{loaded!r} {loaded.value!s} {loaded.value.model_dump(mode='json')} {loaded.value.model_dump_json()}"
    assert SECRET not in shown
    assert "inner-secret" not in shown
    assert {"auth.secret", "oona.deep.key", "oona.maybe.key"} == secret_keys(Root)


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("", "none"),
        ("schema_version = 2\n", "2"),
        ('schema_version = "1"\n', "'1'"),
        ("schema_version = true\n", "True"),
    ],
)
def test_a_file_of_another_schema_version_is_refused(write, version: str, found: str) -> None:
    """A file says which layout it has; any other than ours is named, not guessed at."""
    with pytest.raises(ConfigError, match=f"expected schema_version = 1 at the top of the file, found {found}"):
        load(Root, file=write("[oona]\n", version), environ={})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """Missing, not TOML, not UTF-8: each says what was expected."""
    (tmp_path / "a").write_text("schema_version = [")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for name, finding in (("a", "expected TOML"), ("b", "expected UTF-8"), ("c", "expected a readable file")):
        with pytest.raises(ConfigError, match=f"{name}: {finding}"):
            load(Root, file=tmp_path / name, environ={})


def test_what_the_file_says_is_kept_apart_from_what_is_in_force(write) -> None:
    """Keys of the file as it has them, though the environment says otherwise; secrets do not show by themselves."""
    file = write(f'[server]\nport = 1\n[auth]\nsecret = "{SECRET}"\n[oona]\nmax_batch = 1\n')
    loaded = load(Root, file=file, environ={"ESPER_SERVER__PORT": "2"})
    assert {"server.port": 1, "auth.secret": SECRET, "oona.max_batch": 1} == loaded.in_file
    assert 2 == loaded.value.server.port
    assert SECRET not in repr(loaded)


def test_the_file_is_found_by_variable_or_in_the_directory(tmp_path: Path, write) -> None:
    """$ESPER_CONFIG wins; a name that leads nowhere is an error; no file is fine."""
    assert locate({}, tmp_path) is None
    file = write("")
    assert file == locate({}, tmp_path)
    assert file == locate({"ESPER_CONFIG": str(file)}, Path("/"))
    with pytest.raises(ConfigError, match=r"ESPER_CONFIG names /nowhere.toml, expected an existing file"):
        locate({"ESPER_CONFIG": "/nowhere.toml"}, tmp_path)
    assert Root() == load(Root, file=None, environ={"ESPER_CONFIG": "x"}).value


def test_sections_are_frozen() -> None:
    """A setting cannot be changed after it was read."""
    with pytest.raises(ValidationError, match="frozen"):
        Root().oona.max_batch = 3


@pytest.mark.parametrize(
    "section", [ServerSettings, ServerOptions, ChannelOptions, KeepAlive, AuthSettings, LoggingSettings]
)
def test_every_field_is_documented(section: type[Section]) -> None:
    """Each field carries its docstring, where `esper config show` finds it."""
    assert not [name for name, info in section.model_fields.items() if not info.description]


def test_client_pings_are_never_faster_than_the_server_permits() -> None:
    """Whatever the interval: both sides come from one value, with room for jitter."""
    for interval in (1.0, 30.0, 3600.0):
        keepalive = KeepAlive(interval_s=interval)
        client, server = dict(keepalive.client_options()), dict(keepalive.server_options())
        assert client["grpc.keepalive_time_ms"] >= 2 * server["grpc.http2.min_ping_interval_without_data_ms"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "mesh.example.org"])
def test_strangers_and_open_addresses_exclude_each_other(host: str) -> None:
    """A server that others can reach while anonymous callers count as clients is a configuration error."""
    with pytest.raises(ValueError, match=r"auth\.anonymous_role"):
        check_exposure(ServerSettings(host=host), AuthSettings())
    check_exposure(ServerSettings(host=host), AuthSettings(anonymous_role="none"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "unix:/tmp/s"])
def test_loopback_may_let_anonymous_callers_in(host: str) -> None:
    """On the machine itself the embedded default holds."""
    check_exposure(ServerSettings(host=host), AuthSettings())


def test_one_port_for_two_purposes_is_refused() -> None:
    """Metrics and RPCs need a port each."""
    with pytest.raises(ValidationError, match="must differ"):
        ServerSettings(port=7600, metrics_port=7600)


def test_a_large_configuration_loads_fast(write) -> None:
    """Hundreds of keys in file and environment load in well under 100 ms."""
    labels = "".join(f"k{n} = {n}\n" for n in range(300))
    file = write(f"[server]\nport = 1\n[oona.labels]\n{labels}")
    environ = {f"ESPER_OONA__LABELS__e{n}": str(n) for n in range(300)} | {f"VAR_{n}": "x" * 50 for n in range(500)}
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        value = load(Root, file=file, environ=environ).value
        best = min(best, time.perf_counter() - began)
    assert 600 == len(value.oona.labels)
    assert best < 0.1
