"""Logging: structured, scrubbed, written by another thread, bounded with a policy, cheap for the caller."""

import io
import json
import logging as stdlib
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from esper.mesh import context
from esper.mesh._writer import LogWriter
from esper.mesh.identity import Identity, Role
from esper.mesh.logging import LoggingSettings, configure, dropped, flush, get_logger, shutdown

log = get_logger("esper.test", fixed="always")


def start(**settings: object) -> io.StringIO:
    """Configure logging into a buffer."""
    out = io.StringIO()
    configure(LoggingSettings(**{"format": "json", **settings}), stream=lambda: out)
    return out


def records(out: io.StringIO) -> list[dict[str, object]]:
    """What was written, parsed."""
    assert flush()
    return [json.loads(line, parse_constant=_not_json) for line in out.getvalue().splitlines()]


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def test_a_record_is_one_json_object_with_its_fields() -> None:
    """Timestamp, level, event, logger, bound fields and the call's own, each on one line."""
    out = start()
    log.bind(run="r1").info("kernel\npublished", n=3, ratio=0.5, path=Path("/x"), when=datetime(2026, 1, 2, tzinfo=UTC))
    (record,) = records(out)
    assert datetime.fromisoformat(record.pop("timestamp")).tzinfo is not None
    assert {
        "level": "info", "event": "kernel\npublished", "logger": "esper.test", "fixed": "always", "run": "r1", "n": 3,
        "ratio": 0.5, "path": "/x", "when": "2026-01-02 00:00:00+00:00",
    } == record  # fmt: skip


def test_numbers_that_json_does_not_have_are_text() -> None:
    """A loss that is no number is logged as one reads it, at any depth, and every line stays JSON."""
    out = start()
    log.info("diverged", loss=float("nan"), losses=[1.0, float("inf")], nested={"low": float("-inf")})
    (record,) = records(out)
    assert ("nan", [1.0, "inf"], {"low": "-inf"}) == (record["loss"], record["losses"], record["nested"])


def test_levels_below_the_threshold_are_not_written() -> None:
    """`warning` writes warnings, errors and critical records, and nothing else."""
    out = start(level="warning")
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(log, level)(level)
    assert ["warning", "error", "critical"] == [record["event"] for record in records(out)]


def test_records_of_a_call_carry_request_id_and_caller() -> None:
    """What a handler logs can be found under the request id that the client saw."""
    out = start()
    with context.scope(identity=Identity("alice", Role.CLIENT), request_id="r-9"), context.bind(run="r1"):
        log.info("inside")
    log.info("outside")
    inside, outside = records(out)
    assert ("r-9", "client/alice", "r1") == (inside["request_id"], inside["caller"], inside["run"])
    assert not {"request_id", "caller", "run", "rpc"} & set(outside)


def test_secrets_are_scrubbed_from_events_fields_and_tracebacks() -> None:
    """Wherever a credential hides in a record, it is not written."""
    out = start()
    try:
        raise ValueError("cannot reach postgresql://esper:hunter2@db/urza")  # noqa: TRY301  # the traceback is the point
    except ValueError:
        log.exception("failed with password=hunter2", token="hunter2", nested={"a": [{"apiKey": "hunter2"}]})
    stdlib.getLogger("sqlalchemy").warning("connecting with %s", "password=hunter2")
    first, second = records(out)
    assert "hunter2" not in out.getvalue()
    assert ("error", "warning", "sqlalchemy") == (first["level"], second["level"], second["logger"])
    assert "ValueError: cannot reach postgresql://esper:[redacted]@db/urza" in first["exception"]


def test_exceptions_of_ours_bring_their_private_text_to_the_log() -> None:
    """The private text is for the log, and for nobody else."""
    from esper.mesh.errors import NotFound

    out = start()
    log.error("refused", exc_info=NotFound("no kernel", private="row 7 is gone"))
    log.error("plain", exc_info=(ValueError, ValueError("v"), None))
    log.error("nothing to tell", exc_info=True)  # noqa: LOG014  # on purpose
    first, second, third = records(out)
    assert "row 7 is gone" in first["exception"]
    assert "ValueError: v" in second["exception"]
    assert third["exception"] is None


def test_values_are_those_of_the_moment_of_the_call() -> None:
    """What a caller changes afterwards does not change the record; odd objects never break the caller."""

    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    out = start()
    values, deep = [1, 2], []
    for _ in range(40):
        deep = [deep]
    log.info(
        "x",
        long="z" * 40_000,
        values=values,
        payload=b"secret bytes",
        odd=Odd(),
        role=Role.URZA,
        deep=deep,
        many=set(range(5000)),
    )
    values.append(3)
    (record,) = records(out)
    assert ([1, 2], "<12 bytes>", "urza", 1000) == (
        record["values"], record["payload"], record["role"], len(record["many"]),
    )  # fmt: skip
    assert str(record["long"]).endswith("z… (7232 more characters)")
    assert "without repr: RuntimeError" in record["odd"]


