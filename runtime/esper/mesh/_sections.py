"""Sections of the configuration that the mesh itself reads: transport, server, logging, identity."""

import ipaddress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from esper.mesh.identity import MIN_SECRET_BYTES

MIB = 1 << 20

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, each field documented by the docstring below it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        # Error texts of a section never quote values: the loader quotes those that are no secrets.
        hide_input_in_errors=True,
    )


class KeepAlive(Section):
    """HTTP/2 pings that notice a dead peer. Client and server options come from this one place, because a client that
    pings faster than its server permits is disconnected (GOAWAY, too_many_pings)."""  # noqa: D205, D209

    interval_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """Seconds of silence after which either side pings."""

    timeout_s: Annotated[float, Field(ge=1, le=600)] = 10.0
    """Seconds without an answer after which the connection is dead."""

    def client_options(self) -> list[tuple[str, Any]]:
        """Channel arguments: ping also while no call is running, so that a dead mesh is noticed before it is needed."""
        return [
            ("grpc.keepalive_time_ms", int(self.interval_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]

    def server_options(self) -> list[tuple[str, Any]]:
        """Server arguments: permit pings twice as often as our clients send them, so that jitter kills nobody."""
        return [
            ("grpc.keepalive_time_ms", int(self.interval_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.interval_s * 500)),
            ("grpc.http2.max_ping_strikes", 2),
        ]


class RetryPolicy(Section):
    """Retries by service config: idempotent methods, UNAVAILABLE only, budgeted so that they cannot storm."""

    max_attempts: Annotated[int, Field(ge=1, le=5)] = 4
    """Attempts in all; 1 means no retry. gRPC itself allows no more than 5."""

    initial_backoff_s: Positive = 0.05
    """Upper bound of the first random wait."""

    max_backoff_s: Positive = 1.0
    """Upper bound of every later wait."""

    multiplier: Annotated[float, Field(ge=1, le=10)] = 2.0
    """Growth of the wait from attempt to attempt."""


class ChannelOptions(Section):
    """Options of every client channel, each with its reason."""

    max_message_bytes: Annotated[int, Field(ge=1024, le=64 * MIB)] = 4 * MIB
    """Largest answer taken. Blobs travel as 1 MiB chunks, so nothing lawful is larger."""

    default_timeout_s: Positive = 10.0
    """Deadline of calls that set none and are no long stream: a mesh without deadlines hangs as a whole."""

    reconnect_max_s: Annotated[float, Field(ge=0.1, le=120)] = 2.0
    """Longest wait between connection attempts. gRPC's own 120 s would leave a restarted mesh unnoticed for minutes."""

    keepalive: KeepAlive = KeepAlive()
    """Pings; must be the same on the server."""

    retry: RetryPolicy = RetryPolicy()
    """Retries of idempotent methods."""

    def render(self) -> list[tuple[str, Any]]:
        """Channel arguments without the service config."""
        backoff_ms = int(self.reconnect_max_s * 1000)
        return [
            *self.keepalive.client_options(),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", -1),  # the server's limit gives the better error
            ("grpc.initial_reconnect_backoff_ms", min(100, backoff_ms)),
            ("grpc.min_reconnect_backoff_ms", min(100, backoff_ms)),
            ("grpc.max_reconnect_backoff_ms", backoff_ms),
            ("grpc.service_config_disable_resolution", 1),  # ours is the only one; spares a DNS TXT query
            ("grpc.enable_retries", 1),
        ]


class ServerOptions(Section):
    """Transport options of every server, each with its reason."""

    max_message_bytes: Annotated[int, Field(ge=1024, le=64 * MIB)] = 4 * MIB
    """Largest request message. Above it the caller gets RESOURCE_EXHAUSTED, reason MESSAGE_TOO_LARGE."""

    hard_message_factor: Annotated[int, Field(ge=1, le=16)] = 4
    """gRPC itself cuts off messages this many times larger than the limit, before they take memory; between the two
    limits the error carries our details instead of gRPC's bare text."""

    max_metadata_bytes: Annotated[int, Field(ge=8192, le=1 << 20)] = 16 * 1024
    """Room for headers: an identity token and trace context fit many times."""

    keepalive: KeepAlive = KeepAlive()
    """Pings; must be the same on the clients."""

    def render(self) -> list[tuple[str, Any]]:
        """Server arguments."""
        return [
            *self.keepalive.server_options(),
            ("grpc.max_receive_message_length", self.max_message_bytes * self.hard_message_factor),
            ("grpc.max_send_message_length", -1),  # our own answers are bounded by the contracts
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            # A second server on the same port must fail, not share its connections in silence.
            ("grpc.so_reuseport", 0),
            # Without bandwidth probing a writer runs 92 KiB ahead of a stalled reader instead of 6 MiB.
            ("grpc.http2.bdp_probe", 0),
        ]


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is reachable from this machine only."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class ServerSettings(Section):
    """One gRPC server: where it listens, what it admits, how it stops."""

    host: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """Address to bind. Anything but loopback needs `auth.anonymous_role = "none"`."""

    port: Port = 7600
    """Port to bind; 0 lets the system choose."""

    max_concurrent_calls: Annotated[int, Field(ge=1, le=65536)] = 512
    """Calls with a natural end that run at once; one more gets RESOURCE_EXHAUSTED with RetryInfo."""

    max_long_streams: Annotated[int, Field(ge=1, le=65536)] = 1024
    """Long streams (Subscribe, Watch, Advise, ...) open at once; counted apart, so that they cannot starve calls."""

    require_deadline: bool = True
    """Refuse calls without a deadline, long streams excepted."""

    health_interval_s: Seconds = 0.5
    """Seconds between reporting NOT_SERVING and ending the streams: balancers need one probe to look elsewhere."""

    drain_grace_s: Seconds = 5.0
    """Seconds that running calls get to end after the streams were told; what is left then is cancelled."""

    reflection: bool = True
    """Serve reflection, so that `grpcurl` and `buf curl` need no proto files."""

    metrics_port: Port | None = None
    """Port of the Prometheus page (`/metrics`) on the same host; 0 lets the system choose; none without it."""

    options: ServerOptions = ServerOptions()
    """Transport options."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.metrics_port and self.metrics_port == self.port:
            raise ValueError(f"metrics_port must differ from port, found {self.port} for both")
        return self


class AuthSettings(Section):
    """Identity of callers."""

    secret: SecretStr | None = None
    """Signing key of identity tokens, at least 32 bytes, shared by all services of one mesh. Without it each data
    directory makes its own (`auth.key`), which is right for a single machine only."""

    token_ttl_s: Annotated[float, Field(ge=10, le=30 * 86400)] = 3600.0
    """Seconds that a token is valid for; services renew theirs at half of it."""

    anonymous_role: Literal["client", "none"] = "client"
    """What a caller without a token may do: `client` lets callers from this machine train and query; `none` refuses
    them. A server that other machines can reach demands `none`."""

    @field_validator("secret")
    @classmethod
    def _long_enough(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and len(secret.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"must have at least {MIN_SECRET_BYTES} bytes")
        return secret


class LoggingSettings(Section):
    """Where log records go, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""

    format: Literal["auto", "console", "json"] = "auto"
    """`console` for people, `json` (one object a line) for machines; `auto` is console on a terminal, else json."""

    queue_size: Annotated[int, Field(ge=16, le=1_000_000)] = 10_000
    """Records that may wait for the writer. Beyond it records below error are dropped and counted; errors push out the
    oldest record instead. The count is written as soon as there is room."""


def check_exposure(server: ServerSettings, auth: AuthSettings) -> None:
    """Refuse a server that other machines can reach while strangers are let in.

    Raises:
        ValueError: non-loopback bind with anonymous access.
    """
    if not server.loopback and auth.anonymous_role != "none":
        raise ValueError(
            f"server.host is {server.host!r}, which other machines can reach, while auth.anonymous_role is "
            f'"{auth.anonymous_role}": expected auth.anonymous_role = "none" (callers then need tokens), '
            "or a loopback host"
        )
