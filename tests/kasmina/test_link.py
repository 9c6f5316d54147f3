"""The link never holds training up: with no mesh, with one that is slow, that dies, that comes back, or that lies."""

import asyncio
import contextlib
import gc
import json
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import grpc.aio
import pytest
import torch

from esper.kasmina.control import Action, FieldReport, HealthColumns, Outcome
from esper.kasmina.kernels.rejection import KernelCorrupt, KernelUnfit, KernelUntrusted
from esper.kasmina.kernels.signing import SigningKey
from esper.kasmina.link import LinkSettings, MeshLink, Standing
from esper.kasmina.signature import Layout, Signature
from esper.mesh.bus import BusSubscriber
from esper.mesh.errors import NotFound, Stale, Unavailable
from esper.mesh.identity import Role
from esper.mesh.service import ANYONE_KNOWN, Service, allow
from esper.mesh.testing import serve
from esper.v1 import (
    blob_pb2,
    field_report_pb2,
    health_pb2,
    kernel_pb2,
    oona_service_pb2,
    tamiyo_service_pb2,
    tamiyo_service_pb2_grpc,
    urza_service_pb2,
    urza_service_pb2_grpc,
    verdict_pb2,
)
from tests.services.tamiyo.tamiyo_mesh import Mesh, open_mesh, real_kernel, verdict_over
from tests.services.tamiyo.tamiyo_worlds import kernel_id, make_hello, make_site, make_state

FAST = LinkSettings(connect_timeout_s=2.0, probe_initial_s=0.02, probe_max_s=0.1, call_timeout_s=2.0, kernel_attempts=3)
SIGNATURE = Signature(Layout.VECTOR, 8, 8)
NOWHERE = "127.0.0.1:1"  # a port that nobody may bind: connections are refused at once

torch.set_num_threads(1)


@pytest.fixture
def make_link():
    """Links that are closed with the test."""
    links = []

    def make(target, **keywords):
        link = MeshLink(target, **({"settings": FAST} | keywords))
        links.append(link)
        return link

    yield make
    for link in links:
        link.close(0.5)


async def on_trainer(function, *arguments):
    """Call the link as the training thread does: from another thread than any event loop's."""
    return await asyncio.to_thread(function, *arguments)


