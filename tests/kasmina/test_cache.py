"""The kernel cache: fast hits, one load for many askers, verification on every promotion, bounded memory and disk."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from esper.kasmina.blueprints import get
from esper.kasmina.cache import DiskStore, Fetched, KernelCache
from esper.kasmina.kernels import (
    KernelCorrupt,
    KernelUnfit,
    KernelUntrusted,
    PublicKey,
    SigningKey,
    Statement,
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
        return KernelCache(directory, library.fetch, lambda: TrustStore(trusted), **keywords)

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
    assert (2, 2, 0, 1) == (stats.hits, stats.misses, stats.disk_hits, stats.fetches)
    assert cache.nbytes == kernel.nbytes


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


def test_memory_is_bounded_and_the_oldest_use_goes_first(make, library):
    """With room for two, the third kernel evicts the one that nobody used since."""
    size = max(len(b) for b in library.bundles.values())
    cache = make(memory_bytes=2 * size)
    first, second, third = library.ids
    cache.obtain(first)
    cache.obtain(second)
    cache.get(first)
    cache.obtain(third)
    assert (True, False, True) == tuple(k in cache for k in (first, second, third))
    assert cache.nbytes <= 2 * size
    assert 1 == cache.stats.evictions


def test_kernels_in_use_stay(make, library):
    """A pinned kernel is not evicted; its release makes room at once."""
    cache = make(memory_bytes=len(library.bundles[library.ids[0]]))
    first, second, _ = library.ids
    cache.obtain(first)
    with cache.pin(first):
        cache.obtain(second)
        assert first in cache
        assert second not in cache
    assert cache.get(first) is not None
    cache.obtain(second)
    assert first not in cache


def test_uses_are_counted(make, library):
    """Two users hold a kernel until both have let go, and nobody can let go more often."""
    cache = make(memory_bytes=1)
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
    assert 0 == cache.nbytes
    assert not entry_of(tmp_path, library.ids[0]).exists()
    cache.forget(library.ids[0])


def test_the_disk_is_bounded_and_the_oldest_use_goes_first(make, library, tmp_path):
    """With room for two on disk the third entry removes the one used longest ago."""
    size = max(len(b) for b in library.bundles.values())
    cache = make(disk_bytes=2 * size)
    for age, kernel_id in zip((300, 200), library.ids, strict=False):
        cache.obtain(kernel_id)
        os.utime(entry_of(tmp_path, kernel_id), (time.time() - age,) * 2)
    cache.obtain(library.ids[2])
    assert [False, True, True] == [entry_of(tmp_path, kernel_id).exists() for kernel_id in library.ids]


def test_a_full_disk_costs_only_the_disk_entry(make, library, tmp_path, monkeypatch, capfd):
    """When nothing can be written the kernel is used all the same, no half file stays, and the log says why."""

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    cache = make()
    monkeypatch.setattr("esper.kasmina.cache.os.fsync", full)
    assert cache.obtain(library.ids[0]).id == library.ids[0]
    assert [] == [p for p in (tmp_path / "kernels").rglob("*") if p.is_file()]
    assert "No space left" in capfd.readouterr().err


def test_what_a_killed_process_left_is_cleared_away(make, tmp_path):
    """Old temporary files go at the start, those of a living neighbour stay."""
    folder = tmp_path / "kernels" / "ab"
    folder.mkdir(parents=True)
    old, young = folder / ".tmp-old", folder / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    make()
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
    cache = make(memory_bytes=2 * len(library.bundles[library.ids[0]]))
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
    assert cache.nbytes == sum(len(library.bundles[k]) for k in library.ids if k in cache)


def test_verdicts_survive_the_disk(library, tmp_path):
    """What is read back is what was written, byte for byte."""
    store = DiskStore(tmp_path, 1 << 30)
    fetched = Fetched(b"bundle", replace(verdict_of(library.ids[0]), signature=bytes(range(64))))
    store.write(library.ids[0], fetched)
    assert fetched == store.read(library.ids[0])
