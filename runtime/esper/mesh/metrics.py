"""Prometheus metrics of every RPC, and the optional page that shows them.

| metric | type | labels | meaning |
|---|---|---|---|
| esper_rpc_started_total | counter | service, method, shape | calls begun |
| esper_rpc_handled_total | counter | service, method, shape, code | calls ended, by status code |
| esper_rpc_seconds | histogram | service, method, shape | time from start to end, long streams included |
| esper_rpc_in_flight | gauge | service, method, shape | calls open now |
| esper_rpc_messages_total | counter | service, method, shape, direction | messages received and sent |

Unknown methods share one label (`unknown`), so that strangers cannot multiply time series.
"""

import time
from dataclasses import dataclass
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from esper.mesh.errors import EsperError
from esper.mesh.interceptor import Hook, RpcCall, is_cancellation

__all__ = ["MetricsHook", "MetricsPage"]

_LABELS = ("service", "method", "shape")
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class _Series:
    """The time series of one method, looked up once."""

    started: Any
    seconds: Any
    in_flight: Any
    received: Any
    sent: Any


class MetricsHook(Hook):
    """Counts and times every RPC.

    Args:
        registry: where the metrics are registered; one hook per registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("esper_rpc_started", "Calls begun.", _LABELS, registry=registry)
        self._handled = Counter("esper_rpc_handled", "Calls ended, by code.", (*_LABELS, "code"), registry=registry)
        self._seconds = Histogram(
            "esper_rpc_seconds", "Seconds from start to end.", _LABELS, registry=registry, buckets=_BUCKETS
        )
        self._in_flight = Gauge("esper_rpc_in_flight", "Calls open now.", _LABELS, registry=registry)
        self._messages = Counter(
            "esper_rpc_messages", "Messages by direction.", (*_LABELS, "direction"), registry=registry
        )
        self._series: dict[tuple[str, str, str], _Series] = {}
        self._codes: dict[tuple[str, str, str, str], Any] = {}

    def start(self, call: RpcCall) -> None:
        """Count the call and start its clock."""
        labels = _labels(call)
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(
                self._started.labels(*labels),
                self._seconds.labels(*labels),
                self._in_flight.labels(*labels),
                self._messages.labels(*labels, "received"),
                self._messages.labels(*labels, "sent"),
            )
        call.notes["metrics"] = (series, time.perf_counter())
        series.started.inc()
        series.in_flight.inc()

    def received(self, call: RpcCall, message: Any) -> None:  # noqa: ARG002  # the signature of the hook
        """Count a message from the client."""
        call.notes["metrics"][0].received.inc()

    def sent(self, call: RpcCall) -> None:
        """Count a message to the client."""
        call.notes["metrics"][0].sent.inc()

    def end(self, call: RpcCall, error: BaseException | None) -> BaseException | None:
        """Stop the clock and count the status code."""
        series, began = call.notes["metrics"]
        series.seconds.observe(time.perf_counter() - began)
        series.in_flight.dec()
        labels = (*_labels(call), _code(call, error))
        counter = self._codes.get(labels)
        if counter is None:
            counter = self._codes[labels] = self._handled.labels(*labels)
        counter.inc()
        return error


def _labels(call: RpcCall) -> tuple[str, str, str]:
    if not call.known:
        return "unknown", "unknown", "unknown"
    service, _, method = call.method[1:].rpartition("/")
    return service, method, call.shape


def _code(call: RpcCall, error: BaseException | None) -> str:
    if isinstance(error, EsperError):
        return error.code.name
    if is_cancellation(error):
        return "DEADLINE_EXCEEDED" if _ran_out(call) else "CANCELLED"
    code = call.context.code()  # set by a handler that aborts by itself; 0 or None means OK
    if not code:
        return "OK" if error is None else "UNKNOWN"
    return code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code, "UNKNOWN")


def _ran_out(call: RpcCall) -> bool:
    """Whether a cancelled call had used up its time: gRPC cancels the handler for either reason, only the clock tells.

    The caller's clock started earlier, by the time that the request took to arrive: when it gives up, a little of the
    deadline is left here. So the last tenth counts as spent, or the last tenth of a second where that is less.
    """
    remaining, budget = call.context.time_remaining(), call.notes.get("remaining_s")
    if remaining is None or budget is None:
        return False
    return bool(remaining <= min(0.1, 0.1 * budget))


_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class MetricsPage:
    """A Prometheus page on `http://host:port/metrics`, served by a daemon thread.

    Args:
        registry: what to show.
        host: address to bind.
        port: port to bind; 0 lets the system choose.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        self.port: int = self._server.server_port
        """The bound port."""

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