async def until(condition, timeout_s=15.0):
    """Wait for what background threads bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # threads have no asyncio event
            await asyncio.sleep(0.005)  # threads have no asyncio event


def timed(function, *arguments):
    """Result and seconds."""
    began = time.monotonic()
    return function(*arguments), time.monotonic() - began


# The controller


class ScriptedTamiyo(Service, tamiyo_service_pb2_grpc.TamiyoServiceServicer):
    """A controller that says what it is told to say, as late as it is told to."""

    name = "tamiyo"
    grpc_service_names = ("esper.v1.TamiyoService",)
    policy = allow("esper.v1.TamiyoService", {"Advise": ANYONE_KNOWN})

    def __init__(self, drain=None):
        self.hellos = []
        self.states = []
        self.delay_s = 0.0
        self.error = None
        self.prefetch = ()
        self.odd_first = False

    def register(self, server):
        tamiyo_service_pb2_grpc.add_TamiyoServiceServicer_to_server(self, server)

    async def Advise(self, request_iterator, context):  # noqa: N802  # the contract's name
        async for request in request_iterator:
            if self.error is not None:
                raise self.error
            if request.HasField("hello"):
                self.hellos.append(request.hello)
                if self.odd_first:
                    yield tamiyo_service_pb2.AdviseResponse(advice=tamiyo_service_pb2.Advice(boundary=1))
                yield tamiyo_service_pb2.AdviseResponse(ready=tamiyo_service_pb2.AdviseReady(policy="script"))
                continue
            self.states.append(request.state.boundary)
            await asyncio.sleep(self.delay_s)
            boundary = request.state.boundary
            # An answer that nobody asked for must not be taken for one that somebody did.
            yield tamiyo_service_pb2.AdviseResponse(advice=tamiyo_service_pb2.Advice(boundary=boundary + 1000))
            yield tamiyo_service_pb2.AdviseResponse(
                advice=tamiyo_service_pb2.Advice(
                    boundary=boundary,
                    explanation="as told",
                    controller_state=f"after {boundary}".encode(),
                    prefetch=self.prefetch,
                )
            )


@pytest.fixture
async def scripted():
    """A scripted controller and its address."""
    service = ScriptedTamiyo()
    async with serve(service) as (server, _):
        service.target = server.target
        yield service


def test_without_a_mesh_nothing_waits_and_nothing_fails(make_link):
    """Dead from the start: after the first refusal every method returns at once; kernels are refused with a reason."""
    link = make_link(NOWHERE)
    link.open(make_hello())
    assert link.advise(make_state(1), 2.0) is None
    advice, waited = timed(link.advise, make_state(2), 60.0)
    assert advice is None
    assert waited < 20
    assert Standing.AWAY is link.standing
    link.publish_health(_health())
    link.report(_report())
    link.event("transition", {"seed": 1})
    link.request_kernel(kernel_id(1), SIGNATURE)
    assert link.kernel(kernel_id(1)) is None
    with pytest.raises(Unavailable):
        _until_kernel(link, kernel_id(1))
    link.close(0.2)
    assert Standing.ENDED is link.standing


def test_a_link_that_was_never_opened_is_harmless(make_link):
    """Handing over without an open link drops and counts."""
    link = make_link(NOWHERE)
    link.event("early", {})
    link.request_kernel(kernel_id(1), SIGNATURE)
    assert link.kernel(kernel_id(1)) is None
    assert 1 == link._mail.dropped
    link.close(1.0)


async def test_the_controller_answers_through_the_link(tmp_path, make_link):
    """Against the real controller: explanation, state, and the same boundary."""
    async with open_mesh(tmp_path) as mesh:
        link = make_link(mesh.target)
        link.open(make_hello())
        advice = await on_trainer(link.advise, make_state(1), 5.0)
        assert 1 == advice.boundary
        assert "no validated kernel fits" in advice.explanation
        assert advice.controller_state
        assert Standing.READY is link.standing
        await on_trainer(link.close, 1.0)
        assert Standing.ENDED is link.standing
        assert link.advise(make_state(2), 5.0) is None


async def test_a_late_answer_is_never_heard(scripted, make_link):
    """A missed deadline gives None on time; the next stream begins with the state that was last handed out."""
    link = make_link(scripted.target)
    link.open(make_hello(controller_state=b""))
    assert b"after 1" == (await on_trainer(link.advise, make_state(1), 5.0)).controller_state
    scripted.delay_s = 30.0
    advice, waited = await on_trainer(timed, link.advise, make_state(2), 0.1)
    assert advice is None
    assert 0.09 < waited < 20
    scripted.delay_s = 0.0
    advice = await on_trainer(link.advise, make_state(3), 5.0)
    assert 3 == advice.boundary
    assert [b"", b"after 1"] == [hello.controller_state for hello in scripted.hellos]
    assert [1, 2, 3] == scripted.states


async def test_a_slow_controller_costs_few_deadlines(scripted, make_link):
    """After the allowed misses in a row it is away and costs nothing; probed in the background, it comes back."""
    link = make_link(scripted.target, settings=replace(FAST, misses_allowed=2))
    link.open(make_hello())
    await until(lambda: link.standing is Standing.READY)
    scripted.delay_s = 30.0
    for boundary in (1, 2):
        assert await on_trainer(link.advise, make_state(boundary), 0.05) is None
    await until(lambda: link.standing is not Standing.READY)
    costly = 0
    for boundary in range(3, 23):
        advice, waited = await on_trainer(timed, link.advise, make_state(boundary), 0.2)
        assert advice is None
        costly += waited > 0.19
    assert costly <= 10
    scripted.delay_s = 0.0
    boundary = 100

    async with asyncio.timeout(10):
        while await on_trainer(link.advise, make_state(boundary), 1.0) is None:
            boundary += 1
            await asyncio.sleep(0.02)
    assert await on_trainer(link.advise, make_state(boundary + 1), 1.0) is not None


async def test_a_mesh_that_dies_and_comes_back_is_found_again(make_link):
    """None at once while it is away; afterwards the run goes on from its last controller_state."""
    first = ScriptedTamiyo()
    link = None
    async with serve(first) as (server, _):
        port = server.port
        link = make_link(server.target)
        link.open(make_hello())
        assert await on_trainer(link.advise, make_state(1), 5.0) is not None
        await until(lambda: link.standing is Standing.READY)
    await until(lambda: link.standing is Standing.AWAY)
    advice, waited = await on_trainer(timed, link.advise, make_state(2), 60.0)
    assert advice is None
    assert waited < 20
    from esper.mesh.testing import settings_with

    second = ScriptedTamiyo()
    async with serve(second, settings=settings_with(port=port)):
        await until(lambda: link.standing is Standing.READY)
        assert 3 == (await on_trainer(link.advise, make_state(3), 5.0)).boundary
        assert b"after 1" == second.hellos[0].controller_state
        await on_trainer(link.close, 1.0)


async def test_a_question_survives_one_break_of_the_stream(scripted, make_link):
    """A hand-over between servers within the deadline is not even noticed: the question goes along."""
    link = make_link(scripted.target)
    link.open(make_hello())
    await until(lambda: link.standing is Standing.READY)
    scripted.error = Unavailable("drains")

    async def recover():
        await until(lambda: link.standing is not Standing.READY)
        scripted.error = None

    _, advice = await asyncio.gather(recover(), on_trainer(link.advise, make_state(1), 5.0))
    assert advice is None or advice.boundary == 1
    await until(lambda: link.standing is Standing.READY)
    assert 2 == (await on_trainer(link.advise, make_state(2), 5.0)).boundary


async def test_a_run_that_was_taken_over_asks_no_more(scripted, make_link):
    """Two trainers of one run must not take it from each other for ever; a new hello begins again."""
    scripted.error = Stale("a newer stream", reason="RUN_TAKEN_OVER")
    link = make_link(scripted.target)
    link.open(make_hello())
    await until(lambda: link.standing is Standing.ENDED)
    scripted.error = None
    assert link.advise(make_state(1), 5.0) is None
    link.open(make_hello())
    assert 2 == (await on_trainer(link.advise, make_state(2), 5.0)).boundary


async def test_going_back_to_a_checkpoint_opens_another_stream(scripted, make_link):
    """A boundary that is not after the last one, with or without a new hello, begins a new conversation."""
    link = make_link(scripted.target)
    link.open(make_hello())
    assert await on_trainer(link.advise, make_state(5), 5.0) is not None
    assert 3 == (await on_trainer(link.advise, make_state(3), 5.0)).boundary
    link.open(make_hello(controller_state=b"older"))
    assert 2 == (await on_trainer(link.advise, make_state(2), 5.0)).boundary
    assert [b"", b"after 5", b"older"] == [hello.controller_state for hello in scripted.hellos]


async def test_a_controller_that_does_not_speak_the_contract_is_away(scripted, make_link):
    """An advice before `ready`, or a refusal for good, is no reason to stop training."""
    scripted.odd_first = True
    link = make_link(scripted.target)
    link.open(make_hello())
    await until(lambda: link.standing is Standing.AWAY)
    assert link.advise(make_state(1), 5.0) is None


async def test_a_controller_that_never_says_ready_is_away(make_link):
    """Opening a stream has a deadline of its own."""

    class Mute(ScriptedTamiyo):
        async def Advise(self, request_iterator, context):  # noqa: N802  # the contract's name
            async for _ in request_iterator:
                await asyncio.sleep(60)
                yield tamiyo_service_pb2.AdviseResponse()

    async with serve(Mute()) as (server, _):
        link = make_link(server.target, settings=replace(FAST, connect_timeout_s=0.1))
        link.open(make_hello())
        advice, waited = await on_trainer(timed, link.advise, make_state(1), 5.0)
        assert advice is None
        assert waited < 2.0
        await on_trainer(link.close, 0.2)


async def test_a_state_that_cannot_be_sent_is_no_error_of_training(scripted, make_link):
    """A seed with a kernel id that is none costs the advice, and is logged."""
    from tests.services.tamiyo.tamiyo_worlds import make_seed

    link = make_link(scripted.target)
    link.open(make_hello())
    assert await on_trainer(link.advise, make_state(1, [make_seed(0, kernel_id="kernel one")]), 5.0) is None
    await until(lambda: link.standing is Standing.READY)
    assert await on_trainer(link.advise, make_state(2), 5.0) is not None


# Kernels


class ScriptedUrza(Service, urza_service_pb2_grpc.UrzaServiceServicer):
    """A library that may lie, fail or be slow."""

    name = "urza"
    grpc_service_names = ("esper.v1.UrzaService",)
    policy = allow(
        "esper.v1.UrzaService",
        dict.fromkeys(("GetKernel", "DownloadKernel", "ListKernels", "ListSigningKeys"), ANYONE_KNOWN),
    )

    def __init__(self, bundle, key):
        from esper.kasmina.kernels.bundle import kernel_id_of

        self.bundle, self.key = bundle, key
        self.id = kernel_id_of(bundle)
        self.verdict = verdict_over(key, self.id)
        self.state = kernel_pb2.KERNEL_STATE_VALIDATED
        self.revoked = False
        self.failures = 0
        self.parts = None
        self.gate = None
        self.downloads = 0
        self.fastest = None
        self.listings = []

    def register(self, server):
        urza_service_pb2_grpc.add_UrzaServiceServicer_to_server(self, server)

    def kernel(self):
        return kernel_pb2.Kernel(id=self.id, size_bytes=len(self.bundle), state=self.state, verdict=self.verdict)

    async def ListSigningKeys(self, request, context):  # noqa: N802  # the contract's name
        public = self.key.public
        key = verdict_pb2.SigningKey(key_id=public.key_id, public_key=public.raw, revoked=self.revoked)
        return urza_service_pb2.ListSigningKeysResponse(keys=[key])

    async def GetKernel(self, request, context):  # noqa: N802  # the contract's name
        if request.kernel != self.id:
            raise NotFound(f"no kernel {request.kernel}", reason="KERNEL_NOT_FOUND")
        return urza_service_pb2.GetKernelResponse(kernel=self.kernel())

    async def ListKernels(self, request, context):  # noqa: N802  # the contract's name
        self.listings.append(request)
        return urza_service_pb2.ListKernelsResponse(kernels=[] if self.fastest is None else [self.fastest])

    async def DownloadKernel(self, request, context):  # noqa: N802  # the contract's name
        self.downloads += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise Unavailable("not now")
        parts = ("kernel", "chunk", "digest") if self.parts is None else self.parts
        for part in parts:
            if part == "kernel":
                yield urza_service_pb2.DownloadKernelResponse(kernel=self.kernel())
            elif part == "chunk":
                yield urza_service_pb2.DownloadKernelResponse(chunk=blob_pb2.BlobChunk(data=self.bundle))
            else:
                digest = blob_pb2.BlobDigest(digest=self.id, size_bytes=len(self.bundle))
                yield urza_service_pb2.DownloadKernelResponse(digest=digest)


@pytest.fixture(scope="module")
def bundle():
    """A real portable kernel for vectors of width 8."""
    from esper.kasmina.blueprints.catalogue import get
    from esper.kasmina.kernels.build import build
    from esper.kasmina.kernels.bundle import Tier

    return build(get("low_rank"), SIGNATURE, Tier.PORTABLE)


@pytest.fixture
async def library(bundle):
    """A scripted library with one kernel, and its address."""
    service = ScriptedUrza(bundle, SigningKey.generate())
    async with serve(service, ScriptedTamiyo()) as (server, _):
        service.target = server.target
        yield service


def _until_kernel(link, identifier, timeout_s=20.0):
    """Poll as a trainer does."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (kernel := link.kernel(identifier)) is not None:
            return kernel
        time.sleep(0.01)
    raise AssertionError("no kernel in time")


