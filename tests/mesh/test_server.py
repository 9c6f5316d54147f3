"""A real server: every shape and style through the hooks, refusals on the wire, the drain."""

import asyncio
import contextlib
import random
import time

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from esper.mesh.channel import open_channel
from esper.mesh.errors import (
    DeadlineMissed,
    Forbidden,
    InternalError,
    InvalidInput,
    LimitExceeded,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unsupported,
    from_rpc_error,
)
from esper.mesh.hooks import LimitsHook
from esper.mesh.identity import Identity, Role, TokenIssuer
from esper.mesh.server import MeshServer
from esper.mesh.service import Service, allow
from esper.mesh.settings import AuthSettings, ServerOptions, ServerSettings
from esper.mesh.testing import TEST_SETTINGS, channel_as, issuer, serve, settings_with, token_for

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def text(value: str) -> StringValue:
    """A message."""
    return StringValue(value=value)


async def several(*values: str):
    """A request stream."""
    for value in values:
        yield text(value)


async def failure(call) -> Exception:
    """The error that a unary call or a stream ends with."""
    try:
        if hasattr(call, "__aiter__"):
            found = [item async for item in call]
        else:
            found = await call
        pytest.fail(f"expected an error, found {found}")
    except grpc.RpcError as error:
        return from_rpc_error(error)


async def until(condition) -> None:
    """Wait, briefly, for something that another task does."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # the services under test have no events for what is watched here
            await asyncio.sleep(0.001)


async def test_all_shapes_in_both_styles_pass_through(echo, stub_of) -> None:
    """Coroutine and async generator, four shapes: messages go through in order and unchanged."""
    async with serve(echo, drain=echo.drain_event) as (_, channel):
        stub = stub_of(channel)
        assert "a!" == (await stub.Unary(text("a"))).value
        assert ["a", "b", "c"] == [item.value async for item in stub.Generate(text("abc"))]
        assert ["a", "b", "c"] == [item.value async for item in stub.Write(text("abc"))]
        assert "xyz" == (await stub.Collect(several("x", "yz"))).value
        assert "xyz" == (await stub.ReadAll(several("x", "yz"))).value
        assert ["X", "Y"] == [item.value async for item in stub.Subscribe(several("x", "y"))]
        assert ["x", "y"] == [item.value async for item in stub.WatchWrite(several("X", "Y"))]


async def test_handlers_know_caller_deadline_and_request_id(echo, stub_of) -> None:
    """Context travels in contextvars: identity of the token, time left, the caller's request id."""
    async with serve(echo) as (server, _), channel_as(server, Role.TEZZERET, "forge-1") as channel:
        await stub_of(channel).Unary(text("a"), timeout=3, metadata=(("x-request-id", "r-1"),))
        await stub_of(channel).Unary(text("a"), metadata=(("x-request-id", "not well formed"),))
    (identity, request_id, remaining, method), (_, other_id, _, _) = echo.seen
    assert (Identity("forge-1", Role.TEZZERET), "r-1") == (identity, request_id)
    assert 2 < remaining < 3.5
    assert "/test.v1.EchoService/Unary" == method
    assert 16 == len(other_id)


async def test_an_error_of_ours_arrives_as_it_was_raised(echo, stub_of) -> None:
    """Class, sentence, reason and metadata survive the wire."""
    async with serve(echo) as (_, channel):
        error = await failure(stub_of(channel).Unary(text("missing")))
    assert (NotFound, "no such echo", "ECHO_NOT_FOUND", {"name": "missing"}) == (
        type(error), error.public, error.reason, error.metadata,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["Boom", "BoomAfter"])
async def test_a_defect_leaks_nothing_and_is_logged_with_its_traceback(echo, stub_of, capsys, method: str) -> None:
    """The client sees "internal error" and a request id; the log has the traceback under that id, scrubbed."""
    async with serve(echo) as (_, channel):
        error = await failure(getattr(stub_of(channel), method)(text("x")))
    assert (InternalError, "internal error") == (type(error), error.public)
    logged = capsys.readouterr().err
    assert error.metadata["request_id"] in logged
    assert "RuntimeError" in logged
    assert "conftest.py" in logged
    assert "hunter2" not in logged


