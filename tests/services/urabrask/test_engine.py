"""The engine with real sandboxes: verdicts, and what becomes of kernels that take the sandbox down."""

import re

import pytest

from esper.kasmina.kernels.bundle import unpack
from esper.kasmina.kernels.signing import TrustStore
from esper.urabrask.engine import Candidate, Engine, NotJudged
from esper.urabrask.gauntlet.bundle import facts
from esper.urabrask.keys import KeyRing
from tests.services.urabrask.hostile import endless, greedy, kernel_id_of, sound, twisted


@pytest.fixture
def engine_of(tmp_path, clock):
    """Makes engines over a pool."""

    def make(pool, attempts=1):
        return Engine(pool, KeyRing.open(tmp_path, clock), attempts=attempts, clock=clock)

    return make


def candidate_of(data):
    """What the library would say of a bundle."""
    return Candidate(kernel_id_of(data), len(data), facts(unpack(data).manifest))


async def test_good_kernel_is_validated_and_signed(sandbox, engine_of, clock):
    """A sound kernel gets a verdict that a runtime believes which knows the engine's public key, and only then."""
    data = sound()
    engine = engine_of(sandbox())
    judgement = await engine.judge(candidate_of(data), data)
    said = TrustStore([engine.keys.current.public]).verify(judgement.signed, kernel_id_of(data))
    assert said == judgement.statement
    assert said.passed
    assert engine.target == said.target
    assert clock() == said.issued_at
    assert "size:tiny" in said.tags


async def test_hang_hunger_and_refusal_in_the_real_sandbox(sandbox, engine_of):
    """An endless loop and a memory bomb are rejected with the check they fell in; the sandbox is replaced."""
    pool = sandbox(wall_limit_s=8.0)
    engine = engine_of(pool)
    await pool.ready()
    hanging, hungry, wrong = twisted(endless), twisted(greedy), twisted(lambda d, x, p: d + 1)
    for data, words in ((hanging, "hang: the job did not end within 8 s"), (hungry, "memory: the job ")):
        said = (await engine.judge(candidate_of(data), data)).statement
        assert not said.passed
        assert said.checks[-1].finding.startswith(words)
        assert "contract.shape" == said.checks[-1].name
        assert [True] * 3 == [check.passed for check in said.checks[:-1]]
        assert () == said.tags
    said = (await engine.judge(candidate_of(wrong), wrong)).statement
    assert not said.passed
    assert {"numerics.outputs", "birth.output"} <= {check.name for check in said.checks if not check.passed}


async def test_crash_is_a_finding_after_the_attempts(sandbox, engine_of):
    """A kernel that kills the sandbox on every attempt is rejected, with the checks before and the one it fell in."""
    data = sound()
    engine = engine_of(sandbox("sandbox_entries:crash"), attempts=2)
    said = (await engine.judge(candidate_of(data), data)).statement
    assert ["bundle.integrity", "numerics.outputs"] == [check.name for check in said.checks]
    assert "crash: the worker was killed by SIGKILL" in said.checks[-1].finding
    assert said.checks[-1].finding.endswith("(2 attempts)")
    assert not said.passed


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("flood", "crash: the worker sent more than 60 reports of progress and was killed"),
        ("boast", r"crash: the worker sent no message of \d+ bytes: expected at most 1048576"),
    ],
)
async def test_flooding_is_a_finding(sandbox, engine_of, entry, words):
    """A sandbox that says too much is killed; of what it repeats, each check counts once."""
    data = sound()
    pool = sandbox(f"sandbox_entries:{entry}", max_result_bytes=1 << 20, max_reports=60)
    said = (await engine_of(pool).judge(candidate_of(data), data)).statement
    assert re.match(words, said.checks[-1].finding)
    assert ["bundle.integrity"] == [check.name for check in said.checks]


async def test_nonsense_is_a_finding(sandbox, engine_of):
    """A sandbox that claims what the gauntlet never says is not believed."""
    data = sound()
    engine = engine_of(sandbox("sandbox_entries:nonsense"))
    said = (await engine.judge(candidate_of(data), data)).statement
    assert not said.passed
    assert "nonsense: sandbox: expected each check once and in order" in said.checks[-1].finding


@pytest.mark.parametrize(
    ("entry", "options", "reason", "words"),
    [
        ("sandbox_entries:defect", {}, "GAUNTLET_DEFECT", "KeyError: 'no such check'"),
        ("sandbox_entries:elsewhere", {}, "TARGET_NOT_HERE", "compiled for the moon"),
        ("sandbox_entries:slow", {"warm": "sandbox_entries:broken"}, "SANDBOX_BROKEN", "no torch here"),
    ],
)
async def test_failures_of_the_machinery_condemn_nobody(sandbox, engine_of, entry, options, reason, words):
    """A defect of ours, another machine, or a sandbox that cannot start give no verdict at all."""
    data = sound()
    engine = engine_of(sandbox(entry, **options))
    with pytest.raises(NotJudged, match=words) as caught:
        await engine.judge(candidate_of(data), data)
    assert reason == caught.value.reason


async def test_sandbox_that_breaks_later_condemns_nobody(sandbox, engine_of):
    """When no new sandbox can be started, the kernel is not to blame either."""
    data = sound()
    pool = sandbox("sandbox_entries:defect")
    engine = engine_of(pool)
    await engine.find_target()
    for slot in pool._slots:
        await slot.child.kill()
    pool.warm = "sandbox_entries:broken"
    with pytest.raises(NotJudged, match="no torch here") as caught:
        await engine.judge(candidate_of(data), data)
    assert "SANDBOX_BROKEN" == caught.value.reason