def _fetch(link, identifier, signature=SIGNATURE):
    link.request_kernel(identifier, signature)
    return _until_kernel(link, identifier)


@pytest.fixture
def open_link(library, make_link, tmp_path):
    """A link to the scripted library."""

    def make(**settings):
        link = make_link(library.target, cache_dir=tmp_path / "cache", settings=replace(FAST, **settings))
        link.open(make_hello())
        return link

    return make


async def test_a_kernel_is_fetched_verified_and_loaded(open_link, library):
    """It runs, it is fetched once however often it is asked for, and it is found on disk by the next process."""
    link = open_link()
    for _ in range(3):
        link.request_kernel(library.id, SIGNATURE)
    kernel = await on_trainer(_until_kernel, link, library.id)
    module = kernel.instantiate()
    assert torch.equal(torch.zeros(5, 8), module(torch.randn(5, 8)))
    link.request_kernel(library.id, SIGNATURE)
    assert kernel is link.kernel(library.id)
    assert kernel is await on_trainer(_fetch, open_link(), library.id) or library.downloads == 1


async def test_a_link_that_follows_fetches_kernels_and_speaks_for_nobody(library, make_link, tmp_path):
    """On a rank for which another one speaks, kernels come; no run is announced, and nothing is answered."""
    link = make_link(library.target, cache_dir=tmp_path / "cache", settings=FAST)
    link.follow()
    link.follow()
    assert (await on_trainer(_fetch, link, library.id)).id == library.id
    assert await on_trainer(link.advise, make_state(1), 0.05) is None
    assert link.standing is not Standing.READY