@pytest.mark.parametrize("method", ["Orphan", "OrphanAfter"])
async def test_a_cancellation_of_the_handlers_own_is_answered(echo, stub_of, capsys, method: str) -> None:
    """What the handler waited for was cancelled, the call was not: it ends with a status, and at once."""
    async with serve(echo) as (server, channel):
        error = await failure(getattr(stub_of(channel), method)(text("x")))
        assert (InternalError, "internal error") == (type(error), error.public)
        assert "_cancelled_elsewhere" in capsys.readouterr().err
        server.drain_event.set()
        error = await failure(getattr(stub_of(channel), method)(text("x")))
        assert (Unavailable, "DRAINING") == (type(error), error.reason)


async def test_gRPCs_own_abort_and_codes_pass_untouched(echo, stub_of) -> None:  # noqa: N802  # gRPC is spelled so
    """A handler may still use the context's abort and set_code."""
    async with serve(echo) as (_, channel):
        with pytest.raises(grpc.RpcError) as aborted:
            await stub_of(channel).Unary(text("abort"))
        with pytest.raises(grpc.RpcError) as coded:
            await stub_of(channel).Unary(text("code"))
    assert (grpc.StatusCode.DATA_LOSS, "by hand") == (aborted.value.code(), aborted.value.details())
    assert grpc.StatusCode.ABORTED is coded.value.code()


async def test_a_missing_deadline_is_refused_long_streams_excepted(echo, stub_of) -> None:
    """Calls with an end need a deadline, in every shape; Subscribe and Watch do not."""
    async with serve(echo, drain=echo.drain_event) as (server, _), grpc.aio.insecure_channel(server.target) as raw:
        stub = stub_of(raw)
        for call in (stub.Unary(text("a")), stub.Generate(text("a")), stub.Collect(several("a"))):
            error = await failure(call)
            assert (InvalidInput, "DEADLINE_MISSING") == (type(error), error.reason)
        assert ["A"] == [item.value async for item in stub.Subscribe(several("a"))]
        assert ["a"] == [item.value async for item in stub.WatchWrite(several("A"))]
        health = await health_pb2_grpc.HealthStub(raw).Check(health_pb2.HealthCheckRequest())
        assert SERVING == health.status


async def test_a_service_may_name_further_long_streams(echo, stub_of) -> None:
    """`Service.long_streams` adds to the rule of names."""
    echo.long_streams = frozenset({"/test.v1.EchoService/Generate"})
    async with serve(echo) as (server, _), grpc.aio.insecure_channel(server.target) as raw:
        assert ["a"] == [item.value async for item in stub_of(raw).Generate(text("a"))]


async def test_deadlines_may_be_made_optional(echo, stub_of) -> None:
    """`server.require_deadline = false` lets grpcurl users off."""
    async with (
        serve(echo, settings=settings_with(require_deadline=False)) as (server, _),
        grpc.aio.insecure_channel(server.target) as raw,
    ):
        assert "a!" == (await stub_of(raw).Unary(text("a"))).value


async def test_messages_of_any_excess_get_a_clear_error(echo, stub_of) -> None:
    """Above the limit with sizes in the metadata, far above it by gRPC itself: the same class and reason."""
    settings = settings_with(options=ServerOptions(max_message_bytes=2048, hard_message_factor=2))
    async with serve(echo, settings=settings) as (_, channel):
        stub = stub_of(channel)
        assert "x" * 2000 + "!" == (await stub.Unary(text("x" * 2000))).value
        near, far = await failure(stub.Unary(text("x" * 3000))), await failure(stub.Unary(text("x" * 9000)))
        inside = await failure(stub.Collect(several("x", "y" * 3000)))
    for error in (near, far, inside):
        assert (LimitExceeded, "MESSAGE_TOO_LARGE") == (type(error), error.reason)
    assert ("3003", "2048") == (near.metadata["size"], near.metadata["max_message_bytes"])


