"""Channels: deadlines that propagate, identity, retries by service config, and the same for blocking channels."""

import asyncio
import json

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from esper.mesh import context
from esper.mesh._calls import StatusKeeper
from esper.mesh.channel import (
    ChannelPool,
    idempotent_methods,
    open_channel,
    open_sync_channel,
    service_config,
)
from esper.mesh.errors import DeadlineMissed, InternalError, InvalidInput, Unavailable, from_rpc_error
from esper.mesh.identity import Identity, Role
from esper.mesh.service import Service, allow, is_long_stream
from esper.mesh.settings import ChannelOptions, RetryPolicy
from esper.mesh.testing import serve, token_for

CODEC = {"request_serializer": StringValue.SerializeToString, "response_deserializer": StringValue.FromString}


CALLERS = frozenset({Role.CLIENT, Role.URZA})


class Relay(Service):
    """Answers with what it calls, reports what it was given, fails as often as it is told to."""

    name = "relay"
    grpc_service_names = ("test.v1.RelayService",)
    policy = allow("test.v1.RelayService", dict.fromkeys(("Relay", "Left", "Flaky", "Watch"), CALLERS))

    def __init__(self) -> None:
        self.channel: grpc.aio.Channel | None = None
        self.budgets: list[float | None] = []
        self.request_ids: list[str] = []
        self.failures = 0
        self.calls = 0

    def register(self, server: grpc.aio.Server) -> None:
        codec = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(getattr(self, name.lower()), **codec)
            for name in ("Relay", "Left", "Flaky")
        }
        handlers["Watch"] = grpc.unary_stream_rpc_method_handler(self.watch, **codec)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(*self.grpc_service_names, handlers),))

    async def relay(self, request: StringValue, _context: object) -> StringValue:
        timeout = float(request.value) if request.value else None
        self.request_ids.append(context.request_id())
        return await self.channel.unary_unary("/test.v1.RelayService/Left", **CODEC)(StringValue(), timeout=timeout)

    async def left(self, request: StringValue, _context: object) -> StringValue:
        self.budgets.append(context.time_remaining())
        self.request_ids.append(context.request_id())
        return StringValue(value=context.current_identity().role)

    async def flaky(self, request: StringValue, _context: object) -> StringValue:
        self.calls += 1
        if self.calls <= self.failures:
            raise Unavailable("not yet")
        return request

    async def watch(self, request: StringValue, _context: object):
        yield StringValue(value=str(context.time_remaining()))


@pytest.fixture
async def relay():
    """A relay that calls itself, as a service calls another, with its own identity."""
    service = Relay()
    async with serve(service) as (server, channel):
        service.channel = open_channel(server.target, token=token_for(Role.URZA))
        own = service.channel
        yield service, server, channel
        await own.close()


def call(channel, method: str, shape: str = "unary_unary"):
    """A method of the relay."""
    return getattr(channel, shape)(f"/test.v1.RelayService/{method}", **CODEC)


async def test_the_callers_deadline_bounds_the_calls_that_follow_from_it(relay) -> None:
    """A deadline travels on by itself; a shorter one of the next call holds, a longer one does not."""
    service, _, channel = relay
    for given in ("", "60"):
        await call(channel, "Relay")(StringValue(value=given), timeout=2)
    await call(channel, "Relay")(StringValue(value="0.5"), timeout=20)
    assert all(0 < left < 2.5 for left in service.budgets[:2])
    assert 0 < service.budgets[2] < 0.7


async def test_request_ids_and_own_identity_go_along(relay) -> None:
    """One request id through all services; each service calls under its own name, not its caller's."""
    service, _, channel = relay
    answer = await call(channel, "Relay")(StringValue(), metadata=(("x-request-id", "abc"),))
    assert (["abc", "abc"], "urza") == (service.request_ids, answer.value)


async def test_a_call_without_deadline_gets_the_default_and_a_long_stream_none(relay) -> None:
    """The default deadline covers what has an end; a watch may last."""
    service, server, channel = relay
    async with open_channel(server.target, default_timeout_s=3) as short:
        await call(short, "Left")(StringValue())
        answers = [item.value async for item in call(short, "Watch", "unary_stream")(StringValue())]
    await call(channel, "Left")(StringValue())
    assert 2 < service.budgets[0] < 3.5
    assert 9 < service.budgets[1] < 11
    assert ["None"] == answers


