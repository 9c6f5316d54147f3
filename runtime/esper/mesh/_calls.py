"""What every call through our channels carries, in both kinds of gRPC's Python API; `channel.py` is the way in."""

import asyncio
from collections.abc import Callable
from typing import Any, Self, cast

import grpc
import grpc.aio

from esper.mesh import context as ambient
from esper.mesh.service import is_long_stream

Token = str | Callable[[], str] | None
"""An identity token, or a callable that gives a fresh one (`TokenIssuer.source`)."""


class CallDefaults:
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

    def __init__(self, inner: Any, method: str, defaults: CallDefaults, *, streams: bool) -> None:
        self._inner = inner
        self._method = method
        self._defaults = defaults
        self._streams = streams

    def __call__(self, *requests: Any, timeout: float | None = None, metadata: Any = None, **rest: Any) -> Any:
        call = self._inner(
            *requests,
            timeout=self._defaults.timeout(self._method, timeout),
            metadata=self._defaults.metadata(metadata),
            **rest,
        )
        if self._streams:
            call._cython_call = StatusKeeper(call._cython_call)  # noqa: SLF001  # see StatusKeeper
        return call


class StatusKeeper:
    """Keeps the server's status of a call whose request stream was cut off by it.

    When a server ends a call before the client has sent everything (a refusal, say), a write that is under way fails,
    and grpc.aio puts "INTERNAL: Internal error from Core" over the status that is arriving or has arrived
    (grpc/grpc#36066). Here that happens only when no status comes at all.
    """

    PATIENCE_S = 1.0

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def set_internal_error(self, text: str) -> None:
        """Called by grpc.aio after a failed write."""

        def give_up() -> None:
            if not self._inner.done():
                self._inner.set_internal_error(text)

        asyncio.get_running_loop().call_later(self.PATIENCE_S, give_up)


class MeshChannel(grpc.aio.Channel):
    """A channel of grpc.aio whose calls carry the defaults."""

    def __init__(self, inner: grpc.aio.Channel, defaults: CallDefaults) -> None:
        self._inner = inner
        self._defaults = defaults

    def _call(self, shape: str, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        inner = getattr(self._inner, shape)(method, *arguments, **keywords)
        return _Call(inner, method, self._defaults, streams=shape.startswith("stream"))

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


class SyncDefaults(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """The same defaults for blocking channels, where interceptors cost nothing to speak of."""

    def __init__(self, defaults: CallDefaults) -> None:
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
