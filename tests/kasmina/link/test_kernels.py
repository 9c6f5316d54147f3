"""A kernel is fetched, verified and loaded beside the training thread, or refused with its reason."""

import asyncio
import gc
import threading
import time
import weakref
from types import SimpleNamespace

import grpc.aio
import pytest
import torch

from esper.kasmina.control import Action
from esper.kasmina.kernels.rejection import KernelUnfit, KernelUntrusted
from esper.kasmina.kernels.signing import SigningKey
from esper.kasmina.link import Standing
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import NotFound, Unavailable
from esper.mesh.testing import serve
from esper.v1 import (
    kernel_pb2,
    verdict_pb2,
)
from tests.kasmina.link.scripts import (
    FAST,
    SIGNATURE,
    ScriptedTamiyo,
    ScriptedUrza,
    fetch,
    on_trainer,
    until,
    until_kernel,
)
from tests.services.tamiyo.tamiyo_mesh import open_mesh, real_kernel, verdict_over
from tests.services.tamiyo.tamiyo_worlds import kernel_id, make_hello, make_site, make_state


async def test_a_kernel_is_fetched_verified_and_loaded(open_link, library):
    """It runs, it is fetched once however often it is asked for, and it is found on disk by the next process."""
    link = open_link()
    for _ in range(3):
        link.request_kernel(library.id, SIGNATURE)
    kernel = await on_trainer(until_kernel, link, library.id)
    module = kernel.instantiate()
    assert torch.equal(torch.zeros(5, 8), module(torch.randn(5, 8)))
    link.request_kernel(library.id, SIGNATURE)
    assert kernel is link.kernel(library.id)
    assert kernel is await on_trainer(fetch, open_link(), library.id) or library.downloads == 1


async def test_a_link_that_follows_fetches_kernels_and_speaks_for_nobody(library, make_link, tmp_path):
    """On a rank for which another one speaks, kernels come; no run is announced, and nothing is answered."""
    link = make_link(library.target, cache_dir=tmp_path / "cache", settings=FAST)
    link.follow()
    link.follow()
    assert (await on_trainer(fetch, link, library.id)).id == library.id
    assert await on_trainer(link.advise, make_state(1), 0.05) is None
    assert link.standing is not Standing.READY


async def test_a_broken_download_is_tried_again(open_link, library):
    """Trouble that passes is waited out in the background."""
    library.failures = 5  # one more than gRPC itself retries
    assert (await on_trainer(fetch, open_link(), library.id)).id == library.id
    assert 6 == library.downloads


async def test_trouble_that_stays_is_told_once_and_may_be_tried_again(open_link, library):
    """The last error reaches whoever looks; a later request starts afresh."""
    library.failures = 100
    link = open_link()
    with pytest.raises(Unavailable, match="not now"):
        await on_trainer(fetch, link, library.id)
    assert link.kernel(library.id) is None
    library.failures = 0
    assert (await on_trainer(fetch, link, library.id)).id == library.id