async def test_a_broken_download_is_tried_again(open_link, library):
    """Trouble that passes is waited out in the background."""
    library.failures = 5  # one more than gRPC itself retries
    assert (await on_trainer(_fetch, open_link(), library.id)).id == library.id
    assert 6 == library.downloads


async def test_trouble_that_stays_is_told_once_and_may_be_tried_again(open_link, library):
    """The last error reaches whoever looks; a later request starts afresh."""
    library.failures = 100
    link = open_link()
    with pytest.raises(Unavailable, match="not now"):
        await on_trainer(_fetch, link, library.id)
    assert link.kernel(library.id) is None
    library.failures = 0
    assert (await on_trainer(_fetch, link, library.id)).id == library.id


async def test_one_wrong_byte_is_refused(open_link, library):
    """A tampered bundle never reaches torch."""
    changed = bytearray(library.bundle)
    changed[len(changed) // 2] ^= 1
    library.bundle = bytes(changed)
    with pytest.raises(Exception, match="digest") as caught:
        await on_trainer(_fetch, open_link(kernel_attempts=1), library.id)
    assert caught.value.reason in {"BLOB_DIGEST_MISMATCH", "KERNEL_CORRUPT"}


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda library: library.verdict.Clear(), "carries no signed verdict"),
        (lambda library: setattr(library, "verdict", verdict_over(SigningKey.generate(), library.id)), "not trusted"),
        (lambda library: setattr(library, "verdict", verdict_over(library.key, kernel_id(7))), "is about kernel"),
        (lambda library: setattr(library, "revoked", True), "was revoked"),
        (lambda library: setattr(library, "state", kernel_pb2.KERNEL_STATE_QUARANTINED), "holds it as QUARANTINED"),
        (lambda library: setattr(library, "state", kernel_pb2.KERNEL_STATE_STAGED), "holds it as STAGED"),
    ],
)
async def test_an_untrusted_kernel_is_refused(open_link, library, harm, text):
    """Unsigned, signed by a stranger, about another kernel, by a revoked key, or no longer served."""
    harm(library)
    with pytest.raises(KernelUntrusted, match=text):
        await on_trainer(_fetch, open_link(), library.id)