async def test_no_time_left_means_no_call(relay) -> None:
    """With the budget used up the call fails at once with the deadline's own error."""
    service, _, channel = relay
    with context.scope(timeout_s=0.0), pytest.raises(grpc.RpcError) as caught:
        await call(channel, "Left")(StringValue())
    assert isinstance(from_rpc_error(caught.value), DeadlineMissed)
    assert [] == service.budgets


async def test_background_work_does_not_inherit_the_deadline() -> None:
    """`spawn` starts with a clean context."""

    async def later() -> tuple[float | None, str]:
        return context.time_remaining(), context.request_id()

    with context.scope(timeout_s=0.001, request_id="r", identity=Identity("a", Role.OPERATOR)):
        assert (None, "") == await context.spawn(later(), name="later")
        assert ("r", Role.OPERATOR) == (context.request_id(), context.current_identity().role)
        with context.scope(timeout_s=100):
            assert context.time_remaining() < 1
    assert ("", None, Role.ANONYMOUS) == (
        context.request_id(),
        context.time_remaining(),
        context.current_identity().role,
    )


async def test_idempotent_methods_are_retried_by_grpc_itself(relay) -> None:
    """UNAVAILABLE is retried for the methods named, and for no others."""
    service, server, _ = relay
    service.failures = 2
    async with open_channel(server.target, retry_methods=["test.v1.RelayService/Flaky"]) as channel:
        assert "x" == (await call(channel, "Flaky")(StringValue(value="x"))).value
    assert 3 == service.calls
    service.calls = 0
    async with open_channel(server.target, retry_methods=["test.v1.RelayService/Left"]) as channel:
        with pytest.raises(grpc.RpcError):
            await call(channel, "Flaky")(StringValue(value="x"))
    assert 1 == service.calls


def test_the_service_config_says_what_is_retried() -> None:
    """JSON as gRPC wants it; one attempt or no method means no policy."""
    config = json.loads(service_config(RetryPolicy(max_attempts=3), ["a.B/C"]))["methodConfig"][0]
    assert ([{"service": "a.B", "method": "C"}], 3) == (config["name"], config["retryPolicy"]["maxAttempts"])
    assert ["UNAVAILABLE"] == config["retryPolicy"]["retryableStatusCodes"]
    assert "{}" == service_config(RetryPolicy(max_attempts=1), ["a.B/C"]) == service_config(RetryPolicy(), [])


def test_the_contracts_say_which_methods_are_idempotent() -> None:
    """Reads are retried, handing out work is not."""
    methods = idempotent_methods()
    assert "esper.v1.UrzaService/GetKernel" in methods
    assert "esper.v1.UrzaService/LeaseWork" not in methods


def test_every_streaming_method_of_the_contracts_is_long_or_finite_on_purpose() -> None:
    """The rule of names finds exactly the streams without an end."""
    from importlib import import_module
    from pkgutil import iter_modules

    import esper.v1

    found = {
        method.name
        for module in iter_modules(esper.v1.__path__)
        if module.name.endswith("_service_pb2")
        for service in import_module(f"esper.v1.{module.name}").DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if (method.client_streaming or method.server_streaming)
        and not is_long_stream(f"/{service.full_name}/{method.name}")
    }
    assert {"DownloadArtifact", "DownloadKernel", "UploadKernel"} == found


async def test_the_pool_shares_one_channel_per_target(relay) -> None:
    """Services behind one address share a connection; closing the pool closes it."""
    _, server, _ = relay
    targets = {"urza": server.target, "oona": server.target, "far": "127.0.0.1:1"}
    pool = ChannelPool(targets.__getitem__, token=lambda: token_for(Role.URZA))
    urza = pool.get("urza")
    assert urza is pool.get("oona")
    assert urza is not pool.get("far")
    assert "urza" == (await call(urza, "Left")(StringValue())).value
    await pool.close()
    with pytest.raises(grpc.aio.UsageError):
        await call(urza, "Left")(StringValue())


