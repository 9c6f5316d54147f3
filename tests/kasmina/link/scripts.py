"""A scripted controller, a scripted library, and what tests of the link share."""

import asyncio
import time

import torch

from esper.kasmina.control import FieldReport, HealthColumns, Outcome
from esper.kasmina.link import LinkSettings
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import NotFound, Unavailable
from esper.mesh.service import ANYONE_KNOWN, Service, allow
from esper.v1 import (
    blob_pb2,
    kernel_pb2,
    tamiyo_service_pb2,
    tamiyo_service_pb2_grpc,
    urza_service_pb2,
    urza_service_pb2_grpc,
    verdict_pb2,
)
from tests.services.tamiyo.tamiyo_mesh import verdict_over
from tests.services.tamiyo.tamiyo_worlds import kernel_id, make_site

FAST = LinkSettings(connect_timeout_s=2.0, probe_initial_s=0.02, probe_max_s=0.1, call_timeout_s=2.0, kernel_attempts=3)
SIGNATURE = Signature(Layout.VECTOR, 8, 8)
NOWHERE = "127.0.0.1:1"  # a port that nobody may bind: connections are refused at once

torch.set_num_threads(1)


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


def until_kernel(link, identifier, timeout_s=20.0):
    """Poll as a trainer does."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (kernel := link.kernel(identifier)) is not None:
            return kernel
        time.sleep(0.01)
    raise AssertionError("no kernel in time")


def fetch(link, identifier, signature=SIGNATURE):
    """Ask for a kernel and wait for it, as a trainer does."""
    link.request_kernel(identifier, signature)
    return until_kernel(link, identifier)


def some_health():
    """Of one seed."""
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


def some_report():
    """Of one life."""
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