async def test_a_kernel_of_another_shape_is_refused(open_link, library):
    """Also when it was loaded for its right shape before."""
    link = open_link()
    with pytest.raises(KernelUnfit, match=r"vector:8->8.*vector:8->16"):
        await on_trainer(_fetch, link, library.id, Signature(Layout.VECTOR, 8, 16))
    assert (await on_trainer(_fetch, link, library.id)).id == library.id


async def test_a_kernel_is_not_handed_over_before_it_is_judged(open_link, library, monkeypatch):
    """Loaded for another shape it lies in the cache a moment before its refusal is known: it is not to be seen then."""
    link = open_link()
    obtain, loaded, judge = link._kernels.cache.obtain, threading.Event(), threading.Event()

    def slowly(identifier, signature):
        try:
            return obtain(identifier, signature)
        finally:
            loaded.set()
            judge.wait(20)

    monkeypatch.setattr(link._kernels.cache, "obtain", slowly)
    link.request_kernel(library.id, Signature(Layout.VECTOR, 8, 16))
    assert await on_trainer(loaded.wait, 20)
    assert library.id in link._kernels.cache
    assert link.kernel(library.id) is None
    judge.set()
    with pytest.raises(KernelUnfit):
        await on_trainer(_until_kernel, link, library.id)


async def test_pinned_keys_are_the_only_ones_believed(open_link, library):
    """A library cannot introduce a key of its own where keys are pinned; the pinned one still works."""
    with pytest.raises(KernelUntrusted, match="not trusted"):
        await on_trainer(_fetch, open_link(pinned_keys=(SigningKey.generate().public,)), library.id)
    pinned = open_link(pinned_keys=(library.key.public,))
    assert (await on_trainer(_fetch, pinned, library.id)).id == library.id
    library.revoked = True
    with pytest.raises(KernelUntrusted, match="was revoked"):
        await on_trainer(_fetch, open_link(pinned_keys=(library.key.public,)), library.id)


async def test_a_quarantined_kernel_leaves_the_cache(open_link, library):
    """What the library no longer serves is not taken from memory or disk either."""
    link = open_link()
    await on_trainer(_fetch, link, library.id)
    library.state = kernel_pb2.KERNEL_STATE_QUARANTINED
    with pytest.raises(KernelUntrusted, match="QUARANTINED"):
        # Another signature: it is there for its own only.
        await on_trainer(_refetch, link, library.id)
    library.state = kernel_pb2.KERNEL_STATE_VALIDATED
    assert (await on_trainer(_fetch, link, library.id)).id == library.id
    assert 2 == library.downloads


def _refetch(link, identifier):
    link.request_kernel(identifier, Signature(Layout.VECTOR, 8, 16))
    end = time.monotonic() + 10
    while time.monotonic() < end:
        link.kernel(identifier)
        time.sleep(0.01)


@pytest.mark.parametrize("parts", [(), ("chunk",), ("digest",), ("kernel", "kernel"), ("kernel", "digest")])
async def test_a_download_out_of_order_is_corrupt(open_link, library, parts):
    """A stream that is not what the contract says is refused, not guessed at."""
    library.parts = parts
    with pytest.raises(Exception, match=r"kernel|blob") as caught:
        await on_trainer(_fetch, open_link(kernel_attempts=1), library.id)
    assert grpc.StatusCode.DATA_LOSS.value[0] == caught.value.code