async def test_blocking_channels_carry_the_same_defaults(relay) -> None:
    """Deadline, identity and request id reach the server from a script too, in every shape of call."""
    service, server, _ = relay

    def script() -> tuple[str, list[str]]:
        with open_sync_channel(server.target, token=token_for(Role.URZA), default_timeout_s=4) as channel:
            with context.scope(request_id="script-1"):
                role = call(channel, "Left")(StringValue()).value
            return role, [item.value for item in call(channel, "Watch", "unary_stream")(StringValue())]

    assert ("urza", ["None"]) == await asyncio.to_thread(script)
    assert 3 < service.budgets[0] < 4.5
    assert ["script-1"] == service.request_ids


async def test_a_channel_behaves_like_grpcs_own(relay) -> None:
    """State, readiness and waiting are passed on."""
    _, server, _ = relay
    async with open_channel(server.target) as channel:
        assert grpc.ChannelConnectivity.IDLE is channel.get_state(try_to_connect=True)
        await channel.wait_for_state_change(grpc.ChannelConnectivity.IDLE)
        await channel.channel_ready()
        assert grpc.ChannelConnectivity.READY is channel.get_state()


async def test_a_given_authorization_is_kept(relay) -> None:
    """Metadata of the call's own comes before the channel's."""
    service, _, _ = relay
    metadata = (("authorization", f"Bearer {token_for(Role.CLIENT)}"),)
    assert "client" == (await call(service.channel, "Left")(StringValue(), metadata=metadata)).value


def test_an_empty_target_is_refused() -> None:
    """A channel to nowhere is named as such."""
    with pytest.raises(InvalidInput, match="needs a target"):
        open_channel("")


def test_channel_options_render_their_values() -> None:
    """What an operator sets is what gRPC gets."""
    rendered = dict(ChannelOptions(max_message_bytes=5000, reconnect_max_s=0.1).render())
    assert (5000, 100, 100) == (
        rendered["grpc.max_receive_message_length"],
        rendered["grpc.max_reconnect_backoff_ms"],
        rendered["grpc.initial_reconnect_backoff_ms"],
    )


async def test_failures_of_other_services_are_told_apart(relay, capsys) -> None:
    """Unhandled: a refusal is our defect, an absent service is UNAVAILABLE, a used-up deadline is itself."""
    service, _, channel = relay
    service.channel = open_channel("127.0.0.1:1", token=lambda: "x")
    with pytest.raises(grpc.RpcError) as absent:
        await call(channel, "Relay")(StringValue(value="5"), timeout=6)
    await service.channel.close()
    error = from_rpc_error(absent.value)
    assert (Unavailable, "DEPENDENCY_UNAVAILABLE") == (type(error), error.reason)

    class Late:
        """A channel whose calls come back too late, or with a refusal."""

        def __init__(self, code: grpc.StatusCode) -> None:
            self.code = code

        def unary_unary(self, *_args: object, **_more: object):
            async def fail(*_args: object, **_more: object) -> None:
                raise grpc.aio.AioRpcError(self.code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="row 7")

            return fail

    for code, kind in ((grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineMissed), (grpc.StatusCode.NOT_FOUND, InternalError)):
        service.channel = Late(code)
        with pytest.raises(grpc.RpcError) as failed:
            await call(channel, "Relay")(StringValue())
        assert kind is type(from_rpc_error(failed.value))
        assert "row 7" not in failed.value.details()
    assert "call to another service failed" in capsys.readouterr().err


async def test_a_write_that_fails_without_any_status_does_not_hang() -> None:
    """Where the core never delivers a status, gRPC's internal error ends the call after all."""

    class Core:
        text = ""

        def done(self) -> bool:
            return bool(self.text)

        def set_internal_error(self, text: str) -> None:
            self.text += text

    core, answered = Core(), Core()
    answered.text = "the server's own"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatusKeeper, "PATIENCE_S", 0.01)
        for inner in (core, answered):
            keeper = StatusKeeper(inner)
            keeper.set_internal_error("execute_batch")
            assert keeper.done() is (inner is answered)
        await asyncio.sleep(0.05)
    assert ("execute_batch", "the server's own") == (core.text, answered.text)
