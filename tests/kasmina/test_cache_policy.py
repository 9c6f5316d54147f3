"""Who stays in the cache, and how much memory the cache may take."""

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.cache.policy import GreedyDual
from esper.kasmina.cache.pressure import Allowance, allowance, available_share
from loadtests._policies import Lru, Ours, hits, most_hits
from loadtests.bench_cache import SHARES, recorded


def ask(policy, key, size):
    """Ask for a key and load it when it is not there; whether it was."""
    there = key in policy
    policy.touch(key)
    if not there:
        policy.put(key, size)
    return there


def test_what_is_asked_for_often_survives_a_scan():
    """A sequence of keys that nobody asks for again does not wash out those in demand, as it would with LRU."""
    policy = GreedyDual(4)
    for _ in range(3):
        for key in "ab":
            ask(policy, key, 1)
    for number in range(8):
        ask(policy, f"once {number}", 1)
    assert "a" in policy
    assert "b" in policy


def test_a_large_key_leaves_before_many_small_ones():
    """For the room of one large key many small ones can stay."""
    policy = GreedyDual(100)
    ask(policy, "large", 60)
    for number in range(5):
        ask(policy, f"small {number}", 10)
    assert "large" not in policy
    assert 5 == len(policy)


def test_a_newcomer_must_be_worth_its_room():
    """What has the lowest priority of all leaves, even when it only just came; asked for again, it wins in the end."""
    policy = GreedyDual(100)
    for _ in range(3):
        for number in range(10):
            ask(policy, f"small {number}", 10)
    policy.touch("large")
    assert ["large"] == policy.put("large", 50)
    turns = 0
    while not ask(policy, "large", 50):
        turns += 1
        assert turns < 30


def test_the_past_fades():
    """Keys that were in demand once make room for those that are now."""
    policy = GreedyDual(3)
    for _ in range(15):
        for key in "abc":
            ask(policy, key, 1)
    for _ in range(20):
        for key in "xyz":
            ask(policy, key, 1)
    assert {"x", "y", "z"} == {key for key in "abcxyz" if key in policy}


def test_frequencies_of_keys_that_are_gone_are_forgotten():
    """A library of any size costs bounded memory."""
    policy = GreedyDual(3)
    for number in range(10_000):
        ask(policy, f"{number}", 1)
    assert len(policy._frequencies) < 400


def test_of_equals_the_one_used_longest_ago_leaves():
    """Equal size and demand: the order of use decides."""
    policy = GreedyDual(2)
    ask(policy, "a", 1)
    ask(policy, "b", 1)
    ask(policy, "b", 1)
    ask(policy, "a", 1)
    policy.touch("c")
    policy.touch("c")
    assert ["b"] == policy.put("c", 1)


def test_recorded_runs_hit_more_often_than_with_lru():
    """The reason to have a policy, on requests of real runs; and no policy beats the bound that it is compared with."""
    traces, _ = recorded()
    together = traces[-1]
    ours = lru = 0
    for share in SHARES:
        room = int(share * together.footprint)
        found = hits(Ours(room), together.keys, together.sizes)
        ours, lru = ours + found, lru + hits(Lru(room), together.keys, together.sizes)
        assert found <= most_hits(together.keys, together.sizes, room) + 1e-6
    assert ours > lru


@pytest.mark.parametrize(
    ("trace", "sizes", "room", "expected"),
    [
        ("abab", {"a": 1, "b": 1}, 1, 1),  # one of the two can stay
        ("abab", {"a": 1, "b": 1}, 2, 2),
        ("abcabc", {"a": 2, "b": 1, "c": 1}, 2, 2),  # rather the two small ones
        ("aa", {"a": 2}, 1, 0),  # never fits
    ],
)
def test_the_bound_is_what_foresight_reaches(trace, sizes, room, expected):
    """Small traces whose best is plain."""
    assert pytest.approx(expected) == most_hits(list(trace), sizes, room)


requests = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["ask", "pin", "unpin", "remove", "shrink", "grow"])),
    max_size=80,
)


@given(requests, st.lists(st.integers(0, 40), min_size=8, max_size=8))
def test_the_account_is_exact_whatever_happens(steps, sizes):
    """Bytes are those of the keys that are there, within the capacity but for pinned keys, which never leave."""
    policy, there, pinned = GreedyDual(100), {}, set()
    sizes = dict(zip("abcdefgh", sizes, strict=True))
    for key, action in steps:
        gone = []
        if action == "ask":
            policy.touch(key)
            there[key] = sizes[key]
            gone = policy.put(key, sizes[key])
        elif action == "pin":
            policy.pin(key)
            pinned.add(key)
        elif action == "unpin":
            policy.unpin(key)
            pinned.discard(key)
            gone = policy.settle()
        elif action == "remove":
            policy.remove(key)
            there.pop(key, None)
        else:
            gone = policy.settle(50 if action == "shrink" else 100)
        for victim in gone:
            assert victim not in pinned
            del there[victim]
        assert sorted(there) == [k for k in "abcdefgh" if k in policy]
        assert sum(there.values()) == policy.size
        assert policy.size <= max(policy.capacity, sum(size for k, size in there.items() if k in pinned))


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (0.9, Allowance(1.0, 1.0, ahead=True)),
        (0.2, Allowance(1.0, 1.0, ahead=True)),
        (0.1625, Allowance(0.5, 1.0, ahead=True)),
        (0.125, Allowance(0.0, 1.0, ahead=True)),
        (0.0875, Allowance(0.0, 0.5, ahead=True)),
        (0.05, Allowance(0.0, 0.0, ahead=True)),
        (0.0, Allowance(0.0, 0.0, ahead=False)),
    ],
)
def test_what_scarcity_costs(available, expected):
    """The table of the policy: compressed bundles first, then loaded kernels, at last nothing ahead."""
    assert pytest.approx(expected) == allowance(available)


GIB = 1 << 30


def group(folder, limit, used, droppable, version=2):
    """A memory control group as Linux shows it."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {droppable}\n")


@pytest.fixture
def machine(monkeypatch):
    """A machine of 64 GiB, half of it available."""

    class Memory:
        total, available = 64 * GIB, 32 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("0::/job/step\n", 0.25),  # step has no limit, job has used 4 of 4 GiB, of which 1 GiB is page cache
        ("0::/free\n", 0.5),  # not limited: the machine
        ("0::/nowhere/to/be/seen\n", 0.5),
        ("5:cpu,memory:/old\n1:name=systemd:/x\n", 0.125),
    ],
)
@pytest.mark.usefixtures("machine")
def test_available_is_the_least_of_machine_and_groups(tmp_path, own, expected):
    """Limits of the group and of those around it bind; page cache that can be dropped is available; both versions."""
    group(tmp_path / "job", 4 * GIB, 4 * GIB, GIB)
    group(tmp_path / "job" / "step", "max", 4 * GIB, GIB)
    group(tmp_path / "free", 1 << 62, 4 * GIB, 0)
    group(tmp_path / "memory" / "old", 8 * GIB, 7 * GIB, 0, version=1)
    (tmp_path / "own").write_text(own)
    assert expected == available_share(tmp_path, tmp_path / "own")


@pytest.mark.usefixtures("machine")
def test_without_control_groups_the_machine_counts(tmp_path):
    """Other systems have none."""
    assert 0.5 == available_share(tmp_path, tmp_path / "none")


def test_this_machine_has_some_memory():
    """The real files of the system where the tests run can be read."""
    assert 0 <= available_share() <= 1
