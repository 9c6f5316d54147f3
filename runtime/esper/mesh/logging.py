"""Structured logging: one event and its fields, scrubbed, written by a thread of its own.

Typical use::

    log = get_logger(__name__)                       # at the top of a module
    log.info("kernel published", kernel=kernel_id)   # about 10 us; never waits for a disk or a terminal

    configure(settings.logging)                      # once, at the edge of a process
    ...
    shutdown()                                       # at its end: write what waits

Until `configure` is called (a researcher's own script that merely imports Esper) only warnings and errors are written,
and at once. Records of the standard library's `logging` (grpc, SQLAlchemy, Alembic) take the same way out.
Every record passes `scrub` before it is written. `_writer.LogWriter` says what happens when the queue is full.
"""

import atexit
import io
import json
import logging as stdlib
import math
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import Enum
from pathlib import PurePath
from typing import Any, TextIO, cast
from uuid import UUID

import structlog
from structlog.contextvars import merge_contextvars

from esper.mesh._sections import LoggingSettings
from esper.mesh._writer import LogWriter, Record, standard_error
from esper.mesh.context import log_fields
from esper.mesh.scrub import scrub

__all__ = ["LoggingSettings", "configure", "dropped", "flush", "get_logger", "shutdown"]

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_MAX_DEPTH = 12
_MAX_ITEMS = 1000
_MAX_TEXT = 32_768
_PLAIN = frozenset({str, int, float, bool})
_FIRST = ("timestamp", "level", "event", "logger")


@dataclass
class _State:
    """What `configure` decides; read on every call."""

    threshold: int = _LEVELS["warning"]
    writer: LogWriter | None = None
    handler: stdlib.Handler | None = None
    direct: Callable[[Record], str] | None = None


_state = _State()


def _freeze(value: Any, depth: int = 0) -> Any:  # noqa: PLR0911  # one return per kind of value
    """Snapshot a value on the caller's thread: whatever the caller does to it later must not show in the record."""
    if value is None or type(value) in _PLAIN:
        if type(value) is float and not math.isfinite(value):
            return str(value)  # "nan": JSON has no such numbers, and readers of ours must not fail at them
        return _cut(value) if type(value) is str and len(value) > _MAX_TEXT else value
    if isinstance(value, Enum):
        return _freeze(value.value, depth + 1)
    if isinstance(value, datetime | date | UUID | PurePath):
        return str(value)
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return {str(k): _freeze(v, depth + 1) for k, v in list(value.items())[:_MAX_ITEMS]}
        if isinstance(value, list | tuple | set | frozenset):
            return [_freeze(item, depth + 1) for item in list(value)[:_MAX_ITEMS]]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"  # payloads are no log text, and could hold anything
    try:
        return _cut(repr(value))
    except Exception as error:  # noqa: BLE001  # a broken __repr__ of somebody else's must not break the caller
        return f"<{type(value).__name__} without repr: {type(error).__name__}>"


def _cut(text: str) -> str:
    """Bound what one value can cost the writer."""
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}… ({len(text) - _MAX_TEXT} more characters)"


def _capture(name: str, method: str, event: MutableMapping[str, Any]) -> Any:
    """The only processor: everything that can wait (scrubbing, rendering, writing) is left to the writer's thread."""
    level = "error" if method == "exception" else "warning" if method == "warn" else method
    if _LEVELS.get(level, 20) < _state.threshold:
        raise structlog.DropEvent
    event = merge_contextvars(name, method, event)
    exc_info = event.pop("exc_info", method == "exception" or None)
    record: Record = {"timestamp": datetime.now(UTC), "level": level, "logger": name, **log_fields()}
    for key, value in event.items():
        record[key] = _freeze(value)
    if exc_info:
        record["exception"] = _exception(exc_info)
    _emit(record)
    raise structlog.DropEvent


def _exception(exc_info: Any) -> Any:
    """Format a traceback now: keeping it for the writer would keep the caller's frames, and their tensors, alive."""
    if isinstance(exc_info, BaseException):
        error: BaseException | None = exc_info
    elif isinstance(exc_info, tuple):
        error = exc_info[1]
    else:
        import sys

        error = sys.exc_info()[1]
    if error is None:
        return None
    private = getattr(error, "private", None)
    text = _cut("".join(traceback.format_exception(error)).rstrip())
    return f"{text}\nprivate: {private}" if private else text


def _emit(record: Record) -> None:
    writer = _state.writer
    if writer is not None:
        writer.put(record)
        return
    if _state.direct is None:
        _state.direct = _renderer("auto", standard_error)
    stream = standard_error()
    stream.write(_state.direct(record) + "\n")
    stream.flush()


