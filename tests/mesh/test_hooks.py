"""Validation by the contracts' own rules, and the metrics of every RPC."""

import asyncio
import contextvars
import urllib.request

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from prometheus_client import CollectorRegistry

from esper.mesh import context
from esper.mesh.channel import open_channel
from esper.mesh.errors import DeadlineMissed, InternalError, InvalidInput, NotFound, from_rpc_error
from esper.mesh.hooks import ContextHook, ErrorsHook, ValidationHook
from esper.mesh.interceptor import RpcCall
from esper.mesh.server import MeshServer
from esper.mesh.service import ANYONE_KNOWN, Service, allow
from esper.mesh.testing import TEST_SETTINGS, issuer, serve, service_context, settings_with
from esper.v1 import event_pb2, oona_service_pb2, urza_service_pb2, urza_service_pb2_grpc


class Library(urza_service_pb2_grpc.UrzaServiceServicer, Service):
    """Two methods of a real contract, without anything behind them."""

    name = "library"
    grpc_service_names = ("esper.v1.UrzaService",)
    policy = allow("esper.v1.UrzaService", {"GetKernel": ANYONE_KNOWN, "UploadKernel": ANYONE_KNOWN})
    asked = 0

    def register(self, server: grpc.aio.Server) -> None:
        urza_service_pb2_grpc.add_UrzaServiceServicer_to_server(self, server)

    async def GetKernel(self, request, context):  # noqa: N802  # the contract's name
        self.asked += 1
        return urza_service_pb2.GetKernelResponse()

    async def UploadKernel(self, request_iterator, context):  # noqa: N802  # the contract's name
        async for _ in request_iterator:
            self.asked += 1
        return urza_service_pb2.UploadKernelResponse()


async def test_a_request_that_breaks_a_rule_never_reaches_the_handler() -> None:
    """Each broken rule is a violation that names field, expectation and rule; unary and streamed messages alike."""
    library = Library()
    async with serve(library) as (_, channel):
        stub = urza_service_pb2_grpc.UrzaServiceStub(channel)
        with pytest.raises(grpc.RpcError) as unary:
            await stub.GetKernel(urza_service_pb2.GetKernelRequest(kernel="x" * 10_000))
        with pytest.raises(grpc.RpcError) as streamed:
            await stub.UploadKernel(iter([urza_service_pb2.UploadKernelRequest()]))
    assert 0 == library.asked
    error = from_rpc_error(unary.value)
    assert (InvalidInput, "VALIDATION_FAILED") == (type(error), error.reason)
    assert "kernel" == error.violations[0].field
    assert error.violations[0].rule
    assert error.public.startswith("GetKernelRequest: kernel: ")
    assert {"method": "/esper.v1.UrzaService/GetKernel", "message": "esper.v1.GetKernelRequest"} == error.metadata
    assert "VALIDATION_FAILED" == from_rpc_error(streamed.value).reason


async def test_a_lawful_request_passes() -> None:
    """Rules that hold cost nothing but a look."""
    library = Library()
    async with serve(library) as (_, channel):
        stub = urza_service_pb2_grpc.UrzaServiceStub(channel)
        await stub.GetKernel(urza_service_pb2.GetKernelRequest(kernel="sha256:" + "0" * 64))
    assert 1 == library.asked


def text(value: str) -> StringValue:
    """A message."""
    return StringValue(value=value)


def sample(registry: CollectorRegistry, name: str, method: str, shape: str, **more: str) -> float:
    """One value of a metric of the echo service."""
    labels = {"service": "test.v1.EchoService", "method": method, "shape": shape, **more}
    return registry.get_sample_value(name, labels) or 0.0


async def test_every_shape_is_counted_timed_and_its_messages_too(echo, stub_of) -> None:
    """Unary and streaming calls alike have started, handled by code, seconds, in-flight and messages."""
    async with serve(echo, drain=echo.drain_event) as (server, channel):
        stub = stub_of(channel)
        await stub.Unary(text("a"))
        for value in ("missing", "abort", "code"):
            with pytest.raises(grpc.RpcError):
                await stub.Unary(text(value))
        with pytest.raises(grpc.RpcError):
            await stub.Boom(text("x"))
        assert 3 == len([item async for item in stub.Generate(text("abc"))])
        await stub.Collect(iter([text("a"), text("b")]))
        stream = stub.Subscribe()
        await stream.write(text("a"))
        await stream.read()
        registry = server.registry
        assert 1 == sample(registry, "esper_rpc_in_flight", "Subscribe", "stream_stream")
        stream.cancel()
        with pytest.raises(grpc.RpcError):
            await stub.Hang(text("x"), timeout=1.0)  # long enough to reach the handler on a busy machine
        with pytest.raises(grpc.RpcError):
            await stub.Unknown(text("x"))
        async with asyncio.timeout(5):
            while not (  # noqa: ASYNC110  # metrics have no events to wait for
                sample(registry, "esper_rpc_handled_total", "Hang", "unary_unary", code="DEADLINE_EXCEEDED")
                and sample(registry, "esper_rpc_handled_total", "Subscribe", "stream_stream", code="CANCELLED")
            ):
                await asyncio.sleep(0.001)
    unary, handled = ("Unary", "unary_unary"), "esper_rpc_handled_total"
    assert 4 == sample(registry, "esper_rpc_started_total", *unary)
    assert [1, 1, 1, 1] == [
        sample(registry, handled, *unary, code=code) for code in ("OK", "NOT_FOUND", "DATA_LOSS", "ABORTED")
    ]
    assert 1 == sample(registry, handled, "Boom", "unary_unary", code="INTERNAL")
    assert 1 == sample(registry, handled, "Hang", "unary_unary", code="DEADLINE_EXCEEDED")
    assert 1 == sample(registry, "esper_rpc_seconds_count", "Generate", "unary_stream")
    assert 0 == sample(registry, "esper_rpc_in_flight", "Subscribe", "stream_stream")
    assert [1, 3] == [
        sample(registry, "esper_rpc_messages_total", "Generate", "unary_stream", direction=d)
        for d in ("received", "sent")
    ]
    assert [2, 1] == [
        sample(registry, "esper_rpc_messages_total", "Collect", "stream_unary", direction=d)
        for d in ("received", "sent")
    ]
    unknown = {"service": "unknown", "method": "unknown", "shape": "unknown", "code": "UNIMPLEMENTED"}
    assert 1 == registry.get_sample_value(handled, unknown)


