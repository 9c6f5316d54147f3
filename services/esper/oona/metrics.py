"""What the bus counts, in the form that Prometheus scrapes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["BusCounters", "BusMetrics", "GroupReading"]

GroupReading = tuple[str, str, int, int, int]
"""(topic, group, lag, in flight, members)."""


class BusCounters:
    """Counts since the start, by topic (and group or reason where a pair is named)."""

    def __init__(self) -> None:
        self.published: Counter[str] = Counter()
        """Events stored."""
        self.duplicates: Counter[str] = Counter()
        """Events acknowledged again without being stored again."""
        self.shed: Counter[str] = Counter()
        """Low events that found no room."""
        self.refused: Counter[tuple[str, str]] = Counter()
        """Events of batches that were answered with an error, by reason; shed ones excepted."""
        self.delivered: Counter[tuple[str, str]] = Counter()
        """Events sent to subscribers, by group (empty for readers without one)."""
        self.redelivered: Counter[tuple[str, str]] = Counter()
        """Of these, attempts beyond the first."""
        self.dead: Counter[tuple[str, str]] = Counter()
        """Events moved to the dead-letter topic, by group."""
        self.expired_unread: Counter[tuple[str, str]] = Counter()
        """Events that retention removed before a group had done them."""


_COUNTERS = (
    ("published", "Events stored.", ("topic",)),
    ("duplicates", "Events acknowledged again without being stored again.", ("topic",)),
    ("shed", "Events of low priority that found no room.", ("topic",)),
    ("refused", "Events of batches answered with an error.", ("topic", "reason")),
    ("delivered", "Events sent to subscribers.", ("topic", "group")),
    ("redelivered", "Deliveries beyond an event's first.", ("topic", "group")),
    ("dead", "Events moved to the dead-letter topic.", ("topic", "group")),
    ("expired_unread", "Events removed by retention before a group had done them.", ("topic", "group")),
)


class BusMetrics(Collector):
    """Reads counters and group states when Prometheus asks, so that the hot path pays for plain additions only.

    Args:
        counters: counts since the start.
        groups: gives the present state of every group.
    """

    def __init__(self, counters: BusCounters, groups: Callable[[], Iterable[GroupReading]]) -> None:
        self._counters = counters
        self._groups = groups

    def collect(self) -> Iterator[Metric]:
        """Give every metric of the bus."""
        for name, text, labels in _COUNTERS:
            family = CounterMetricFamily(f"esper_oona_{name}", text, labels=labels)
            # A copy: the page is served by another thread than the one that counts.
            for key, count in dict(getattr(self._counters, name)).items():
                family.add_metric([key] if isinstance(key, str) else list(key), count)
            yield family
        labels = ("topic", "group")
        lag = GaugeMetricFamily("esper_oona_lag", "Events stored and not yet done by a group.", labels=labels)
        flight = GaugeMetricFamily("esper_oona_in_flight", "Events delivered and awaiting an answer.", labels=labels)
        members = GaugeMetricFamily("esper_oona_members", "Members of a group that are connected.", labels=labels)
        for topic, group, behind, waiting, count in self._groups():
            lag.add_metric([topic, group], behind)
            flight.add_metric([topic, group], waiting)
            members.add_metric([topic, group], count)
        yield from (lag, flight, members)

    def describe(self) -> Iterator[Metric]:
        """Name the metrics without reading them, for the registry."""
        for name, text, labels in _COUNTERS:
            yield CounterMetricFamily(f"esper_oona_{name}", text, labels=labels)
