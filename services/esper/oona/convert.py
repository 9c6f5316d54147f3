"""The border to the contracts: protobuf messages on one side, the bus's own records on the other."""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from types import MappingProxyType

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper.mesh.errors import EsperError
from esper.oona.group import Delivered, Exhausted
from esper.oona.metrics import GroupReading
from esper.oona.records import DEAD_SUFFIX, Appended, Durability, Extent, NewEvent, Start, TopicSpec
from esper.oona.subscriptions import StartAt
from esper.v1 import event_pb2, oona_service_pb2

__all__ = [
    "answer_to_proto",
    "dead_letter",
    "deliveries_to_proto",
    "event_from_proto",
    "failure_to_proto",
    "seconds",
    "start_from_proto",
    "topic_from_proto",
    "topic_to_proto",
]

_DURABILITY = MappingProxyType(
    {
        event_pb2.DURABILITY_UNSPECIFIED: Durability.SYNC,
        event_pb2.DURABILITY_SYNC: Durability.SYNC,
        event_pb2.DURABILITY_INTERVAL: Durability.INTERVAL,
    }
)
_START = MappingProxyType(
    {
        oona_service_pb2.START_POSITION_UNSPECIFIED: Start.EARLIEST,
        oona_service_pb2.START_POSITION_EARLIEST: Start.EARLIEST,
        oona_service_pb2.START_POSITION_LATEST: Start.LATEST,
        oona_service_pb2.START_POSITION_TIME: Start.TIME,
        oona_service_pb2.START_POSITION_LAST: Start.LAST,
    }
)
_MAX_PAIRS = 16
_MAX_VALUE = 256
_MAX_CAUSE = 4 * _MAX_VALUE


def event_from_proto(event: event_pb2.Event) -> NewEvent:
    """An event to store; the bus carries the whole message without looking into it."""
    return NewEvent(event.id, event.key, event.SerializeToString(), event.priority == event_pb2.PRIORITY_LOW)


def topic_from_proto(topic: event_pb2.Topic, *, partitions: int, max_attempts: int, now: datetime) -> TopicSpec:
    """Settings of a topic to make; what is 0 there becomes the server's default."""
    return TopicSpec(
        name=topic.name,
        partitions=topic.partitions or partitions,
        durability=_DURABILITY[topic.durability],
        max_attempts=topic.max_attempts or max_attempts,
        retention_s=topic.retention_seconds,
        retention_bytes=topic.retention_bytes,
        create_time=now,
    )


def topic_to_proto(spec: TopicSpec, extents: Iterable[Extent], groups: Iterable[GroupReading]) -> event_pb2.Topic:
    """A topic with its partitions and groups."""
    topic = event_pb2.Topic(
        name=spec.name,
        partitions=spec.partitions,
        durability=event_pb2.DURABILITY_SYNC if spec.durability is Durability.SYNC else event_pb2.DURABILITY_INTERVAL,
        max_attempts=spec.max_attempts,
        retention_seconds=spec.retention_s,
        retention_bytes=spec.retention_bytes,
    )
    topic.create_time.FromDatetime(spec.create_time)
    for extent in extents:
        topic.partition_statuses.add(
            partition=extent.partition, first_offset=extent.first, next_offset=extent.next, size_bytes=extent.size_bytes
        )
    for _, name, lag, in_flight, members in groups:
        topic.groups.add(group=name, members=members, lag=lag, in_flight=in_flight)
    return topic


def start_from_proto(opened: oona_service_pb2.SubscribeOpen) -> StartAt:
    """Where a subscription begins."""
    moment = opened.start_time.ToDatetime(UTC) if opened.HasField("start_time") else None
    return StartAt(_START[opened.start], moment, opened.last)


def seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return float(duration.seconds + duration.nanos / 1e9)


def answer_to_proto(batch: int, appended: Appended) -> oona_service_pb2.PublishResponse:
    """The answer to a batch that is stored."""
    answer = oona_service_pb2.PublishResponse(batch=batch, duplicates=appended.duplicates)
    add = answer.positions.add
    for partition, offset in appended.positions:
        add(partition=partition, offset=offset)
    return answer


def failure_to_proto(batch: int, error: EsperError) -> oona_service_pb2.PublishResponse:
    """The answer to a batch that is not stored."""
    failure = oona_service_pb2.PublishError(code=int(error.code), reason=error.reason, message=error.public[:1024])
    if error.retry_after_s is not None:
        failure.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
    return oona_service_pb2.PublishResponse(batch=batch, error=failure)


def deliveries_to_proto(batch: Sequence[Delivered]) -> oona_service_pb2.SubscribeResponse:
    """Deliveries, as one message."""
    response = oona_service_pb2.SubscribeResponse()
    add = response.deliveries.deliveries.add
    time_us, stored = -1, Timestamp()
    for delivered in batch:
        event = delivered.event
        if event.store_us != time_us:  # events stored together share one time
            time_us = event.store_us
            stored.FromMicroseconds(time_us)
        message = add(delivery_id=delivered.delivery_id, attempt=delivered.attempt, store_time=stored)
        message.position.partition = event.partition
        message.position.offset = event.offset
        message.event.MergeFromString(event.data)
    return response


def dead_letter(topic: str, group: str, exhausted: Exhausted) -> NewEvent:
    """The event as it was, with its story in attributes that begin with `dead-`.

    These are `dead-topic`, `dead-position` ("partition/offset"), `dead-group`, `dead-attempts`, `dead-id` (its first
    id) and `dead-cause`, which goes on in `dead-cause-2` to `-4` when it is longer than an attribute may be. They
    displace the event's own attributes, last names first, where an event may not hold them all.
    """
    stored = exhausted.item.event
    event = event_pb2.Event.FromString(stored.data)
    cause = exhausted.cause[:_MAX_CAUSE]
    story = {
        "dead-topic": topic.removesuffix(DEAD_SUFFIX),
        "dead-position": f"{stored.partition}/{stored.offset}",
        "dead-group": group,
        "dead-attempts": str(exhausted.item.attempts),
        "dead-id": stored.id,
        "dead-cause": cause[:_MAX_VALUE],
    }
    for part in range(1, -(-len(cause) // _MAX_VALUE)):
        story[f"dead-cause-{part + 1}"] = cause[part * _MAX_VALUE : (part + 1) * _MAX_VALUE]
    own = dict(sorted(event.attributes.items())[: _MAX_PAIRS - len(story)])
    event.attributes.clear()
    event.attributes.update(own | story)
    # A function of where it comes from: a burial that is repeated after a crash is stored once.
    place = f"{topic}\0{stored.partition}\0{stored.offset}\0{group}"
    event.id = hashlib.sha256(place.encode()).hexdigest()[:32]
    return NewEvent(event.id, event.key, event.SerializeToString())
