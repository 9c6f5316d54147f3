"""What the run leaves on the bus: telemetry, field reports and events, converted and sent on the link's loop.

The training thread pays for handing an object over, nothing else. Two bounds hold: what was handed over and is not yet
converted, here; what is converted and waits for the bus, in the `BusPublisher`.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

from esper.kasmina.convert import field_report_to_proto, health_to_proto
from esper.mesh.bus import BusPublisher, PublisherOptions, new_event
from esper.mesh.errors import EsperError
from esper.mesh.logging import get_logger
from esper.v1 import event_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc.aio

    from esper.kasmina.control import FieldReport, HealthColumns
    from esper.kasmina.link import LinkSettings

__all__ = ["Mail"]

_log = get_logger("esper.kasmina.link")
_MAX_EVENT_BYTES = 256 * 1024


class Mail:
    """Outgoing mail of one link.

    Args:
        settings: bounds.
    """

    def __init__(self, settings: LinkSettings) -> None:
        self.run_id = ""
        self._settings = settings
        self._publisher: BusPublisher | None = None
        self._lock = threading.Lock()
        self._handed = 0
        self.dropped = 0
        """Objects that were not taken for want of room, or because the link was not open."""

    # Training thread

    def hand_over(self, post: Callable[..., bool], send: Callable[..., None], *what: object) -> bool:
        """Queue `send(*what)` on the loop; False when it was dropped."""
        with self._lock:
            room = self._handed < self._settings.report_limit and self._publisher is not None
            self._handed += room
        if room and post(self._handle, send, *what):
            return True
        with self._lock:
            self._handed -= room
        self._count(type(what[0]).__name__)
        return False

    def _count(self, what: str) -> None:
        with self._lock:
            self.dropped += 1
            count = self.dropped
        # The first, the second, the fourth ...: a bus that is away for hours must not fill the log as well.
        if count & (count - 1) == 0:
            _log.error("not_published", what=what, dropped=count)

    # Event loop

    def start(self, channel: grpc.aio.Channel) -> None:
        """Begin to send."""
        limits = PublisherOptions(max_events=self._settings.report_limit, max_low_events=self._settings.telemetry_limit)
        self._publisher = BusPublisher(channel, limits)
        self._publisher.start()

    async def close(self, timeout_s: float) -> None:
        """Send what waits, at most for `timeout_s`."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            await publisher.close(timeout_s)

    def _handle(self, send: Callable[..., None], *what: object) -> None:
        with self._lock:
            self._handed -= 1
        try:
            send(*what)
        except (EsperError, TypeError, ValueError) as error:
            _log.error("not_published", what=type(what[0]).__name__, error=str(error))

    def send_health(self, columns: HealthColumns) -> None:
        """Telemetry: LOW, so the oldest is shed and counted when the bus is away for long."""
        payload = health_to_proto(columns).SerializeToString()
        self._offer("telemetry", "esper.v1.HealthBatch", payload, event_pb2.PRIORITY_LOW)

    def send_report(self, report: FieldReport) -> None:
        """A field report: kept until delivered or the buffer is full, which is an error in the log."""
        payload = field_report_to_proto(report).SerializeToString()
        self._offer("field-reports", "esper.v1.FieldReport", payload, event_pb2.PRIORITY_HIGH)

    def send_event(self, kind: str, fields: dict[str, object]) -> None:
        """An event of the run: ``{"kind", "run_id", "fields"}`` as JSON; what JSON cannot say is said by ``str``."""
        document = {"kind": kind, "run_id": self.run_id, "fields": fields}
        payload = json.dumps(document, default=str, sort_keys=True).encode()
        if len(payload) > _MAX_EVENT_BYTES:
            raise ValueError(f"event {kind}: expected at most {_MAX_EVENT_BYTES} bytes, found {len(payload)}")
        self._offer("run-events", "application/json", payload, event_pb2.PRIORITY_NORMAL, kind=kind[:64])

    def _offer(
        self, topic: str, type_name: str, payload: bytes, priority: event_pb2.Priority.ValueType, **labels: str
    ) -> None:
        event = new_event(
            type_name,
            payload,
            key=self.run_id,
            source=f"kasmina/{self.run_id}"[:128],
            priority=priority,
            attributes={"run_id": self.run_id, **labels},
        )
        if self._publisher is None or not self._publisher.offer(topic, event):
            self._count(topic)