class _Filtering(structlog.BoundLoggerBase):
    """The six methods of a structured logger, with structlog's own binding."""

    def debug(self, event: str, **fields: Any) -> None:
        """Log for somebody who hunts a defect."""
        self._proxy_to_logger("debug", event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log what an operator wants to have happened."""
        self._proxy_to_logger("info", event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log what works, but not as it should."""
        self._proxy_to_logger("warning", event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log what failed."""
        self._proxy_to_logger("error", event, **fields)

    def critical(self, event: str, **fields: Any) -> None:
        """Log what ends the process."""
        self._proxy_to_logger("critical", event, **fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log what failed, with the traceback of the exception being handled."""
        self._proxy_to_logger("exception", event, **fields)


def get_logger(name: str, **fields: Any) -> structlog.stdlib.BoundLogger:
    """Return a structured logger. It may be made before `configure` is called and follows every later configuration.

    Leaves structlog's own global configuration alone: the host program may use structlog for itself.
    """
    logger = structlog.wrap_logger(
        name,  # structlog hands the wrapped object to every processor: the name is all that ours needs
        processors=[_capture],
        wrapper_class=_Filtering,
        context_class=dict,
        cache_logger_on_first_use=True,
        **fields,
    )
    # The annotation gives callers structlog's familiar methods; the six that exist are those of `_Filtering`.
    return cast("structlog.stdlib.BoundLogger", logger)


def configure(settings: LoggingSettings, *, stream: Callable[[], TextIO] = standard_error) -> None:
    """Start writing records as the settings say; called again, it replaces the former configuration.

    Args:
        settings: level, format, queue.
        stream: gives the text stream to write to, asked for at every write.
    """
    shutdown()
    _state.threshold = _LEVELS[settings.level]
    _state.writer = LogWriter(_renderer(settings.format, stream), stream, settings.queue_size)
    _state.handler = _Bridge()
    root = stdlib.getLogger()
    root.addHandler(_state.handler)
    # Libraries are chatty at info; their warnings are what an operator needs unless he debugs.
    root.setLevel(stdlib.DEBUG if settings.level == "debug" else max(stdlib.WARNING, _state.threshold))
    atexit.register(shutdown)


def shutdown() -> None:
    """Write what waits and go back to the unconfigured state."""
    writer, handler = _state.writer, _state.handler
    _state.writer = _state.handler = _state.direct = None
    _state.threshold = _LEVELS["warning"]
    if handler is not None:
        stdlib.getLogger().removeHandler(handler)
        stdlib.getLogger().setLevel(stdlib.WARNING)
    if writer is not None:
        writer.close()
        atexit.unregister(shutdown)


def flush(timeout_s: float = 5.0) -> bool:
    """Wait until every record made so far is written; False when that took longer than the timeout."""
    return _state.writer is None or _state.writer.flush(timeout_s)


def dropped() -> int:
    """Records lost since `configure`."""
    return 0 if _state.writer is None else _state.writer.dropped


class _Bridge(stdlib.Handler):
    """Hands records of the standard library's logging to the same writer."""

    def emit(self, record: stdlib.LogRecord) -> None:
        level = record.levelname.lower()
        if _LEVELS.get(level, record.levelno) < _state.threshold:
            return
        out: Record = {
            "timestamp": datetime.fromtimestamp(record.created, UTC),
            "level": level,
            **log_fields(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        if record.exc_info and record.exc_info[1] is not None:
            out["exception"] = _exception(record.exc_info)
        _emit(out)


def _renderer(form: str, stream: Callable[[], TextIO]) -> Callable[[Record], str]:
    terminal = _is_terminal(stream())
    return _console(colors=terminal) if form == "console" or (form == "auto" and terminal) else _json


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError, io.UnsupportedOperation):
        return False


def _prepare(record: Record) -> Record:
    moment = record.pop("timestamp", None) or datetime.now(UTC)
    clean = scrub(record)
    ordered: Record = {"timestamp": moment.isoformat(timespec="microseconds").replace("+00:00", "Z")}
    for key in _FIRST[1:]:
        if key in clean:
            ordered[key] = clean.pop(key)
    return {**ordered, **clean}


def _json(record: Record) -> str:
    return json.dumps(_prepare(record), default=str, ensure_ascii=False, allow_nan=False)


def _console(*, colors: bool) -> Callable[[Record], str]:
    renderer = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=36)

    def render(record: Record) -> str:
        return str(renderer(None, "", _prepare(record)))

    return render
