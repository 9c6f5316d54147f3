"""Settings of the bus, and how it is built."""

from dataclasses import replace
from typing import Annotated

import grpc.aio
from pydantic import Field

from esper.mesh.service import ANYONE_KNOWN, Service, ServiceContext, allow
from esper.mesh.settings import Section
from esper.oona.broker import Broker, BrokerOptions
from esper.oona.convert import dead_letter
from esper.oona.metrics import BusMetrics
from esper.oona.records import Durability, TopicSpec
from esper.oona.servicer import OonaServicer
from esper.oona.sqlite_log import LogOptions, SqliteLog
from esper.v1 import oona_service_pb2_grpc

__all__ = ["DEFAULT_TOPICS", "Config", "OonaService", "build"]

MIB = 1 << 20
DEFAULT_TOPICS = ("telemetry", "run-events", "decisions", "field-reports", "library-events")
"""Topics that every mesh has; the first one is INTERVAL, the others are SYNC."""

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class Config(Section):
    """The message bus."""

    partitions: Annotated[int, Field(ge=1, le=256)] = 4
    """Partitions of topics that do not say how many. More let more members of a group work side by side."""

    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    """Deliveries of an event to a group before it becomes a dead letter, for topics that do not say."""

    flush_interval_s: Seconds = 0.5
    """Seconds within which events of INTERVAL topics are on the disk."""

    position_interval_s: Seconds = 0.2
    """Seconds between saves of group positions: what was acknowledged within them may come again after a crash."""

    backoff_s: Seconds = 0.5
    """Seconds before an event that was not handled is delivered again; doubles with each attempt."""

    backoff_max_s: Seconds = 30.0
    """Longest wait before a redelivery, in seconds."""

    window_ids: Annotated[int, Field(ge=0, le=10_000_000)] = 50_000
    """Newest event ids that a topic remembers for certain, so that publishing an event again stores it once. Each costs
    about 200 bytes of memory, and up to twice as many are kept."""

    telemetry_retention_s: Annotated[int, Field(ge=0)] = 7 * 86400
    """Seconds for which the default telemetry topic keeps events when it is first made; 0 for ever."""

    telemetry_retention_bytes: Annotated[int, Field(ge=0)] = 1024 * MIB
    """Bytes that each partition of the default telemetry topic keeps when it is first made; 0 for any number."""

    max_log_bytes: Annotated[int, Field(ge=0)] = 0
    """Largest size of the log's file, in bytes; 0 for any. Beyond it publishers get LOG_FULL."""

    min_free_bytes: Annotated[int, Field(ge=0)] = 32 * MIB
    """Free disk space that the log leaves to others, in bytes: publishers get LOG_FULL while positions and retention
    still find room."""

    full_retry_s: Seconds = 5.0
    """Seconds that publishers are asked to wait when the log is full."""

    pending_bytes: Annotated[int, Field(ge=1 << 16)] = 32 * MIB
    """Bytes waiting for the disk beyond which publishers are held back; telemetry is shed at half of it."""

    cache_bytes: Annotated[int, Field(ge=1 << 16)] = 64 * MIB
    """Newest events kept in memory for subscribers that keep up."""


class OonaService(Service):
    """The bus as a service of the mesh.

    Args:
        config: settings.
        context: what the mesh gives.
    """

    name = "oona"
    grpc_service_names = ("esper.v1.OonaService",)
    policy = allow(
        "esper.v1.OonaService",
        dict.fromkeys(("CreateTopic", "GetTopic", "ListTopics", "Publish", "Subscribe"), ANYONE_KNOWN),
    )

    def __init__(self, config: Config, context: ServiceContext) -> None:
        log = SqliteLog(
            context.data_dir / "oona.sqlite",
            LogOptions(
                flush_interval_s=config.flush_interval_s,
                window_ids=config.window_ids,
                max_log_bytes=config.max_log_bytes,
                min_free_bytes=config.min_free_bytes,
                full_retry_s=config.full_retry_s,
                pending_bytes=config.pending_bytes,
                cache_bytes=config.cache_bytes,
            ),
            clock_us=lambda: int(context.clock().timestamp() * 1e6),
        )
        options = BrokerOptions(
            position_interval_s=config.position_interval_s,
            backoff_s=config.backoff_s,
            backoff_max_s=config.backoff_max_s,
        )
        self.broker = Broker(log, options, dead_letter=dead_letter, defaults=_defaults(config, context))
        self.collectors = (BusMetrics(self.broker.counters, self.broker.group_readings),)
        self._servicer = OonaServicer(
            self.broker,
            context.drain,
            partitions=config.partitions,
            max_attempts=config.max_attempts,
            clock=context.clock,
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Add the handlers."""
        oona_service_pb2_grpc.add_OonaServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Open the log; make the default topics."""
        await self.broker.start()

    async def close(self) -> None:
        """Save positions, flush, close the log."""
        await self.broker.close()


async def build(config: Config, context: ServiceContext) -> Service:
    """Build the bus over `data_dir/oona.sqlite`, which it opens in `start`."""
    return OonaService(config, context)


def _defaults(config: Config, context: ServiceContext) -> list[TopicSpec]:
    def topic(name: str) -> TopicSpec:
        return TopicSpec(
            name=name,
            partitions=config.partitions,
            max_attempts=config.max_attempts,
            create_time=context.clock(),
        )

    telemetry, *others = DEFAULT_TOPICS
    shedding = replace(
        topic(telemetry),
        durability=Durability.INTERVAL,
        retention_s=config.telemetry_retention_s,
        retention_bytes=config.telemetry_retention_bytes,
    )
    return [shedding, *map(topic, others)]
