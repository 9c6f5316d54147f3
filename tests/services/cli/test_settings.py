"""The root of the configuration: quick, strict, discreet."""

import json
import statistics
import time

import pytest

from esper.cli.command_settings import CommandSettings
from esper.cli.roster import SERVICES
from esper.cli.settings import Settings
from esper.cli.state import State
from esper.mesh.settings import ConfigError, load

SECRET = "correct-horse-battery-staple-0123456789"


def toml_of(values, prefix=""):
    """Nested dictionaries as TOML; what is not set is left out."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict | None)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{key}]", *toml_of(value, f"{prefix}{key}.")]
    return lines


def without_none(values):
    """TOML has no word for nothing."""
    return {k: without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


@pytest.fixture
def full_file(tmp_path):
    """Every setting of every section, written out."""
    values = without_none(Settings().model_dump(mode="json"))
    values["addresses"] = {name: f"10.0.0.{n}:7600" for n, name in enumerate(SERVICES)}
    values["auth"]["secret"] = SECRET
    path = tmp_path / "esper.toml"
    path.write_text("schema_version = 1\n" + "\n".join(toml_of(values)), encoding="utf-8")
    return path


def test_the_largest_sensible_configuration_loads_in_a_blink(full_file):
    """Every key in the file and one variable for each of its plain keys: well under 100 ms."""
    environ = {"ESPER_SERVER__PORT": "7700", "ESPER_LOGGING__LEVEL": "error", "ESPER_HOME": "/srv/esper"}
    took = []
    for _ in range(5):
        began = time.process_time()
        loaded = load(Settings, file=full_file, environ=environ)
        took.append(time.process_time() - began)
    assert statistics.median(took) < 0.1
    assert 7700 == loaded.value.server.port
    assert len(loaded.origins) > 60


def test_every_service_has_a_section():
    """The root knows the section of each service, and starts with defaults alone."""
    assert set(SERVICES) <= set(Settings.model_fields)
    assert Settings() == load(Settings, file=None, environ={}).value


@pytest.mark.parametrize("key", ["oonah", "oona.max_batches", "addresses.nissa", "server.prot"])
def test_unknown_keys_are_refused(tmp_path, key):
    """A key that nothing reads is a mistake, in any section."""
    table, _, leaf = key.rpartition(".")
    path = tmp_path / "esper.toml"
    path.write_text(f"schema_version = 1\n{f'[{table}]' if table else ''}\n{leaf} = 'x'\n", encoding="utf-8")
    with pytest.raises(ConfigError):
        load(Settings, file=path, environ={})


def test_a_command_reads_no_more_than_it_needs():
    """Where the file says nothing of services, a command that asks a mesh does without importing them."""
    settings = State(environ={"ESPER_MESH": "127.0.0.1:7600"}).settings
    assert CommandSettings is type(settings)
    assert "127.0.0.1:7600" == settings.mesh


def test_a_command_reads_sections_of_services_too(full_file):
    """Where it does, the whole is read and checked."""
    assert isinstance(State(config=full_file, environ={}).settings, Settings)


def test_help_imports_no_service(run_python):
    """`esper --help` answers without services, torch or the chassis."""
    run_python(
        "import sys; from typer.testing import CliRunner; from esper.cli.main import app\n"
        "assert 'Start with' in CliRunner().invoke(app, ['--help']).stdout\n"
        "heavy = {'torch', 'sqlalchemy', 'alembic', 'pydantic_settings', 'esper.oona', 'structlog', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


def test_secrets_are_never_shown(cli, full_file):
    """`config show` masks secrets, in tables and in JSON; everything else is there with its origin."""
    for arguments in ((), ("--json",), ("--changed",)):
        shown = cli("--config", full_file, "config", "show", *arguments).stdout
        assert SECRET not in shown
        assert "**********" in shown
    rows = {row["key"]: row for row in json.loads(cli("--config", full_file, "config", "show", "--json").stdout)}
    assert {"key": "auth.secret", "value": "**********", "origin": "file"} == rows["auth.secret"]


def test_show_tells_the_origin(cli, tmp_path, monkeypatch):
    """Each value comes from the command line, the environment, the file or the defaults, and says so."""
    monkeypatch.setenv("ESPER_SERVER__PORT", "7701")
    (tmp_path / "c.toml").write_text("schema_version = 1\n[logging]\nlevel = 'error'\n", encoding="utf-8")
    shown = cli("--config", tmp_path / "c.toml", "--home", tmp_path, "config", "show", "--json").stdout
    origins = {row["key"]: row["origin"] for row in json.loads(shown)}
    wanted = {"home": "command line", "server.port": "environment", "logging.level": "file", "mesh": "default"}
    assert wanted == {key: origins[key] for key in wanted}


def test_show_changed_with_nothing_changed(cli, tmp_path, monkeypatch):
    """Defaults alone: one line that says so."""
    monkeypatch.chdir(tmp_path)
    assert "every setting has its default" in cli("config", "show", "--changed").stdout


def test_check_accepts_and_refuses(cli, tmp_path, monkeypatch):
    """`config check` ends with 0 for a good file and 2, with every fault, for a bad one."""
    monkeypatch.chdir(tmp_path)
    assert "no file, defaults and environment" in cli("config", "check").stdout
    path = tmp_path / "esper.toml"
    path.write_text("schema_version = 1\n[oona]\nmax_batchs = 3\n[server]\nport = 99999\n", encoding="utf-8")
    refused = cli("config", "check", code=2).stderr
    assert "2 fault(s)" in refused
    assert "max_batchs" in refused
    assert "99999" in refused
    path.write_text("not = = toml", encoding="utf-8")
    assert "expected TOML" in cli("runs", "list", code=2).stderr
    assert "expected a readable file" in cli("--config", tmp_path / "absent.toml", "config", "check", code=2).stderr


def test_check_reports_drift(cli, tmp_path, monkeypatch):
    """Beside a running mesh, `config check` names each key that the file has changed since, and ends with 1."""
    from esper.cli.drift import snapshot
    from esper.cli.lock import HomeLock

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "esper.toml"

    def write(text):
        path.write_text(f"schema_version = 1\nhome = '{tmp_path}/h'\n{text}", encoding="utf-8")

    first, second = "a" * 32, "b" * 32
    write(f"[logging]\nlevel = 'error'\n[auth]\nsecret = '{first}'\n")
    # The environment of the mesh is not that of the one who asks: neither is the file.
    loaded = State(environ={"ESPER_LOGGING__LEVEL": "debug"}).loaded
    lock = HomeLock(tmp_path / "h")
    lock.announce("127.0.0.1:7600", loaded.digest or "", snapshot(loaded))
    assert first not in (tmp_path / "h" / "mesh.json").read_text(encoding="utf-8")
    try:
        assert "runs with it" in cli("config", "check").stdout
        write(f"# a remark\n[auth]\nsecret = '{first}'\n[logging]\nlevel = 'error'\n")
        assert "only comments or layout" in cli("config", "check").stdout
        write(f"[logging]\nlevel = 'error'\n[auth]\nsecret = '{second}'\n")
        told = cli("config", "check", code=1).stdout
        assert "auth.secret: started with **********, now **********" in told
        write("[logging]\nqueue_size = 99\n")
        told = cli("config", "check", code=1).stdout
        assert "logging.level: started with error, now the default" in told
        assert "logging.queue_size: started with the default, now 99" in told
        assert "auth.secret: started with **********, now the default" in told
    finally:
        lock.release()