async def test_an_unknown_kernel_is_not_waited_for(open_link):
    """NOT_FOUND is an answer."""
    with pytest.raises(NotFound):
        await on_trainer(_fetch, open_link(), kernel_id(42))


async def test_advice_fills_the_cache_ahead(make_link, bundle):
    """Kernels named in `prefetch` are there when they are asked for; one that cannot be had disturbs nobody."""
    urza, tamiyo = ScriptedUrza(bundle, SigningKey.generate()), ScriptedTamiyo()
    tamiyo.prefetch = (bytes.fromhex(urza.id[7:]), bytes(32))
    async with serve(urza, tamiyo) as (server, _):
        link = make_link(server.target)
        link.open(make_hello())
        await on_trainer(link.advise, make_state(1), 5.0)
        assert (await on_trainer(_until_kernel, link, urza.id)).id == urza.id
        assert link.kernel(kernel_id(0)) is None
        await on_trainer(link.close, 1.0)


async def test_requests_and_refusals_are_bounded(open_link):
    """More requests than the bound are refused with a reason, or given up if they were mere prefetches."""
    link = open_link(max_kernels=1, call_timeout_s=2.0)
    with pytest.raises(Exception, match=r"fetched already|no kernel"):  # noqa: PT012  # the first refusal of several
        for number in range(2, 6):
            link.request_kernel(kernel_id(number), SIGNATURE)
        for _ in range(400):
            for number in range(2, 6):
                link.kernel(kernel_id(number))
            await asyncio.sleep(0.01)
    assert len(link._kernels._refusals) <= 1


async def test_a_defect_while_loading_reaches_whoever_asked(open_link, library, monkeypatch):
    """An exception that nobody foresaw is an error of that kernel, not a task that died in silence."""
    link = open_link()

    def broken(*_):
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(link._kernels.cache, "obtain", broken)
    with pytest.raises(Exception, match="RuntimeError: cosmic ray"):
        await on_trainer(_fetch, link, library.id)


async def test_a_kernel_is_held_as_long_as_a_seed_uses_it(open_link, library):
    """Requested it stays, however little room there is; when no seed uses it any more it leaves, and may come back."""
    link = open_link(loaded_bytes=0)
    first = weakref.ref(await on_trainer(_fetch, link, library.id))
    link.hold_kernels([library.id, library.id])
    link.hold_kernels([library.id])
    await on_trainer(_let_worker_finish, link)
    assert link.kernel(library.id) is first() is not None
    link.hold_kernels([])
    await until(lambda: link.kernel(library.id) is None)
    gc.collect()
    assert first() is None, "nothing but the cache may refer to a kernel that no seed uses"
    assert 0 == link._kernels.cache.nbytes
    link.hold_kernels([library.id])
    assert (await on_trainer(_fetch, link, library.id)).id == library.id
    assert 1 == library.downloads


def _let_worker_finish(link):
    """Everything that was asked of the link's loop, and then of its worker, has been done."""
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), link._loop).result()
    link._kernels._worker.submit(lambda: None).result()


async def test_a_seed_that_needs_what_is_fetched_ahead_is_told_how_it_goes(open_link, library):
    """A request that meets a prefetch under way takes it over: refusals are told, and the kernel is held."""
    gate = asyncio.Event()
    library.gate = gate
    link = open_link(loaded_bytes=0)
    link.prefetch([library.id])
    await until(lambda: library.downloads)
    link.request_kernel(library.id, SIGNATURE)
    await until(lambda: link._kernels._jobs[library.id].wanted is not None)
    gate.set()
    assert (await on_trainer(_until_kernel, link, library.id)).id == library.id
    library.state = kernel_pb2.KERNEL_STATE_QUARANTINED
    other = open_link()
    other.prefetch([library.id])
    other.request_kernel(library.id, SIGNATURE)
    with pytest.raises(KernelUntrusted, match="QUARANTINED"):
        await on_trainer(_until_kernel, other, library.id)


async def test_nothing_is_fetched_ahead_while_memory_is_scarce(open_link, library):
    """A prefetch is left alone then; what a seed needs is fetched and held all the same."""
    link = open_link()
    link._kernels.cache._available = lambda: 0.01
    link.hold_kernels([])
    await until(lambda: not link._kernels.cache.roomy)
    link.prefetch([library.id])
    await on_trainer(_let_worker_finish, link)
    assert {} == link._kernels._jobs
    assert (await on_trainer(_fetch, link, library.id)).id == library.id


