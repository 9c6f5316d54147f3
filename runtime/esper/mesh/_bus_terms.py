"""The vocabulary of `esper.mesh.bus`: events, bounds, counts, refusals."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from esper.mesh.errors import EsperError, InvalidInput, LimitExceeded, Unavailable
from esper.v1 import event_pb2

__all__ = [
    "MAX_PAYLOAD",
    "PublisherOptions",
    "PublisherStats",
    "StoredAt",
    "buffer_full",
    "bus_closed",
    "event_shed",
    "new_event",
    "payload_too_large",
]

MAX_PAYLOAD = 1 << 20
"""Bytes of a payload, by the contract."""


def new_event(
    type_name: str,
    payload: bytes,
    *,
    key: str = "",
    source: str = "",
    priority: "event_pb2.Priority.ValueType" = event_pb2.PRIORITY_NORMAL,
    attributes: Mapping[str, str] | None = None,
) -> event_pb2.Event:
    """Make an event with a fresh id that happens now.

    Args:
        type_name: full name of the payload's message (`esper.v1.HealthBatch`) or a media type.
        payload: at most 1 MiB.
        key: events of one key keep their order.
        source: who publishes, like `tolaria/digits-1`.
        priority: LOW may be shed.
        attributes: labels.
    """
    event = event_pb2.Event(
        id=uuid.uuid4().hex,
        key=key,
        type=type_name,
        payload=payload,
        source=source,
        priority=priority,
        attributes=attributes,
    )
    event.occur_time.FromNanoseconds(time.time_ns())
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherOptions:
    """Bounds and times of a publisher."""

    linger_s: float = 0.005
    """Seconds to wait for company before a batch leaves; a full batch leaves at once."""

    batch_events: int = 1024
    """Most events of a batch."""

    batch_bytes: int = 1 << 20
    """Most bytes of a batch; a larger event goes alone."""

    max_events: int = 65_536
    """Events that may wait, LOW ones not counted; one more is refused."""

    max_bytes: int = 64 << 20
    """Bytes that may wait, LOW ones not counted; beyond it events are refused."""

    max_low_events: int = 8_192
    """LOW events of one topic that may wait; one more sheds the oldest."""

    max_low_bytes: int = 16 << 20
    """Bytes of LOW events of one topic that may wait; beyond it the oldest are shed."""

    backoff_s: float = 0.05
    """Seconds before the first attempt to connect again; doubles, with jitter."""

    backoff_max_s: float = 2.0
    """Longest such wait, in seconds."""


@dataclass(slots=True)
class PublisherStats:
    """What became of the events so far. Every event offered ends in exactly one of the other counts, or waits."""

    offered: int = 0
    stored: int = 0
    """Acknowledged as durable by the bus."""
    shed: int = 0
    """LOW events given up, here or by the bus, for want of room."""
    refused: int = 0
    """Not taken by `offer`: no room, too large, or closed."""
    rejected: int = 0
    """Taken, but refused by the bus for good: unknown topic, breach of a bound."""
    lost: int = 0
    """Still waiting when the publisher was closed."""
    resent: int = 0
    """Events sent more than once, after a broken stream or by request of the bus."""


@dataclass(frozen=True, slots=True)
class StoredAt:
    """Where an event is stored."""

    partition: int
    offset: int


def bus_closed() -> EsperError:
    """Refusal after `close`."""
    return Unavailable("the publisher is closed", reason="BUS_CLOSED")


def payload_too_large(topic: str, size: int) -> EsperError:
    """Refusal of a payload beyond the contract's bound."""
    return InvalidInput(
        f"event for {topic}: expected a payload of at most {MAX_PAYLOAD} bytes, found {size}",
        reason="PAYLOAD_TOO_LARGE",
    )


def buffer_full(topic: str, options: PublisherOptions) -> EsperError:
    """Refusal for want of room."""
    return LimitExceeded(
        f"event for {topic}: the publisher's buffer ({options.max_events} events, {options.max_bytes} bytes) is full",
        reason="BUS_BUFFER_FULL",
        metadata={"topic": topic},
        retry_after_s=1.0,
    )


def event_shed(topic: str) -> EsperError:
    """What the sender of a LOW event hears when it was given up."""
    return LimitExceeded(f"an event of low priority for {topic} was shed: newer ones needed its room", reason="SHED")