def test_console_lines_are_for_people() -> None:
    """The console format is one readable line, without colours outside a terminal."""
    out = start(format="console")
    log.info("kernel published", kernel="k1")
    flush()
    assert "[info     ] kernel published" in out.getvalue()
    assert "kernel=k1" in out.getvalue()
    assert "\x1b[" not in out.getvalue()


def test_auto_is_console_on_a_terminal_only() -> None:
    """Whether the stream is a terminal decides."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    configure(LoggingSettings(format="auto"), stream=lambda: out)
    log.info("hello")
    flush()
    assert "\x1b[" in out.getvalue()
    plain = start(format="auto")
    log.info("hello")
    assert "hello" == records(plain)[0]["event"]


def test_unconfigured_only_warnings_are_written_and_at_once(capsys) -> None:
    """Importing Esper into a script makes no noise, yet hides no trouble."""
    log.info("silent")
    log.warning("heard", password="hunter2")
    err = capsys.readouterr().err
    assert "heard" in err
    assert "silent" not in err
    assert "hunter2" not in err
    assert (0, True) == (dropped(), flush())


class Gate:
    """A stream that blocks until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.lines: list[str] = []

    def write(self, text: str) -> None:
        self.entered.set()
        assert self.open.wait(10)
        self.lines += text.splitlines()

    def flush(self) -> None:
        """Nothing is buffered here."""


def test_a_full_queue_drops_and_counts_but_never_waits_and_keeps_errors() -> None:
    """The policy: below error dropped, an error replaces the oldest, the loss is written as soon as there is room."""
    gate = Gate()
    writer = LogWriter(lambda record: f"{record['level']} {record['event']} {record.get('count', '')}", lambda: gate, 3)
    writer.put({"level": "info", "event": "first"})
    assert gate.entered.wait(10)
    began = time.monotonic()
    for number in range(10):
        writer.put({"level": "info", "event": str(number)})
    writer.put({"level": "error", "event": "bad"})
    assert time.monotonic() - began < 1
    assert 8 == writer.dropped
    assert not writer.flush(0.01)
    gate.open.set()
    assert writer.flush()
    assert ["info first", "info 1", "info 2", "error bad", "warning log records dropped 8"] == [
        line.strip() for line in gate.lines
    ]
    writer.close()
    writer.put({"level": "error", "event": "too late"})
    assert 5 == len(gate.lines)


def test_records_that_cannot_be_rendered_or_written_harm_nobody() -> None:
    """A broken renderer loses its record, a broken stream is counted, the thread lives on."""
    out = io.StringIO()
    streams = [io.StringIO(), out]
    streams[0].close()

    def render(record: dict[str, object]) -> str:
        if record["event"] == "bad":
            raise KeyError("x")
        return str(record["event"])

    writer = LogWriter(render, lambda: streams.pop(0) if len(streams) > 1 else out, 10)
    writer.put({"event": "lost"})
    assert writer.flush()
    assert 1 == writer.dropped
    writer.put({"event": "bad"})
    writer.put({"event": "good"})
    assert writer.flush()
    assert ["a log record could not be rendered: KeyError", "good"] == out.getvalue().splitlines()
    writer.close()


def test_the_caller_pays_less_than_a_tenth_of_a_millisecond() -> None:
    """The binding limit, in processor time of the caller's thread, with a stream that is slow."""
    gate = Gate()
    configure(LoggingSettings(format="json", queue_size=100_000), stream=lambda: gate)
    best = float("inf")
    for _ in range(5):
        began = time.thread_time()
        for number in range(200):
            log.info("kernel published", kernel="sha256:" + "0" * 64, number=number, site="encoder.0", loss=0.25)
        best = min(best, (time.thread_time() - began) / 200)
    gate.open.set()
    assert best < 1e-4


def test_reconfiguration_and_shutdown_restore_the_root_logger() -> None:
    """Handlers do not pile up, and what was taken is given back."""
    before = list(stdlib.getLogger().handlers)
    start()
    second = start(level="debug")
    assert len(before) + 1 == len(stdlib.getLogger().handlers)
    stdlib.getLogger("x").debug("low")
    log.debug("ours")
    assert ["low", "ours"] == [record["event"] for record in records(second)]
    shutdown()
    assert before == stdlib.getLogger().handlers


def test_info_of_libraries_is_left_out_but_their_tracebacks_are_not() -> None:
    """Libraries are heard from warning on; their exceptions come with tracebacks."""
    out = start(level="error")
    stdlib.getLogger("x").warning("below the threshold")
    try:
        1 / 0  # noqa: B018  # raised on purpose
    except ZeroDivisionError:
        stdlib.getLogger("x").exception("failed")
    (record,) = records(out)
    assert "ZeroDivisionError" in record["exception"]


def test_what_waits_at_the_end_of_a_process_is_written() -> None:
    """A process that just ends still writes its last records."""
    code = (
        "from esper.mesh.logging import *\n"
        "configure(LoggingSettings(format='json'))\n"
        "[get_logger('x').info('n', n=n) for n in range(500)]\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 500 == len(out.stderr.splitlines())
