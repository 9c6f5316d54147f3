"""The kernel cache: fast hits, one load for many askers, verification on every promotion, bounded tiers, pins."""

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
import zstandard

from esper.kasmina.blueprints import get
from esper.kasmina.cache import LOADED_OVERHEAD_BYTES, DiskStore, Fetched, KernelCache
from esper.kasmina.kernels import (
    KernelCorrupt,
    KernelUnfit,
    KernelUntrusted,
    PublicKey,
    SigningKey,
    Statement,
    Target,
    Tier,
    TrustStore,
    kernel_id_of,
)
from esper.kasmina.kernels.build import build
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import InvalidInput, Unavailable

VECTOR = Signature(Layout.VECTOR, 4, 4)
KEY = SigningKey.generate()


class Library:
    """A library of a few kernels, which counts and may be slow, broken or lying."""

    def __init__(self, bundles):
        self.bundles = {kernel_id_of(b): b for b in bundles}
        self.ids = list(self.bundles)
        self.fetches = []
        self.delay_s = 0.0
        self.error = None

    def fetch(self, kernel_id):
        """Bundle and verdict of a kernel."""
        self.fetches.append(kernel_id)
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return Fetched(self.bundles[kernel_id], verdict_of(kernel_id))


def charge(library, *kernel_ids):
    """What loaded kernels are accounted for."""
    return sum(len(library.bundles[kernel_id]) + LOADED_OVERHEAD_BYTES for kernel_id in kernel_ids)


def verdict_of(kernel_id):
    """A verdict that validates a kernel."""
    statement = Statement(
        kernel_id=kernel_id,
        passed=True,
        target="cpu/x86_64/avx2/torch-2.13",
        gauntlet_version="1",
        issued_at=datetime(2026, 11, 23, tzinfo=UTC),
    )
    return KEY.sign(statement)


@pytest.fixture(scope="module")
def bundles():
    """Three small kernels."""
    torch.set_num_threads(1)
    return [build(get("low_rank"), VECTOR, Tier.PORTABLE, seed=s) for s in range(3)]


@pytest.fixture
def library(bundles):
    """A library that has them."""
    return Library(bundles)


@pytest.fixture
def trusted():
    """The keys believed, as a list that a test may change."""
    return [KEY.public]


@pytest.fixture
def make(tmp_path, library, trusted):
    """Makes caches over one directory, as restarted processes do."""

    def cache(directory=tmp_path / "kernels", **keywords):
        defaults = {"available": lambda: 1.0, "target": Target.here()}
        return KernelCache(directory, library.fetch, lambda: TrustStore(trusted), **(defaults | keywords))

    return cache


def test_a_kernel_comes_from_the_library_once_and_from_memory_ever_after(make, library):
    """Get never fetches; obtain fetches once; both then give the same object."""
    cache, kernel_id = make(), library.ids[0]
    assert cache.get(kernel_id) is None
    kernel = cache.obtain(kernel_id, VECTOR)
    assert kernel is cache.get(kernel_id) is cache.obtain(kernel_id)
    assert [kernel_id] == library.fetches
    assert kernel_id in cache
    stats = cache.stats
    assert (2, 1, 0, 1) == (stats.hits, stats.misses, stats.disk_hits, stats.fetches)
    assert cache.nbytes == charge(library, kernel_id)


def test_a_hit_costs_microseconds(make, library):
    """A hit is far below what a training thread would notice (target 10 us; bound generous for a loaded machine)."""
    cache, kernel_id = make(), library.ids[0]
    cache.obtain(kernel_id)
    times = []
    for _ in range(2000):
        begin = time.perf_counter()
        cache.get(kernel_id)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[1000] < 50e-6


def test_the_next_process_finds_the_kernel_on_disk(make, library):
    """A restart needs no library."""
    make().obtain(library.ids[0])
    library.error = Unavailable("the library is away")
    cache = make()
    assert cache.obtain(library.ids[0]).id == library.ids[0]
    assert (1, 0) == (cache.stats.disk_hits, cache.stats.fetches)


def test_many_askers_wait_for_one_load(make, library):
    """Sixteen threads that want one kernel cause one fetch and get one object."""
    cache, library.delay_s = make(), 0.1
    with ThreadPoolExecutor(16) as pool:
        kernels = list(pool.map(cache.obtain, [library.ids[0]] * 16))
    assert 1 == len({id(kernel) for kernel in kernels})
    assert 1 == len(library.fetches)


