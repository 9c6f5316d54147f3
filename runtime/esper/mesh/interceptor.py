"""One adapter that lifts around-hooks to all four RPC shapes, in both styles of writing a handler.

A hook sees the start of a call, each message, and its end; it never sees shapes. The adapter turns every handler,
coroutine or async generator, into one coroutine: responses are written explicitly, so that a client that goes away
cancels the handler at a defined place and clean-up runs at once instead of when the garbage collector finds time.

Hooks run in the order given; ends run in reverse order, for those hooks whose start succeeded. A hook's end may replace
the error; what leaves the first hook decides the status.
"""

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

import grpc
import grpc.aio
from grpc_status import rpc_status

from esper.mesh.errors import EsperError, InvalidInput, LimitExceeded, Unsupported, to_status

__all__ = ["Adapter", "Hook", "RpcCall"]

# The stubs make it generic, the class itself is not.
if TYPE_CHECKING:
    _Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]
else:
    _Handler = Any

_SHAPES = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


@dataclass(slots=True)
class RpcCall:
    """One RPC, as hooks see it."""

    method: str
    """Full name: `/esper.v1.UrzaService/GetKernel`."""

    shape: str
    """`unary_unary`, `unary_stream`, `stream_unary` or `stream_stream`."""

    known: bool
    """Whether the server has a handler of this name."""

    context: Any
    """The `grpc.aio.ServicerContext`."""

    metadata: dict[str, str | bytes]
    """Invocation metadata; the last value of a repeated key."""

    request_id: str = ""
    """Set by the context hook."""

    notes: dict[str, Any] = field(default_factory=dict)
    """What a hook wants to remember between its start and its end, under its own name."""

    @property
    def service(self) -> str:
        """Full name of the gRPC service: `esper.v1.UrzaService`."""
        return self.method[1:].rpartition("/")[0]


class Hook:
    """Base of all hooks: every step does nothing unless overridden. Hooks hold no state of a single call."""

    def start(self, call: RpcCall) -> None:
        """Run before the handler; raise to refuse the call."""

    def received(self, call: RpcCall, message: Any) -> None:
        """Run for each message from the client before the handler sees it; raise to end the call."""

    def sent(self, call: RpcCall) -> None:
        """Run after each message to the client was handed to gRPC."""

    def end(self, call: RpcCall, error: BaseException | None) -> BaseException | None:  # noqa: ARG002  # for overriding
        """Run when the call is over; return the error that the next outer hook sees."""
        return error


@dataclass(frozen=True, slots=True)
class _Refused:
    """Stands in for a request that could not be read, so that the refusal passes through the hooks like any other."""

    error: EsperError


