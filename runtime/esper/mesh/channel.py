"""The one factory of channels: documented options, retries by service config, deadlines that propagate, identity.

Typical use::

    channel = open_channel("127.0.0.1:7600", token=issuer.source(identity))
    stub = UrzaServiceStub(channel)
    kernel = await stub.GetKernel(request)              # carries the default deadline
    kernel = await stub.GetKernel(request, timeout=2)   # at most 2 s, at most what the caller of ours has left

Inside an RPC, the deadline and request id of that RPC go along by themselves. Long streams (`Subscribe`, `Watch*`, ...)
get no deadline. Only methods that their contract calls idempotent are retried, only on UNAVAILABLE, and by gRPC itself.
"""

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Collection
from typing import Any, Self, cast

import grpc
import grpc.aio

from esper.mesh import context as ambient
from esper.mesh.errors import InvalidInput
from esper.mesh.service import is_long_stream
from esper.mesh.settings import ChannelOptions, RetryPolicy

__all__ = [
    "ChannelPool",
    "idempotent_methods",
    "open_channel",
    "open_sync_channel",
    "service_config",
]

Token = str | Callable[[], str] | None
"""An identity token, or a callable that gives a fresh one (`TokenIssuer.source`)."""

_NO_SIDE_EFFECTS, _IDEMPOTENT = 1, 2  # google.protobuf.MethodOptions.IdempotencyLevel


@functools.cache
def idempotent_methods() -> tuple[str, ...]:
    """Full names (`esper.v1.UrzaService/GetKernel`) of all methods that our contracts mark as idempotent."""
    try:
        package = importlib.import_module("esper.v1")
    except ModuleNotFoundError:
        return ()
    found: list[str] = []
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.endswith("_service_pb2"):
            descriptor = importlib.import_module(f"esper.v1.{module.name}").DESCRIPTOR
            for service in descriptor.services_by_name.values():
                found += [
                    f"{service.full_name}/{method.name}"
                    for method in service.methods
                    if method.GetOptions().idempotency_level in {_NO_SIDE_EFFECTS, _IDEMPOTENT}
                ]
    return tuple(sorted(found))


def service_config(policy: RetryPolicy, methods: Collection[str]) -> str:
    """The gRPC service config (JSON) that retries these methods (`package.Service/Method`) on UNAVAILABLE."""
    if policy.max_attempts < 2 or not methods:
        return "{}"
    names = [dict(zip(("service", "method"), method.split("/"), strict=True)) for method in methods]
    return json.dumps(
        {
            "methodConfig": [
                {
                    "name": names,
                    "retryPolicy": {
                        "maxAttempts": policy.max_attempts,
                        "initialBackoff": f"{policy.initial_backoff_s:.3f}s",
                        "maxBackoff": f"{policy.max_backoff_s:.3f}s",
                        "backoffMultiplier": policy.multiplier,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
            ],
            # At most one retry for every ten good answers once a server is in trouble: retries must not bury it.
            "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
        }
    )


def open_channel(
    target: str,
    *,
    options: ChannelOptions | None = None,
    token: Token = None,
    default_timeout_s: float | None = None,
    retry_methods: Collection[str] | None = None,
) -> grpc.aio.Channel:
    """Open a channel for one event loop; it connects on first use.

    Args:
        target: `host:port` or any gRPC name.
        options: transport options; the defaults fit.
        token: identity to call with; None for an anonymous caller.
        default_timeout_s: deadline of calls that set none; default `options.default_timeout_s`.
        retry_methods: methods to retry, as `package.Service/Method`; default: those the contracts call idempotent.

    Raises:
        InvalidInput: the target is empty.
    """
    options, arguments = _arguments(target, options, retry_methods)
    timeout_s = options.default_timeout_s if default_timeout_s is None else default_timeout_s
    return _Channel(grpc.aio.insecure_channel(target, options=arguments), _CallDefaults(token, timeout_s))


def open_sync_channel(
    target: str,
    *,
    options: ChannelOptions | None = None,
    token: Token = None,
    default_timeout_s: float | None = None,
    retry_methods: Collection[str] | None = None,
) -> grpc.Channel:
    """Open a blocking channel, for scripts, notebooks and Locust; arguments as for `open_channel`."""
    options, arguments = _arguments(target, options, retry_methods)
    timeout_s = options.default_timeout_s if default_timeout_s is None else default_timeout_s
    channel = grpc.insecure_channel(target, options=arguments)
    return grpc.intercept_channel(channel, _SyncDefaults(_CallDefaults(token, timeout_s)))


def _arguments(
    target: str, options: ChannelOptions | None, retry_methods: Collection[str] | None
) -> tuple[ChannelOptions, list[tuple[str, Any]]]:
    if not target:
        raise InvalidInput("a channel needs a target such as 127.0.0.1:7600, found an empty one")
    options = ChannelOptions() if options is None else options
    methods = idempotent_methods() if retry_methods is None else retry_methods
    arguments = [*options.render(), ("grpc.service_config", service_config(options.retry, methods))]
    if target.startswith(("127.", "localhost", "[::1]", "unix:", "ipv4:127.")):
        arguments.append(("grpc.enable_http_proxy", 0))  # a proxy of the environment cannot reach our loopback
    return options, arguments


class ChannelPool:
    """Shared channels of one service to the others, opened on first use.

    Args:
        resolve: service name -> target.
        token: the identity to call with.
        options: transport options.
    """

    def __init__(
        self, resolve: Callable[[str], str], *, token: Token = None, options: ChannelOptions | None = None
    ) -> None:
        self._resolve = resolve
        self._token = token
        self._options = options
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, service: str) -> grpc.aio.Channel:
        """The channel to a service; services behind one target share it."""
        target = self._resolve(service)
        channel = self._channels.get(target)
        if channel is None:
            channel = self._channels[target] = open_channel(target, options=self._options, token=self._token)
        return channel

    async def close(self) -> None:
        """Close every channel; calls that are still open are cancelled."""
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            await channel.close()


class _CallDefaults:
    """Decides deadline and metadata of each call."""

    def __init__(self, token: Token, timeout_s: float) -> None:
        self._token = token
        self._timeout_s = timeout_s

    def timeout(self, method: str, given: float | None) -> float | None:
        """The deadline: what the call asks for, or the default; never beyond that of the RPC being served.

        A long stream without a deadline of its own gets none: it may outlive the RPC that opened it.

        Raises:
            grpc.aio.AioRpcError: DEADLINE_EXCEEDED, when no time is left.
        """
        if given is None:
            if is_long_stream(method):
                return None
            given = self._timeout_s
        remaining = ambient.time_remaining()
        if remaining is None:
            return given
        if remaining <= 0:
            # gRPC would still send it, and might even be answered in time.
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                details=f"no time left to call {method}: the deadline of the call being served has passed",
            )
        return min(given, remaining)

    def metadata(self, given: Any) -> tuple[tuple[str, str | bytes], ...]:
        """The call's own metadata, then identity and request id unless it has them already."""
        metadata = tuple(given or ())
        keys = {key for key, _ in metadata}
        if self._token is not None and "authorization" not in keys:
            token = self._token if isinstance(self._token, str) else self._token()
            metadata = (*metadata, ("authorization", f"Bearer {token}"))
        if "x-request-id" not in keys and (request_id := ambient.request_id()):
            metadata = (*metadata, ("x-request-id", request_id))
        return metadata


