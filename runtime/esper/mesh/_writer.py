"""The thread that writes log records, and the bounded queue in front of it."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

Record = dict[str, Any]

_ERROR_LEVELS = frozenset({"error", "critical"})


class LogWriter:
    """Renders and writes records on a thread of its own; the caller only appends to a bounded queue.

    Policy when the queue is full: a record below error is dropped; a record at error or above takes the place of the
    oldest waiting one. Either loss is counted, and the count is written as a warning as soon as there is room.
    A stream that fails (closed pipe, full disk) loses the record, counts it, and never disturbs the caller.

    Args:
        render: record -> one line, called on the writer's thread; scrubbing happens there.
        stream: where lines go; looked up at each write, so that a replaced `sys.stderr` is honoured.
        maxsize: most records that wait.
    """

    def __init__(self, render: Callable[[Record], str], stream: Callable[[], TextIO], maxsize: int) -> None:
        self._render = render
        self._stream = stream
        self._maxsize = maxsize
        self._queue: deque[Record] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._busy = False
        self._closed = False
        self._dropped = 0
        self._unreported = 0
        self._thread = threading.Thread(target=self._run, name="esper-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records lost so far: to the bound, or to a stream that failed."""
        return self._dropped

    def put(self, record: Record) -> None:
        """Queue a record without waiting; any thread."""
        with self._lock:
            if self._closed:
                return
            if len(self._queue) >= self._maxsize:
                self._dropped += 1
                self._unreported += 1
                if record.get("level") not in _ERROR_LEVELS:
                    return
                self._queue.popleft()
            self._queue.append(record)
        if not self._wake.is_set():
            self._wake.set()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything queued before is written. False when that took longer than the timeout."""
        limit = time.monotonic() + timeout_s
        with self._idle:
            while self._queue or self._busy:
                left = limit - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    return False
                self._wake.set()
                self._idle.wait(left)
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, then end the thread. Records that come later are ignored."""
        with self._lock:
            self._closed = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                batch = list(self._queue)
                self._queue.clear()
                unreported, self._unreported = self._unreported, 0
                self._busy = bool(batch)
                closed = self._closed
            if unreported:
                batch.append(_loss(unreported))
            self._write(batch)
            with self._idle:
                self._busy = False
                self._idle.notify_all()
                if closed and not self._queue:
                    return

    def _write(self, batch: list[Record]) -> None:
        lines: list[str] = []
        for record in batch:
            try:
                lines.append(self._render(record))
            except Exception as error:  # noqa: BLE001  # a record that cannot be rendered must not end all logging
                lines.append(f"a log record could not be rendered: {type(error).__name__}")
        if not lines:
            return
        try:
            stream = self._stream()
            stream.write("\n".join(lines) + "\n")
            stream.flush()
        except (OSError, ValueError):
            # Closed or full: nobody is left to tell but the counter.
            with self._lock:
                self._dropped += len(lines)


def _loss(count: int) -> Record:
    return {"event": "log records dropped", "level": "warning", "logger": "esper.mesh.logging", "count": count}


def standard_error() -> TextIO:
    """The present `sys.stderr`."""
    return sys.stderr