async def test_the_metrics_page_shows_them_and_goes_with_the_server(echo, stub_of) -> None:
    """Prometheus reads the page on its own port; after the stop the port is free."""

    def read(port: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            return page.read().decode()

    async with serve(echo, settings=settings_with(metrics_port=0)) as (server, channel):
        await stub_of(channel).Unary(text("a"))
        page = await asyncio.to_thread(read, server.metrics_port)
    assert (
        'esper_rpc_handled_total{code="OK",method="Unary",service="test.v1.EchoService",shape="unary_unary"} 1.0'
        in page
    )
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(read, server.metrics_port)


async def test_two_servers_in_one_process_count_apart(echo, stub_of) -> None:
    """Each server has a registry of its own unless it is given one."""
    first, second = MeshServer(TEST_SETTINGS, [echo], issuer=issuer), MeshServer(TEST_SETTINGS, [], issuer=issuer)
    async with first, second, open_channel(first.target) as channel:
        await stub_of(channel).Unary(text("a"))
    assert 1 == sample(first.registry, "esper_rpc_started_total", "Unary", "unary_unary")
    assert 0 == sample(second.registry, "esper_rpc_started_total", "Unary", "unary_unary")


def test_a_policy_that_admits_nobody_is_a_mistake() -> None:
    """To refuse everyone, a method is left out."""
    with pytest.raises(ValueError, match="names no role"):
        allow("a.B", {"C": set()})


def test_a_test_that_calls_a_service_it_was_not_given_is_told(tmp_path) -> None:
    """The context of a test has no channels unless it gets some."""
    context = service_context("urza", tmp_path / "urza")
    assert context.data_dir.is_dir()
    assert context.clock().tzinfo is not None
    with pytest.raises(AssertionError, match="urza opened a channel to oona"):
        context.channel("oona")


def ended(error: BaseException, *, method: str = "/a.B/C") -> BaseException | None:
    """What the errors hook makes of an error."""
    call = RpcCall(method, "unary_unary", known=True, context=None, metadata={}, request_id="r-1")
    return ErrorsHook(asyncio.Event()).end(call, error)


def test_the_errors_hook_maps_what_handlers_raise(capsys) -> None:
    """Private texts stay behind, a timeout is the deadline's only when the deadline has passed."""
    refused = NotFound("gone", private="row 7")
    assert refused is ended(refused)
    defect = ended(InternalError("disk 3 lies", reason="STORE_BROKEN"))
    assert ("internal error", "STORE_BROKEN", {"request_id": "r-1"}) == (defect.public, defect.reason, defect.metadata)
    assert isinstance(ended(TimeoutError("a lock")), InternalError)
    with context.scope(timeout_s=0):
        assert isinstance(ended(TimeoutError()), DeadlineMissed)
    assert isinstance(ended(KeyboardInterrupt()), KeyboardInterrupt)
    assert "disk 3 lies" in capsys.readouterr().err


def test_an_absurdly_distant_deadline_is_none() -> None:
    """Some proxies send "infinite" as a number; it does not count as a deadline."""

    class Servicer:
        def time_remaining(self) -> float:
            return 1e12

    call = RpcCall("/a.B/C", "unary_unary", known=True, context=Servicer(), metadata={})

    def begin() -> float | None:
        ContextHook().start(call)
        return context.time_remaining()

    assert contextvars.copy_context().run(begin) is None
    assert call.notes["remaining_s"] is None


def test_violations_spell_paths_as_people_do() -> None:
    """Lists by index, maps by key, nesting by dots; what is no message of ours is not looked at."""
    call = RpcCall("/esper.v1.OonaService/Publish", "stream_stream", known=True, context=None, metadata={})
    events = [event_pb2.Event(id="a"), event_pb2.Event(id="b", attributes={"run": "v" * 300})]
    with pytest.raises(InvalidInput) as caught:
        ValidationHook().received(call, oona_service_pb2.PublishRequest(topic="", events=events))
    assert {"topic", 'events[1].attributes["run"]'} == {violation.field for violation in caught.value.violations}
    assert "(and 1 more)" in caught.value.public
    ValidationHook().received(call, b"raw bytes")