class Adapter(grpc.aio.ServerInterceptor):
    """The one interceptor of a mesh server.

    Args:
        hooks: outermost first.
        max_message_bytes: largest serialised request message.
    """

    def __init__(self, hooks: Sequence[Hook], *, max_message_bytes: int) -> None:
        self._hooks = tuple(hooks)
        self._max_message_bytes = max_message_bytes
        # Most hooks override few steps; asking beforehand keeps the cost per message low.
        self._on_received = tuple(h for h in self._hooks if type(h).received is not Hook.received)
        self._on_sent = tuple(h for h in self._hooks if type(h).sent is not Hook.sent)
        self._lifted: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Give gRPC the lifted handler of a method; unknown methods get one that refuses."""
        method = _text(handler_call_details.method)
        lifted = self._lifted.get(method)
        if lifted is None:
            handler = cast("Any", await continuation(handler_call_details))
            if handler is None:
                # Not cached: a stranger could fill the memory with invented names.
                return self._unknown(method)
            lifted = self._lifted[method] = self._lift(method, handler)
        return lifted

    def _lift(self, method: str, handler: Any) -> _Handler:
        shape = _SHAPES[handler.request_streaming, handler.response_streaming]
        behaviour = getattr(handler, shape)
        generator = inspect.isasyncgenfunction(behaviour)
        if not generator and not inspect.iscoroutinefunction(behaviour):
            # It would block the loop, so it never runs; the refusal takes the way of every other defect.
            behaviour = _not_async(method, behaviour)

        async def serve(request: Any, context: Any) -> Any:
            return await self._serve(method, shape, behaviour, request, context, generator=generator)

        make = getattr(grpc, f"{shape}_rpc_method_handler")
        return cast(
            "_Handler",
            make(
                serve,
                request_deserializer=_careful(handler.request_deserializer, self._max_message_bytes),
                response_serializer=handler.response_serializer,
            ),
        )

    def _unknown(self, method: str) -> _Handler:
        async def missing(_requests: Any, _context: Any) -> None:
            raise Unsupported(f"no method {method[:200]}: see the server's reflection", reason="METHOD_UNKNOWN")

        async def serve(request: Any, context: Any) -> Any:
            return await self._serve(method, "stream_stream", missing, request, context, generator=False, known=False)

        # stream_stream, because it reads nothing before it answers.
        return grpc.stream_stream_rpc_method_handler(serve)

    async def _serve(
        self,
        method: str,
        shape: str,
        behaviour: Callable[..., Any],
        request: Any,
        context: Any,
        *,
        generator: bool,
        known: bool = True,
    ) -> Any:
        metadata = dict(context.invocation_metadata() or ())
        call = RpcCall(method, shape, known, context, metadata)
        started: list[Hook] = []
        try:
            for hook in self._hooks:
                hook.start(call)
                started.append(hook)
            response = await self._run(call, behaviour, request, generator=generator)
        except BaseException as error:  # noqa: BLE001  # every end of a call, cancellation too, passes the hooks
            await self._fail(call, started, error)
        for hook in reversed(started):
            hook.end(call, None)
        return response

    async def _run(self, call: RpcCall, behaviour: Callable[..., Any], request: Any, *, generator: bool) -> Any:
        watched = _Context(call, self._on_received, self._on_sent)
        if call.shape.startswith("unary"):
            watched.check(request)
        elif request is not None:
            request = watched.requests(request)
        if generator:
            async with aclosing(behaviour(request, watched)) as responses:
                async for response in responses:
                    await watched.write(response)
            return None
        response = await behaviour(request, watched)
        if call.shape.endswith("unary"):
            watched.count_sent()
        return response

    async def _fail(self, call: RpcCall, started: list[Hook], error: BaseException) -> NoReturn:
        outcome: BaseException | None = error
        for hook in reversed(started):
            outcome = hook.end(call, outcome)
        if isinstance(outcome, EsperError):
            status = to_status(outcome)
            # Raises AbortError, which gRPC turns into the status.
            await call.context.abort_with_status(rpc_status.to_status(status))
        raise error if outcome is None else outcome


def _not_async(method: str, behaviour: Any) -> Callable[..., Awaitable[NoReturn]]:
    async def refuse(_request: Any, _context: Any) -> NoReturn:
        raise TypeError(f"handler of {method} must be `async def` or an async generator, found {behaviour!r}")

    return refuse


class _Context:
    """A servicer's view of the call: gRPC's own context, with every message passing the hooks."""

    def __init__(self, call: RpcCall, on_received: Sequence[Hook], on_sent: Sequence[Hook]) -> None:
        self._call = call
        self._inner = call.context
        self._on_received = on_received
        self._on_sent = on_sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def check(self, message: Any) -> None:
        """Show a message to the hooks, or raise what its bytes were refused for."""
        if type(message) is _Refused:
            raise message.error
        for hook in self._on_received:
            hook.received(self._call, message)

    def count_sent(self) -> None:
        """Tell the hooks that a message left."""
        for hook in self._on_sent:
            hook.sent(self._call)

    async def read(self) -> Any:
        """Read one message, or `grpc.aio.EOF`."""
        message = await self._inner.read()
        if message is grpc.aio.EOF:
            await self._settle()
        else:
            self.check(message)
        return message

    async def write(self, message: Any) -> None:
        """Write one message."""
        await self._inner.write(message)
        self.count_sent()

    async def requests(self, source: AsyncIterable[Any]) -> AsyncIterator[Any]:
        """The request stream, each message checked."""
        async for message in source:
            self.check(message)
            yield message
        await self._settle()

    @staticmethod
    async def _settle() -> None:
        """Let a cancellation overtake the end of the requests.

        A client that goes away looks, for one turn of the loop, like one that has finished sending: without this turn
        a handler would take half an upload for a whole one.
        """
        await asyncio.sleep(0)


def _careful(parse: Callable[[bytes], Any] | None, limit: int) -> Callable[[bytes], Any]:
    """A deserialiser that never raises: gRPC answers a raising one with a bare INTERNAL."""

    def deserialize(data: bytes) -> Any:
        if len(data) > limit:
            return _Refused(
                LimitExceeded(
                    f"request message has {len(data)} bytes, this server takes at most {limit}",
                    reason="MESSAGE_TOO_LARGE",
                    metadata={"size": str(len(data)), "max_message_bytes": str(limit)},
                )
            )
        if parse is None:
            return data
        try:
            return parse(data)
        except Exception as error:  # noqa: BLE001  # whatever the parser raises means: these bytes are not that message
            return _Refused(
                InvalidInput(
                    f"request of {len(data)} bytes is not a message of the expected type",
                    reason="MESSAGE_MALFORMED",
                    private=str(error),
                )
            )

    return deserialize


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def is_cancellation(error: BaseException | None) -> bool:
    """Whether an error is the cancellation of the call's task, or of the generator that served it."""
    return isinstance(error, asyncio.CancelledError | GeneratorExit)
