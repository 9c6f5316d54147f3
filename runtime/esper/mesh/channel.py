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
from typing import Any

import grpc
import grpc.aio

from esper.mesh._calls import CallDefaults, MeshChannel, SyncDefaults, Token
from esper.mesh.errors import InvalidInput
from esper.mesh.settings import ChannelOptions, RetryPolicy

__all__ = [
    "ChannelPool",
    "idempotent_methods",
    "open_channel",
    "open_sync_channel",
    "service_config",
]

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
    return MeshChannel(grpc.aio.insecure_channel(target, options=arguments), CallDefaults(token, timeout_s))


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
    return grpc.intercept_channel(channel, SyncDefaults(CallDefaults(token, timeout_s)))


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