async def test_bytes_that_are_no_message_are_the_callers_fault(echo) -> None:
    """Garbage on the wire is INVALID_ARGUMENT, not an internal error."""
    async with serve(echo) as (_, channel):
        error = await failure(channel.unary_unary("/test.v1.EchoService/Unary")(b"\xff\xff\xff", timeout=5))
    assert (InvalidInput, "MESSAGE_MALFORMED") == (type(error), error.reason)


async def test_calls_beyond_the_limit_are_refused_with_a_delay(echo, stub_of) -> None:
    """Calls and long streams are counted apart; a place that is given back is free again."""
    settings = settings_with(max_concurrent_calls=1, max_long_streams=1)
    async with serve(echo, settings=settings, drain=echo.drain_event) as (_, channel):
        stub = stub_of(channel)
        hanging = asyncio.ensure_future(stub.Hang(text("a")))
        stream = stub.Subscribe()
        await stream.write(text("s"))
        assert "S" == (await stream.read()).value
        await until(lambda: "hanging" in echo.events)
        call, second = await failure(stub.Unary(text("b"))), await failure(stub.Subscribe(several("t")))
        assert (LimitExceeded, "TOO_MANY_CALLS", "1") == (type(call), call.reason, call.metadata["limit"])
        assert LimitsHook.RETRY_AFTER_S == call.retry_after_s == second.retry_after_s
        assert "TOO_MANY_STREAMS" == second.reason
        echo.gate.set()
        await hanging
        assert "b!" == (await stub.Unary(text("b"))).value
        await stream.done_writing()


async def test_unlisted_and_unknown_methods_are_refused(echo, stub_of) -> None:
    """A method without a policy is refused for everybody, an unknown one is named as such."""
    async with serve(echo) as (server, channel), channel_as(server, Role.OPERATOR) as operator:
        unlisted = await failure(stub_of(operator).Unlisted(text("a")))
        unknown = await failure(stub_of(channel).Unknown(text("a")))
    assert (Forbidden, "not allowed", {}) == (type(unlisted), unlisted.public, unlisted.metadata)
    assert (Unsupported, "METHOD_UNKNOWN") == (type(unknown), unknown.reason)


class Guarded(Service):
    """One method for the forge alone."""

    name = "guarded"
    grpc_service_names = ("test.v1.GuardedService",)
    policy = allow("test.v1.GuardedService", {"Forge": {Role.TEZZERET}})

    def register(self, server: grpc.aio.Server) -> None:
        async def forge(request: StringValue, context: object) -> StringValue:
            return request

        handler = grpc.unary_unary_rpc_method_handler(forge, StringValue.FromString, StringValue.SerializeToString)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(*self.grpc_service_names, {"Forge": handler}),)
        )