async def test_what_is_fetched_ahead_is_under_way_until_it_is_settled(open_link, library):
    """Told from the call on, until it is there, refused, or declined for want of room; and never without a loop."""
    link = open_link(loaded_bytes=1)
    library.gate = asyncio.Event()
    link.prefetch([library.id])
    assert {library.id} == link.under_way([library.id, "sha256:" + "0" * 64])
    await until(lambda: library.downloads)
    assert {library.id} == link.under_way([library.id])
    library.gate.set()
    await until(lambda: not link.under_way([library.id]))
    assert (None, 1) == (link.kernel(library.id), link._kernels.cache.stats.declined)
    await on_trainer(link.close, 2.0)
    link.prefetch([library.id])
    assert not link.under_way([library.id])


def _measured(identifier, ratio):
    """A kernel of the library whose verdict says this of small inputs."""
    figures = {"latency.small.positions": 8.0, "latency.small.step.ratio": ratio, "latency.small.forward.ratio": ratio}
    return kernel_pb2.Kernel(
        id=identifier,
        verdict=verdict_pb2.Verdict(
            measurements=[verdict_pb2.Measurement(name=name, value=value) for name, value in figures.items()]
        ),
    )


async def test_a_faster_variant_is_fetched_and_offered_once_it_is_loaded(open_link, library, monkeypatch):
    """Told at a boundary what seeds use, the link asks for the fastest variant, and offers one that has faster code."""
    link = open_link(variant_interval_s=0.0)
    kernel = await on_trainer(_fetch, link, library.id)
    asked = []
    monkeypatch.setattr(link._kernels.variants, "_fetch", asked.extend)
    better = kernel_id(7)
    for fastest, expected in (
        (None, []),
        (_measured(library.id, 0.5), []),
        (_measured(better, 0.99), []),
        (_measured(better, 0.5), [better]),
    ):
        library.fastest, seen = fastest, len(library.listings)
        link.hold_kernels([library.id])
        await until(lambda seen=seen: len(library.listings) > seen and link._kernels.variants._task.done())
        assert expected == asked
    (request,) = library.listings[-1:]
    assert request.fastest_only
    assert (kernel.manifest.blueprint_id, 1) == (request.blueprint_id, len(request.signatures))
    assert link.faster_kernel(library.id) is None
    loaded = SimpleNamespace(compiled=None)
    monkeypatch.setattr(link._kernels.cache, "get", {better: loaded}.get)
    assert link.faster_kernel(library.id) is None
    loaded.compiled = object()
    assert link.faster_kernel(library.id) is loaded
    link.hold_kernels([])
    await until(lambda: link.faster_kernel(library.id) is None)


async def test_a_library_that_does_not_answer_costs_a_seed_nothing(open_link, library):
    """It keeps the kernel that it has; the library is asked again later."""
    link = open_link(variant_interval_s=0.0)
    await on_trainer(_fetch, link, library.id)
    library.fastest = "no kernel at all"
    for _ in range(2):
        seen = len(library.listings)
        link.hold_kernels([library.id])
        await until(lambda seen=seen: len(library.listings) > seen and link._kernels.variants._task.done())
    assert link.faster_kernel(library.id) is None
    assert link.kernel(library.id) is not None


def test_a_link_is_made_without_torch(run_python):
    """Torch is imported by the worker that loads the first kernel, not by whoever makes a link."""
    run_python("import sys, esper.kasmina.link as l; l.MeshLink('127.0.0.1:1'); assert 'torch' not in sys.modules")


async def test_the_whole_way_of_a_kernel(tmp_path, make_link):
    """Real library, real build, signed verdict, controller's decision, download, verification: and the module runs."""
    async with open_mesh(tmp_path / "mesh") as mesh:
        await mesh.submit("low_rank", "wide_mlp")
        hello = make_hello([make_site(0, signature=SIGNATURE)])
        link = make_link(mesh.target, cache_dir=tmp_path / "cache")
        link.open(hello)
        decision, boundary = None, 0
        async with asyncio.timeout(60):
            while decision is None:
                boundary += 1
                await mesh.forge(real_kernel)
                await mesh.judge()
                advice = await on_trainer(link.advise, make_state(boundary, step=boundary), 5.0)
                decision = advice.decisions[0] if advice.decisions else None
        assert Action.GERMINATE is decision.action
        kernel = await on_trainer(_fetch, link, decision.kernel.kernel_id)
        assert torch.equal(torch.zeros(3, 8), kernel.instantiate()(torch.randn(3, 8)))
        await on_trainer(link.close, 1.0)


# The bus