def test_a_failure_reaches_every_asker_and_is_not_remembered(make, library):
    """All who waited get the error; the next attempt is a new one."""
    cache, library.delay_s, library.error = make(), 0.1, Unavailable("the library is away")
    with ThreadPoolExecutor(4) as pool:
        flights = [pool.submit(cache.obtain, library.ids[0]) for _ in range(4)]
    assert all(isinstance(flight.exception(), Unavailable) for flight in flights)
    library.error = None
    assert cache.obtain(library.ids[0]).id == library.ids[0]


def test_another_signature_is_refused_and_the_kernel_kept(make, library):
    """A kernel that does not fit this place is still good for others."""
    cache = make()
    with pytest.raises(KernelUnfit):
        cache.obtain(library.ids[0], Signature(Layout.VECTOR, 4, 5))
    assert library.ids[0] in cache


def entry_of(tmp_path, kernel_id, kind="kernel"):
    """The file of a disk entry."""
    digest = kernel_id.removeprefix("sha256:")
    return tmp_path / "kernels" / digest[:2] / f"{digest}.{kind}"


@pytest.mark.parametrize("kind", ["kernel", "verdict"])
def test_a_corrupted_disk_entry_is_dropped_and_fetched_again(make, library, tmp_path, kind):
    """One flipped byte on disk costs a fetch and a warning, and the entry is whole afterwards."""
    kernel_id = library.ids[0]
    make().obtain(kernel_id)
    path = entry_of(tmp_path, kernel_id, kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    cache = make()
    cache.obtain(kernel_id)
    assert 2 == len(library.fetches)
    assert library.bundles[kernel_id] == entry_of(tmp_path, kernel_id).read_bytes()


def test_a_truncated_or_foreign_verdict_file_counts_as_no_entry(make, library, tmp_path):
    """An entry that cannot even be read is fetched again."""
    make().obtain(library.ids[0])
    entry_of(tmp_path, library.ids[0], "verdict").write_text("{")
    cache = make()
    cache.obtain(library.ids[0])
    assert (0, 1) == (cache.stats.disk_hits, cache.stats.fetches)


def test_a_lying_library_is_refused_and_nothing_of_it_is_kept(make, library, tmp_path):
    """Bytes of another digest are neither loaded nor written to disk."""
    library.bundles[library.ids[0]] = library.bundles[library.ids[1]]
    cache = make()
    with pytest.raises(KernelCorrupt):
        cache.obtain(library.ids[0])
    assert library.ids[0] not in cache
    assert not entry_of(tmp_path, library.ids[0]).exists()


def test_a_revocation_counts_from_the_next_promotion(make, library, trusted):
    """A kernel on disk whose signer was revoked since is not loaded, even when the library still offers it."""
    make().obtain(library.ids[0])
    trusted.append(PublicKey(KEY.public.raw, revoked=True))
    with pytest.raises(KernelUntrusted, match="revoked"):
        make().obtain(library.ids[0])


def test_an_unsigned_kernel_is_never_kept(make, library, tmp_path):
    """Without a verdict there is neither a load nor a disk entry."""
    store = DiskStore(tmp_path / "other", 1 << 20)
    store.write(library.ids[0], Fetched(b"bundle", None))
    assert store.read(library.ids[0]) is None


def test_loaded_kernels_are_bounded_and_what_is_asked_for_stays(make, library):
    """With room for two, the third kernel replaces the one that nobody asked for since."""
    first, second, third = library.ids
    cache = make(loaded_bytes=max(charge(library, first, k) for k in (second, third)))
    cache.obtain(first)
    cache.obtain(second)
    cache.get(first)
    cache.obtain(third)
    cache.obtain(third)
    assert first in cache
    assert cache.nbytes == charge(library, *(k for k in library.ids if k in cache)) <= charge(library, *library.ids[:2])
    assert 1 == cache.stats.evictions + cache.stats.declined


def test_a_kernel_that_is_not_kept_is_given_all_the_same(make, library):
    """Where all that is there is in use, a newcomer goes to its asker and not into the account."""
    cache = make(loaded_bytes=charge(library, library.ids[0]))
    first, second, _ = library.ids
    with cache.pin(first):
        cache.obtain(first)
        assert second == cache.obtain(second).id
        assert (True, False) == (first in cache, second in cache)
    assert (0, 1) == (cache.stats.evictions, cache.stats.declined)
    assert cache.nbytes == charge(library, first)


def test_kernels_in_use_stay_loaded_and_others_free_their_memory(make, library):
    """The cache has the only reference to a kernel that nobody uses: once evicted it is gone; a pinned one is not."""
    cache = make(loaded_bytes=1)
    first, second, _ = library.ids
    with cache.pin(first):
        pinned = weakref.ref(cache.obtain(first))
        passing = weakref.ref(cache.obtain(second))
        gc.collect()
        assert passing() is None
        assert cache.get(first) is pinned() is not None
    gc.collect()
    assert pinned() is None
    assert 0 == cache.nbytes


def test_uses_are_counted(make, library):
    """Two users hold a kernel until both have let go, and nobody can let go more often."""
    cache = make(loaded_bytes=1)
    cache.hold(library.ids[0])
    cache.hold(library.ids[0])
    cache.obtain(library.ids[0])
    cache.release(library.ids[0])
    assert library.ids[0] in cache
    cache.release(library.ids[0])
    assert library.ids[0] not in cache
    with pytest.raises(InvalidInput, match="released more often than held"):
        cache.release(library.ids[0])


def test_forgetting_leaves_nothing(make, library, tmp_path):
    """A quarantined kernel leaves memory and disk."""
    cache = make()
    cache.obtain(library.ids[0])
    cache.forget(library.ids[0])
    assert library.ids[0] not in cache
    assert (0, 0, 0) == (cache.nbytes, cache.compressed_nbytes, cache.disk_nbytes)
    assert not entry_of(tmp_path, library.ids[0]).exists()
    cache.forget(library.ids[0])


def test_the_disk_is_bounded_and_the_oldest_use_goes_first(make, library, tmp_path):
    """With room for two on disk, verdicts included, the third entry removes the one used longest ago."""
    size = max(len(b) for b in library.bundles.values()) + 2048
    cache = make(disk_bytes=2 * size)
    for age, kernel_id in zip((300, 200), library.ids, strict=False):
        cache.obtain(kernel_id)
        os.utime(entry_of(tmp_path, kernel_id), (time.time() - age,) * 2)
    cache.obtain(library.ids[2])
    assert [False, True, True] == [entry_of(tmp_path, kernel_id).exists() for kernel_id in library.ids]
    files = [path for path in (tmp_path / "kernels").rglob("*") if path.is_file()]
    assert 4 == len(files)
    assert cache.disk_nbytes == sum(path.stat().st_size for path in files)


def test_a_full_disk_costs_only_the_disk_entry(make, library, tmp_path, monkeypatch, capfd):
    """When nothing can be written the kernel is used all the same, no half file stays, and the log says why."""

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    cache = make()
    monkeypatch.setattr("esper.kasmina.cache.disk.os.fsync", full)
    assert cache.obtain(library.ids[0]).id == library.ids[0]
    assert [] == [p for p in (tmp_path / "kernels").rglob("*") if p.is_file()]
    assert "No space left" in capfd.readouterr().err


def test_what_a_killed_process_left_is_cleared_away(make, library, tmp_path):
    """Old temporary files go at the first use, those of a living neighbour stay."""
    folder = tmp_path / "kernels" / "ab"
    folder.mkdir(parents=True)
    old, young = folder / ".tmp-old", folder / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    make().obtain(library.ids[0])
    assert (False, True) == (old.exists(), young.exists())


def test_without_a_directory_nothing_is_written(library, trusted):
    """A cache may live in memory alone."""
    cache = KernelCache(None, library.fetch, lambda: TrustStore(trusted))
    assert cache.obtain(library.ids[0]).id == library.ids[0]
    cache.forget(library.ids[0])


def test_odd_ids_cannot_leave_the_directory(make):
    """An id is a digest or it is refused: no path can be smuggled in."""
    with pytest.raises(InvalidInput, match="64 hexadecimal digits"):
        make().obtain("sha256:../../etc/passwd")


def test_threads_may_do_everything_at_once(make, library):
    """Obtain, get, pin and forget from many threads keep the account of bytes true."""
    cache = make(loaded_bytes=charge(library, *library.ids[:2]))
    stop = threading.Event()

    def work(number):
        turn = 0
        while not stop.is_set():
            turn += 1
            kernel_id = library.ids[(number + turn) % 3]
            if turn % 7 == 0:
                cache.forget(kernel_id)
            with cache.pin(kernel_id):
                assert cache.obtain(kernel_id).id == kernel_id
        return turn

    with ThreadPoolExecutor(4) as pool:
        flights = [pool.submit(work, number) for number in range(4)]
        time.sleep(0.8)
        stop.set()
    assert all(flight.result() > 0 for flight in flights)
    assert cache.nbytes == charge(library, *(k for k in library.ids if k in cache))


def test_verdicts_survive_the_disk(library, tmp_path):
    """What is read back is what was written, byte for byte."""
    store = DiskStore(tmp_path, 1 << 30)
    fetched = Fetched(b"bundle", replace(verdict_of(library.ids[0]), signature=bytes(range(64))))
    store.write(library.ids[0], fetched)
    assert fetched == store.read(library.ids[0])


def test_a_kernel_that_landed_in_between_is_not_loaded_again(make, library, monkeypatch):
    """Whoever found nothing, and comes to load only when another has, takes that one: loaded and accounted for once."""
    cache, kernel_id = make(), library.ids[0]
    look, landed = cache.get, []

    def get(wanted):
        found = look(wanted)
        if not landed:
            landed.append(None)
            landed[0] = cache.obtain(kernel_id)
        return found

    monkeypatch.setattr(cache, "get", get)
    assert cache.obtain(kernel_id) is landed[0]
    assert [kernel_id] == library.fetches
    assert cache.nbytes == charge(library, kernel_id)


def test_a_kernel_that_is_forgotten_on_its_way_is_not_kept(make, library):
    """A quarantine that comes during the download holds for what the download brings."""
    cache, kernel_id = make(), library.ids[0]
    fetch = library.fetch

    def slow(wanted):
        cache.forget(kernel_id)
        return fetch(wanted)

    cache._fetch = slow
    assert cache.obtain(kernel_id).id == kernel_id
    assert kernel_id not in cache
    assert (0, 0, 0) == (cache.nbytes, cache.compressed_nbytes, cache.disk_nbytes)


def test_an_unloaded_kernel_comes_back_from_compressed_memory(make, library):
    """Without a disk and with the library away, the compressed bundle suffices; it is much smaller than the bundle."""
    cache, kernel_id = make(directory=None, loaded_bytes=0), library.ids[0]
    cache.obtain(kernel_id)
    assert kernel_id not in cache
    assert 0 < cache.compressed_nbytes < len(library.bundles[kernel_id]) / 2
    library.error = Unavailable("the library is away")
    assert cache.obtain(kernel_id).id == kernel_id
    assert (1, 1) == (cache.stats.memory_hits, cache.stats.fetches)


@pytest.mark.parametrize("harm", ["bundle", "frame", "size"])
def test_a_damaged_bundle_in_memory_is_never_loaded(make, library, harm):
    """Digests are verified on the way up from memory too; what does not hold is dropped and taken from below."""
    cache, kernel_id = make(loaded_bytes=0), library.ids[0]
    cache.obtain(kernel_id)
    packed = cache._memory._packed[kernel_id]
    if harm == "bundle":
        changed = bytearray(library.bundles[kernel_id])
        changed[len(changed) // 2] ^= 1
        data = zstandard.compress(bytes(changed))
    else:
        data = packed.data[: len(packed.data) // 2] if harm == "frame" else zstandard.compress(b"another")
    cache._memory._packed[kernel_id] = packed._replace(data=data)
    assert cache.obtain(kernel_id).id == kernel_id
    assert (0, 1, 1) == (cache.stats.memory_hits, cache.stats.disk_hits, cache.stats.fetches)
    cache.obtain(kernel_id)
    assert 1 == cache.stats.memory_hits


def test_trust_is_asked_again_on_the_way_up_from_memory(make, library, trusted):
    """A signer that was revoked since the bundle was compressed is not believed."""
    cache = make(directory=None, loaded_bytes=0)
    cache.obtain(library.ids[0])
    trusted.append(PublicKey(KEY.public.raw, revoked=True))
    with pytest.raises(KernelUntrusted, match="revoked"):
        cache.obtain(library.ids[0])
    assert 0 == cache.compressed_nbytes


def test_scarce_memory_shrinks_the_cache_to_what_is_in_use(make, library):
    """First compressed bundles go, then kernels that nobody holds; held ones stay; it grows again afterwards."""
    share = [1.0]
    cache = make(available=lambda: share[0])
    first, second, third = library.ids
    cache.hold(first)
    for kernel_id in library.ids:
        cache.obtain(kernel_id)
    share[0] = 0.125
    cache.relieve()
    assert 0 == cache.compressed_nbytes
    assert all(kernel_id in cache for kernel_id in library.ids)
    assert cache.roomy
    share[0] = 0.04
    cache.relieve()
    assert [True, False, False] == [kernel_id in cache for kernel_id in library.ids]
    assert not cache.roomy
    assert second == cache.obtain(second).id
    assert second not in cache
    share[0] = 0.5
    cache.relieve()
    cache.obtain(third)
    assert third in cache
    assert cache.compressed_nbytes > 0