class _Call:
    """A multi-callable that fills in the defaults, then calls gRPC's own.

    Not an interceptor: those of grpc.aio put a task and a queue between caller and stream.
    """

    def __init__(self, inner: Any, method: str, defaults: _CallDefaults) -> None:
        self._inner = inner
        self._method = method
        self._defaults = defaults

    def __call__(self, *requests: Any, timeout: float | None = None, metadata: Any = None, **rest: Any) -> Any:
        return self._inner(
            *requests,
            timeout=self._defaults.timeout(self._method, timeout),
            metadata=self._defaults.metadata(metadata),
            **rest,
        )


class _Channel(grpc.aio.Channel):
    """A channel of grpc.aio whose calls carry the defaults."""

    def __init__(self, inner: grpc.aio.Channel, defaults: _CallDefaults) -> None:
        self._inner = inner
        self._defaults = defaults

    def _call(self, shape: str, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        inner = getattr(self._inner, shape)(method, *arguments, **keywords)
        return _Call(inner, method, self._defaults)

    def unary_unary(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._call("unary_unary", method, arguments, keywords)

    def unary_stream(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._call("unary_stream", method, arguments, keywords)

    def stream_unary(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._call("stream_unary", method, arguments, keywords)

    def stream_stream(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """As grpc.aio.Channel."""
        return self._call("stream_stream", method, arguments, keywords)

    async def close(self, grace: float | None = None) -> None:
        """As grpc.aio.Channel."""
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """As grpc.aio.Channel."""
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """As grpc.aio.Channel."""
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """As grpc.aio.Channel."""
        await self._inner.channel_ready()

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class _SyncDefaults(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """The same defaults for blocking channels, where interceptors cost nothing to speak of."""

    def __init__(self, defaults: _CallDefaults) -> None:
        self._defaults = defaults

    def _intercept(self, continuation: Any, details: Any, requests: Any) -> Any:
        filled = _SyncDetails(
            details.method,
            self._defaults.timeout(details.method, details.timeout),
            self._defaults.metadata(details.metadata),
            details.credentials,
            getattr(details, "wait_for_ready", None),
            getattr(details, "compression", None),
        )
        return continuation(filled, requests)

    # One body for four shapes, whose types differ in ways that do not matter to it.
    intercept_unary_unary = _intercept  # type: ignore[assignment]  # see above
    intercept_unary_stream = _intercept  # type: ignore[assignment]  # see above
    intercept_stream_unary = _intercept  # type: ignore[assignment]  # see above
    intercept_stream_stream = _intercept  # type: ignore[assignment]  # see above


class _SyncDetails(grpc.ClientCallDetails):
    """Details of one blocking call."""

    def __init__(
        self, method: str, timeout: Any, metadata: Any, credentials: Any, ready: Any, compression: Any
    ) -> None:
        self.method = method
        self.timeout = timeout
        self.metadata = cast("Any", metadata)
        self.credentials = credentials
        self.wait_for_ready = ready
        self.compression = compression