async def test_one_wrong_byte_is_refused(open_link, library):
    """A tampered bundle never reaches torch."""
    changed = bytearray(library.bundle)
    changed[len(changed) // 2] ^= 1
    library.bundle = bytes(changed)
    with pytest.raises(Exception, match="digest") as caught:
        await on_trainer(fetch, open_link(kernel_attempts=1), library.id)
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
        await on_trainer(fetch, open_link(), library.id)


async def test_a_kernel_of_another_shape_is_refused(open_link, library):
    """Also when it was loaded for its right shape before."""
    link = open_link()
    with pytest.raises(KernelUnfit, match=r"vector:8->8.*vector:8->16"):
        await on_trainer(fetch, link, library.id, Signature(Layout.VECTOR, 8, 16))
    assert (await on_trainer(fetch, link, library.id)).id == library.id


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
        await on_trainer(until_kernel, link, library.id)


async def test_pinned_keys_are_the_only_ones_believed(open_link, library):
    """A library cannot introduce a key of its own where keys are pinned; the pinned one still works."""
    with pytest.raises(KernelUntrusted, match="not trusted"):
        await on_trainer(fetch, open_link(pinned_keys=(SigningKey.generate().public,)), library.id)
    pinned = open_link(pinned_keys=(library.key.public,))
    assert (await on_trainer(fetch, pinned, library.id)).id == library.id
    library.revoked = True
    with pytest.raises(KernelUntrusted, match="was revoked"):
        await on_trainer(fetch, open_link(pinned_keys=(library.key.public,)), library.id)


async def test_a_quarantined_kernel_leaves_the_cache(open_link, library):
    """What the library no longer serves is not taken from memory or disk either."""
    link = open_link()
    await on_trainer(fetch, link, library.id)
    library.state = kernel_pb2.KERNEL_STATE_QUARANTINED
    with pytest.raises(KernelUntrusted, match="QUARANTINED"):
        # Another signature: it is there for its own only.
        await on_trainer(_refetch, link, library.id)
    library.state = kernel_pb2.KERNEL_STATE_VALIDATED
    assert (await on_trainer(fetch, link, library.id)).id == library.id
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
        await on_trainer(fetch, open_link(kernel_attempts=1), library.id)
    assert grpc.StatusCode.DATA_LOSS.value[0] == caught.value.code


async def test_an_unknown_kernel_is_not_waited_for(open_link):
    """NOT_FOUND is an answer."""
    with pytest.raises(NotFound):
        await on_trainer(fetch, open_link(), kernel_id(42))


async def test_advice_fills_the_cache_ahead(make_link, bundle):
    """Kernels named in `prefetch` are there when they are asked for; one that cannot be had disturbs nobody."""
    urza, tamiyo = ScriptedUrza(bundle, SigningKey.generate()), ScriptedTamiyo()
    tamiyo.prefetch = (bytes.fromhex(urza.id[7:]), bytes(32))
    async with serve(urza, tamiyo) as (server, _):
        link = make_link(server.target)
        link.open(make_hello())
        await on_trainer(link.advise, make_state(1), 5.0)
        assert (await on_trainer(until_kernel, link, urza.id)).id == urza.id
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
        await on_trainer(fetch, link, library.id)


async def test_a_kernel_is_held_as_long_as_a_seed_uses_it(open_link, library):
    """Requested it stays, however little room there is; when no seed uses it any more it leaves, and may come back."""
    link = open_link(loaded_bytes=0)
    first = weakref.ref(await on_trainer(fetch, link, library.id))
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
    assert (await on_trainer(fetch, link, library.id)).id == library.id
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
    assert (await on_trainer(until_kernel, link, library.id)).id == library.id
    library.state = kernel_pb2.KERNEL_STATE_QUARANTINED
    other = open_link()
    other.prefetch([library.id])
    other.request_kernel(library.id, SIGNATURE)
    with pytest.raises(KernelUntrusted, match="QUARANTINED"):
        await on_trainer(until_kernel, other, library.id)


async def test_nothing_is_fetched_ahead_while_memory_is_scarce(open_link, library):
    """A prefetch is left alone then; what a seed needs is fetched and held all the same."""
    link = open_link()
    link._kernels.cache._available = lambda: 0.01
    link.hold_kernels([])
    await until(lambda: not link._kernels.cache.roomy)
    link.prefetch([library.id])
    await on_trainer(_let_worker_finish, link)
    assert {} == link._kernels._jobs
    assert (await on_trainer(fetch, link, library.id)).id == library.id


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
    kernel = await on_trainer(fetch, link, library.id)
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
    assert make_hello().target == request.target
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
    await on_trainer(fetch, link, library.id)
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
        kernel = await on_trainer(fetch, link, decision.kernel.kernel_id)
        assert torch.equal(torch.zeros(3, 8), kernel.instantiate()(torch.randn(3, 8)))
        await on_trainer(link.close, 1.0)