async def _forge(target: str, authorization: str | None) -> Exception | StringValue:
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(
            "/test.v1.GuardedService/Forge", StringValue.SerializeToString, StringValue.FromString
        )
        metadata = () if authorization is None else (("authorization", authorization),)
        try:
            return await call(text("x"), timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return from_rpc_error(error)


async def test_only_the_roles_of_the_policy_may_call() -> None:
    """The right role passes; others are forbidden; strangers are unauthenticated; nobody learns why."""
    forged = TokenIssuer("another secret that signs nothing here").issue(Identity("eve", Role.TEZZERET))
    async with serve(Guarded(), auth=AuthSettings(anonymous_role="none")) as (server, _):
        assert "x" == (await _forge(server.target, f"Bearer {token_for(Role.TEZZERET)}")).value
        others = [await _forge(server.target, f"bearer {token_for(role)}") for role in Role if role != Role.TEZZERET]
        strangers = [
            await _forge(server.target, header)
            for header in (None, "Bearer nonsense", f"Bearer {forged}", "Basic eDp5", "Bearer")
        ]
    # A token of the anonymous role is worth as much as none.
    assert {Forbidden, Unauthenticated} == {type(error) for error in others}
    assert {"not allowed", "a valid identity token is required"} == {error.public for error in others}
    assert {(Unauthenticated, "a valid identity token is required", "UNAUTHENTICATED")} == {
        (type(error), error.public, error.reason) for error in strangers
    }


async def test_local_callers_without_a_token_are_clients_where_that_is_allowed(echo, stub_of) -> None:
    """The embedded default: no token needed on this machine, and no more than a client's rights."""
    async with serve(echo, Guarded()) as (server, channel):
        await stub_of(channel).Unary(text("a"))
        assert isinstance(await _forge(server.target, None), Forbidden)
    assert Identity("local", Role.CLIENT) == echo.seen[0][0]


@pytest.mark.parametrize(
    "key", ["x-forwarded-for", "forwarded", "x-envoy-external-address", "x-forwarded-proto", "via"]
)
async def test_callers_behind_a_proxy_are_not_local(echo, stub_of, key: str) -> None:
    """A proxy on this machine makes everybody's calls local: what it forwards needs a token."""
    async with serve(echo) as (server, channel), channel_as(server, Role.CLIENT) as known:
        error = await failure(stub_of(channel).Unary(text("a"), metadata=((key, "203.0.113.7"),)))
        assert isinstance(error, Unauthenticated)
        assert "a!" == (await stub_of(known).Unary(text("a"), metadata=((key, "203.0.113.7"),))).value


async def test_health_and_reflection_need_no_identity(echo) -> None:
    """Probes and grpcurl work for anybody; reflection names our services."""
    closed = AuthSettings(anonymous_role="none")
    async with serve(echo, auth=closed) as (server, _), grpc.aio.insecure_channel(server.target) as raw:
        health = health_pb2_grpc.HealthStub(raw)
        for name in ("", "test.v1.EchoService"):
            assert SERVING == (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
        with pytest.raises(grpc.RpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert grpc.StatusCode.NOT_FOUND is caught.value.code()
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(raw).ServerReflectionInfo(iter([asked]))
        names = {s.name async for answer in call for s in answer.list_services_response.service}
    assert {"test.v1.EchoService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} == names


async def test_reflection_can_be_switched_off(echo) -> None:
    """Without reflection its method is unknown."""
    async with serve(echo, settings=settings_with(reflection=False)) as (_, channel):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        assert isinstance(await failure(call), Unsupported)


async def test_the_drain_ends_long_streams_by_themselves(echo, stub_of) -> None:
    """Open streams of every kind (ours, health, reflection) end at once, far within the grace."""
    async with serve(echo, drain=echo.drain_event, settings=settings_with(drain_grace_s=30.0)) as (server, channel):
        stub = stub_of(channel)
        ours, written = stub.Subscribe(), stub.WatchWrite()
        for stream in (ours, written):
            await stream.write(text("a"))
            await stream.read()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert SERVING == (await watch.read()).status
        reflecting = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await reflecting.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await reflecting.read()
        began = time.monotonic()
        await server.stop()
        assert time.monotonic() - began < 5
        assert NOT_SERVING == (await watch.read()).status
        for stream in (ours, written, watch, reflecting):
            assert grpc.aio.EOF is await stream.read()
            assert grpc.StatusCode.OK is await stream.code()
    assert {"start", "stream ended", "drain", "close"} == set(echo.events)
    assert "close" == echo.events[-1]


async def test_the_drain_waits_for_running_calls_and_then_cancels_them(echo, stub_of) -> None:
    """A call that ends within the grace gets its answer; one that does not is cancelled, and its clean-up runs."""
    async with serve(echo, settings=settings_with(drain_grace_s=10.0)) as (server, channel):
        call = asyncio.ensure_future(stub_of(channel).Hang(text("a")))
        await until(lambda: "hanging" in echo.events)
        stopping = asyncio.create_task(server.stop())
        await server.drain_event.wait()
        echo.gate.set()
        assert "a" == (await call).value
        await stopping
        await server.wait()
    echo.gate.clear()
    async with serve(echo) as (server, channel):
        call = asyncio.ensure_future(stub_of(channel).Hang(text("a")))
        await until(lambda: echo.events.count("hanging") == 2)
        await asyncio.gather(server.stop(grace_s=0.01), server.stop())
        assert isinstance(await failure(call), Unavailable)
    assert 2 == echo.events.count("let go")


async def test_a_client_that_goes_away_closes_the_generator_at_once(echo, stub_of) -> None:
    """The generator's own clean-up runs when the call is cancelled, not when memory is collected."""
    async with serve(echo) as (_, channel):
        stream = stub_of(channel).Generate(text("~"))
        await stream.read()
        stream.cancel()
        await until(lambda: "generator closed" in echo.events)


async def test_the_deadline_ends_the_handler(echo, stub_of) -> None:
    """A handler that is not done in time is cancelled and the client gets DEADLINE_EXCEEDED."""
    async with serve(echo) as (_, channel):
        assert isinstance(await failure(stub_of(channel).Hang(text("a"), timeout=0.05)), DeadlineMissed)
        await until(lambda: "let go" in echo.events)


class Slow(Guarded):
    """Starts when told to."""

    name = "slow"
    policy = allow("test.v1.GuardedService", {"Forge": {Role.CLIENT}})

    def __init__(self) -> None:
        self.listening = asyncio.Event()
        self.ready = asyncio.Event()
        self.steps: list[str] = []

    async def start(self) -> None:
        self.listening.set()
        await self.ready.wait()

    async def drain(self) -> None:
        raise RuntimeError("drain fails")

    async def close(self) -> None:
        self.steps.append("close")
        raise RuntimeError("close fails")


async def test_a_service_that_is_starting_answers_unavailable(echo, stub_of, capsys) -> None:
    """Calls are held off until start() returned; services before it answer already; health says so."""
    slow = Slow()
    server = MeshServer(TEST_SETTINGS, [echo, slow], issuer=issuer)
    starting = asyncio.create_task(server.start())
    await slow.listening.wait()
    async with open_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        error = await _forge(server.target, None)
        assert (Unavailable, "SERVICE_STARTING") == (type(error), error.reason)
        assert "a!" == (await stub_of(channel).Unary(text("a"))).value
        for name, status in (
            ("test.v1.EchoService", SERVING),
            ("test.v1.GuardedService", NOT_SERVING),
            ("", NOT_SERVING),
        ):
            assert status == (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
        slow.ready.set()
        await starting
        assert "x" == (await _forge(server.target, None)).value
        assert SERVING == (await health.Check(health_pb2.HealthCheckRequest())).status
    await server.stop()
    assert (["close"], "close") == (slow.steps, echo.events[-1])
    assert "service did not end cleanly" in capsys.readouterr().err


class Broken(Guarded):
    """Cannot start."""

    closed = False

    async def start(self) -> None:
        raise ValueError("no such disk")

    async def close(self) -> None:
        self.closed = True


async def test_a_service_that_cannot_start_takes_the_server_down_cleanly(echo) -> None:
    """The error reaches the caller, what was started is closed, the port is free again."""
    broken = Broken()
    server = MeshServer(TEST_SETTINGS, [echo, broken], issuer=issuer)
    with pytest.raises(ValueError, match="no such disk"):
        await server.start()
    assert broken.closed
    assert "close" == echo.events[-1]
    async with serve(settings=settings_with(port=server.port)) as (other, _):
        assert server.port == other.port


async def test_an_address_that_cannot_be_bound_is_named() -> None:
    """A port that is taken is an error, not a shared port."""
    async with serve() as (first, _):
        second = MeshServer(settings_with(port=first.port), [], issuer=issuer)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{first.port}: expected a free"):
            await second.start()


async def test_a_server_starts_once(echo) -> None:
    """A second start is a mistake; a stop before the start is none."""
    idle = MeshServer(TEST_SETTINGS, [], issuer=issuer)
    await idle.wait()
    await idle.stop()
    async with MeshServer(TEST_SETTINGS, [echo], issuer=issuer) as server:
        with pytest.raises(RuntimeError, match="starts once"):
            await server.start()


def test_servers_that_make_no_sense_are_refused(echo) -> None:
    """Two services of one name, a policy for somebody else's method, an open door to strangers."""
    with pytest.raises(ValueError, match="offered by both echo and echo"):
        MeshServer(TEST_SETTINGS, [echo, echo], issuer=issuer)
    guarded = Guarded()
    guarded.policy = allow("test.v1.Other", {"X": {Role.CLIENT}})
    with pytest.raises(ValueError, match=r"lists /test.v1.Other/X, which is no method of"):
        MeshServer(TEST_SETTINGS, [guarded], issuer=issuer)
    with pytest.raises(ValueError, match="other machines can reach"):
        MeshServer(ServerSettings(host="0.0.0.0"), [], issuer=issuer)


async def test_other_addresses_have_a_target_of_their_own(tmp_path) -> None:
    """IPv6 and wildcard addresses give a target that a client on this machine can use."""
    closed = AuthSettings(anonymous_role="none")
    for host, expected in (("::1", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")):
        server = MeshServer(settings_with(host=host), [], issuer=issuer, auth=closed)
        server.port = 1
        assert f"{expected}:1" == server.target
    socket = f"unix:{tmp_path}/s"
    async with serve(settings=settings_with(host=socket)) as (server, channel):
        assert socket == server.target
        assert SERVING == (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status
    async with serve(settings=settings_with(host="::1")) as (server, channel):
        assert SERVING == (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status


async def test_a_handler_that_is_not_async_is_refused_at_its_first_call(echo, stub_of, capfd) -> None:
    """Blocking handlers would stop the whole loop: they never run."""
    async with serve(echo) as (_, channel):
        error = await failure(stub_of(channel).Sync(text("a")))
    assert (InternalError, "internal error") == (type(error), error.public)
    assert "must be `async def` or an async generator" in capfd.readouterr().err


@pytest.mark.parametrize("seed", range(3))
async def test_after_a_storm_of_calls_and_cancellations_the_books_are_even(echo, stub_of, seed: int) -> None:
    """Whatever ends them: no place stays taken, nothing in flight, every start has its end, the server serves."""
    dice = random.Random(seed)
    settings = settings_with(max_concurrent_calls=20, max_long_streams=20)
    async with serve(echo, settings=settings, drain=echo.drain_event) as (server, channel):
        stub = stub_of(channel)

        async def one() -> None:
            kind = dice.choice(("Unary", "Hang", "Boom", "Generate", "Collect", "Subscribe", "WatchWrite", "Unknown"))
            method = getattr(stub, kind)
            if kind in {"Collect", "Subscribe", "WatchWrite"}:
                call = method(several("a", "b"), timeout=2)
            else:
                call = method(text(dice.choice(("a", "~", "missing"))), timeout=dice.choice((0.02, 2)))
            if dice.random() < 0.5:
                asyncio.get_running_loop().call_later(dice.random() * 0.03, call.cancel)
            with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
                if hasattr(call, "__aiter__"):
                    [item async for item in call]
                else:
                    await call

        asyncio.get_running_loop().call_later(0.2, echo.gate.set)
        await asyncio.gather(*(one() for _ in range(150)))

        def total(name: str) -> float:
            return sum(s.value for m in server.registry.collect() for s in m.samples if s.name == name)

        await until(lambda: total("esper_rpc_in_flight") == 0)
        assert {False: 0, True: 0} == server._limits._open
        assert total("esper_rpc_started_total") == total("esper_rpc_handled_total") == total("esper_rpc_seconds_count")
        assert total("esper_rpc_started_total") > 50  # the rest was cancelled before it left the client
        assert "a!" == (await stub.Unary(text("a"))).value


async def test_a_refusal_in_the_middle_of_an_upload_arrives_as_it_is(echo, stub_of) -> None:
    """However the client's writes and the server's refusal cross, the client sees the refusal (grpc/grpc#36066)."""
    settings = settings_with(options=ServerOptions(max_message_bytes=200_000))
    parts = ["x" * 100_000] * 3 + ["y" * 300_000] + ["z" * 100_000] * 20
    async with serve(echo, settings=settings, drain=echo.drain_event) as (_, channel):
        stub = stub_of(channel)
        for _ in range(15):
            for call in (stub.Collect(several(*parts)), stub.Subscribe(several(*parts))):
                error = await failure(call)
                assert (LimitExceeded, "MESSAGE_TOO_LARGE") == (type(error), error.reason)