def _health():
    return HealthColumns(
        run_id="digits-1",
        step=7,
        seed=(1,),
        stage=(5,),
        alpha=(1.0,),
        gradient_norm=(0.5,),
        weight_norm=(2.0,),
        output_ratio=(0.25,),
        bottleneck=(0.125,),
    )


def _report():
    return FieldReport(
        run_id="digits-1",
        task="digits",
        site=make_site(1),
        kernel_id=kernel_id(1),
        blueprint_name="low_rank",
        outcome=Outcome.FOSSILIZED,
        germinated_boundary=2,
        ended_boundary=6,
        parameters=300,
        counterfactual=None,
        reason="it paid",
    )


async def _events(mesh: Mesh, topic, count):
    start = oona_service_pb2.START_POSITION_EARLIEST
    found = []
    async with asyncio.timeout(10), BusSubscriber(mesh.channel(Role.CLIENT), topic, start=start) as subscriber:
        async for delivery in subscriber:
            found.append(delivery.event)
            if len(found) == count:
                return found
    return found


async def test_what_a_run_leaves_on_the_bus(tmp_path, make_link):
    """Telemetry and reports as messages, events as JSON, each keyed by its run, in the order of leaving."""
    async with open_mesh(tmp_path) as mesh:
        link = make_link(mesh.target)
        link.open(make_hello())
        link.publish_health(_health())
        link.report(_report())
        fields = {"seed": 1, "when": Stale("x")}
        link.event("transition", fields)
        fields["seed"] = 2
        link.event("rollback", fields)
        link.event("too large", {"text": "x" * 300_000})
        await on_trainer(link.close, 5.0)
        (health,) = await _events(mesh, "telemetry", 1)
        (report,) = await _events(mesh, "field-reports", 1)
        events = await _events(mesh, "run-events", 2)
    assert 7 == health_pb2.HealthBatch.FromString(health.payload).step
    assert ("esper.v1.HealthBatch", "digits-1") == (health.type, health.key)
    assert kernel_id(1) == field_report_pb2.FieldReport.FromString(report.payload).kernel_id
    assert {"kind": "transition", "run_id": "digits-1", "fields": {"seed": 1, "when": "x"}} == json.loads(
        events[0].payload
    )
    assert ["transition", "rollback"] == [event.attributes["kind"] for event in events]
    assert {"application/json"} == {event.type for event in events}


async def test_what_is_left_while_the_bus_is_away_arrives_later(tmp_path, make_link):
    """Reports outlive a mesh that is started after the trainer."""
    async with open_mesh(tmp_path) as mesh:
        port = mesh.server.port
    link = make_link(f"127.0.0.1:{port}")
    link.open(make_hello())
    link.report(_report())
    await until(lambda: link.standing is Standing.AWAY)
    async with open_mesh(tmp_path, port=port) as mesh:
        assert 1 == len(await _events(mesh, "field-reports", 1))
        await on_trainer(link.close, 1.0)


def test_handing_over_is_bounded_and_fast(make_link):
    """Ten thousand reports to a dead bus: microseconds each, no more kept than the bound, the rest counted."""
    link = make_link(NOWHERE, settings=replace(FAST, report_limit=100, telemetry_limit=50))
    link.open(make_hello())
    _, took = timed(lambda: [link.report(_report()) for _ in range(2000)])
    _, health = timed(lambda: [link.publish_health(_health()) for _ in range(2000)])
    assert took < 2.0
    assert health < 2.0
    time.sleep(0.2)
    assert link._mail.dropped > 1000
    _, closing = timed(link.close, 0.1)
    assert closing < 1.5


async def test_closing_twice_and_in_the_middle_of_a_fetch_is_clean(open_link, library):
    """Nothing hangs when the run ends while a kernel is on its way."""
    library.failures = 100
    link = open_link(kernel_attempts=100)
    link.request_kernel(library.id, SIGNATURE)
    await asyncio.sleep(0.05)
    _, took = await on_trainer(timed, link.close, 0.5)
    assert took < 1.5
    link.close(0.5)
    link.event("late", {})
    assert not link._thread.is_alive()


def test_a_defect_of_the_background_thread_ends_the_link_not_the_run(make_link, monkeypatch):
    """Even then nothing raises into training."""
    link = make_link(NOWHERE)
    monkeypatch.setattr(link._mail, "start", lambda _channel: 1 / 0)
    link.open(make_hello())
    assert link.advise(make_state(1), 0.1) is None
    link.event("lost", {})
    with contextlib.suppress(Exception):
        link.close(0.5)
    assert not link._thread.is_alive()


def test_refusals_keep_their_class():
    """What the trainer catches is the tree of the mesh."""
    assert issubclass(KernelCorrupt, Exception)
