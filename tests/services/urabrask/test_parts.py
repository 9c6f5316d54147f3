"""Findings, keys, tags, board, conversions: the parts without a sandbox."""

import asyncio
import json
import stat
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.blueprints.ir import Birth
from esper.kasmina.kernels.bundle import Manifest, Tier
from esper.kasmina.signature import Layout, Signature
from esper.mesh.errors import Conflict, Corrupt, InvalidInput
from esper.mesh.workers import WorkerInfo, WorkerState
from esper.urabrask.board import KEPT, WATCHER_QUEUE, Board
from esper.urabrask.checks import CHECKS, TOLERANCES
from esper.urabrask.convert import (
    candidate_from_proto,
    signed_from_proto,
    statement_from_proto,
    verdict_to_proto,
    worker_to_proto,
)
from esper.urabrask.findings import check_from, findings_from
from esper.urabrask.keys import KeyRing
from esper.urabrask.library import _chunks
from esper.urabrask.tags import tags_of
from esper.v1 import (
    blob_pb2,
    blueprint_pb2,
    build_pb2,
    forge_pb2,
    kernel_pb2,
    signature_pb2,
    tensor_pb2,
    urza_service_pb2,
)


def passing():
    """What an honest sandbox sends."""
    return {
        "target": "cpu/x86_64/avx2/torch-2.13",
        "checks": [{"name": spec.name, "passed": True, "finding": "fine", "elapsed_ms": 1.5} for spec in CHECKS],
        "measurements": [{"name": "memory.peak", "value": 10, "unit": "bytes"}],
        "tags": ["size:tiny"],
    }


def nested(depth):
    """A list in a list in a list."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


class TestFindings:
    def test_all_checks_passed(self):
        """Every check present and passed is a pass."""
        assert findings_from(passing()).passed

    def test_one_failure(self):
        """One failed check is none, and may end the list."""
        document = passing()
        document["checks"] = document["checks"][:3]
        document["checks"][2]["passed"] = False
        assert not findings_from(document).passed

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d["checks"].pop(),
            lambda d: d["checks"].clear(),
            lambda d: d["checks"].reverse(),
            lambda d: d["checks"].__setitem__(1, d["checks"][0]),
            lambda d: d["checks"][0].update(name="made.up"),
            lambda d: d["checks"][0].update(passed=1),
            lambda d: d["checks"][0].update(finding=None),
            lambda d: d["checks"][0].update(elapsed_ms=float("nan")),
            lambda d: d["checks"][0].update(elapsed_ms=10**400),
            lambda d: d["checks"].__setitem__(0, "fine"),
            lambda d: d.update(checks="fine"),
            lambda d: d.update(measurements=[1]),
            lambda d: d.update(measurements=[{"name": "x", "unit": "us", "value": float("inf")}]),
            lambda d: d.update(measurements=[{"name": "x", "unit": "us", "value": True}]),
            lambda d: d.update(measurements=[{"name": "x", "unit": "us", "value": 1}] * 65),
            lambda d: d.update(tags=[1]),
            lambda d: d.update(tags=nested(20_000)),
            lambda d: d["checks"].__setitem__(0, nested(20_000)),
            lambda d: d.update(tags=["x"] * 33),
            lambda d: d.pop("target"),
        ],
    )
    def test_lies_are_refused(self, change):
        """Whatever the gauntlet itself would not send is not believed."""
        document = passing()
        change(document)
        with pytest.raises(InvalidInput, match="sandbox: expected"):
            findings_from(document)

    @given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.dictionaries(st.text(), x)))
    def test_anything_else_is_refused(self, document):
        """No JSON value whatever passes for the result of a check without being one."""
        with pytest.raises(InvalidInput):
            check_from(document)

    @given(st.text(st.characters(categories=["Cs", "Lu"]), min_size=1))
    def test_half_characters_are_replaced(self, text):
        """A finding that is no Unicode is read all the same, as one that is."""
        entry = {"name": CHECKS[0].name, "passed": False, "finding": text, "elapsed_ms": 0}
        assert check_from(entry).finding.encode()

    def test_long_texts_are_cut_by_bytes(self):
        """Findings fit the contract's limit in bytes, and stay valid UTF-8."""
        entry = {"name": CHECKS[0].name, "passed": False, "finding": "ä" * 1000, "elapsed_ms": 0}
        assert 1024 == len(check_from(entry).finding.encode())


class TestKeys:
    def test_made_once(self, tmp_path, clock):
        """The first start makes a key that only its owner can read; the next one finds it."""
        first, second = KeyRing.open(tmp_path, clock), KeyRing.open(tmp_path, clock)
        assert first.current.to_bytes() == second.current.to_bytes()
        assert clock() == second.create_time
        assert 0o600 == stat.S_IMODE((tmp_path / "signing.key").stat().st_mode)
        assert ["signing.key"] == [path.name for path in tmp_path.iterdir()]

    def test_exposed_key_is_refused(self, tmp_path, clock):
        """A private key that others can read is not used."""
        KeyRing.open(tmp_path, clock)
        (tmp_path / "signing.key").chmod(0o644)
        with pytest.raises(Conflict, match=r"owner alone \(0600\), found 0644") as caught:
            KeyRing.open(tmp_path, clock)
        assert "KEY_EXPOSED" == caught.value.reason

    @pytest.mark.parametrize("text", ["", "{}", '{"key": "00", "create_time": "2026-01-01T00:00:00+00:00"}'])
    def test_unreadable_key_is_refused(self, tmp_path, clock, text):
        """A damaged key file is told, never replaced in silence: the library knows the old key."""
        KeyRing.open(tmp_path, clock)
        (tmp_path / "signing.key").write_text(text)
        with pytest.raises(Conflict) as caught:
            KeyRing.open(tmp_path, clock)
        assert "KEY_UNREADABLE" == caught.value.reason

    def test_renewed_key(self, tmp_path, clock, judgement):
        """A retired key verifies nothing any more, across restarts, and the new one does."""
        old = KeyRing.open(tmp_path, clock)
        renewed = KeyRing.renew(tmp_path, clock)
        assert renewed == replace(KeyRing.open(tmp_path, clock), current=renewed.current)
        assert old.current.public.key_id != renewed.current.public.key_id
        reasons = renewed.trust.reasons_against(judgement(key=old.current).signed)
        assert [f"the verdict is signed by key {old.current.public.key_id}, which was revoked"] == reasons
        assert [] == renewed.trust.reasons_against(judgement(key=renewed.current).signed)

    def test_private_key_is_not_shown(self, tmp_path, clock):
        """Printing the keys shows no private key."""
        ring = KeyRing.open(tmp_path, clock)
        secret = json.loads((tmp_path / "signing.key").read_text())["key"]
        assert secret not in repr(ring)
        assert secret == ring.current.to_bytes().hex()


MANIFEST = Manifest(
    blueprint_id="sha256:" + "0" * 64,
    blueprint_name="low_rank",
    signature=Signature(Layout.IMAGE, 8, 8),
    birth=Birth.ZERO,
    causal=False,
    tier=Tier.PORTABLE,
    target="any",
    parameters=(),
    parameter_count=999,
    flops_per_position=1,
    seed=0,
    toolchain={},
)


class TestTags:
    @pytest.mark.parametrize(
        ("ratio", "noise", "tag"),
        [
            (0.89, 0.01, "faster"),
            (0.91, 0.01, "par"),
            (1.09, 0.01, "par"),
            (1.11, 0.01, "slower"),
            (1.3, 0.35, "par"),
            (0.7, 0.35, "par"),
            (3.0, 0.35, "slower"),
        ],
    )
    def test_latency(self, ratio, noise, tag):
        """Within ten per cent, or within the noise, nothing is called faster or slower."""
        assert f"latency:{tag}" in tags_of(MANIFEST, {"latency.step.ratio": ratio, "latency.noise": noise})

    @pytest.mark.parametrize(("ratio", "tag"), [(0.94, "lean"), (0.96, "par"), (1.04, "par"), (1.06, "heavy")])
    def test_memory(self, ratio, tag):
        """Memory repeats exactly, so five per cent are a difference."""
        assert f"memory:{tag}" in tags_of(MANIFEST, {"memory.ratio": ratio})

    @pytest.mark.parametrize(
        ("count", "tag"),
        [(999, "tiny"), (1000, "small"), (10_000, "medium"), (100_000, "large"), (1_000_000, "huge")],
    )
    def test_size(self, count, tag):
        """Sizes are decades of parameters."""
        assert f"size:{tag}" in tags_of(replace(MANIFEST, parameter_count=count), {})

    def test_rest(self):
        """Tags are sorted; what was not measured has none; causality only where it holds."""
        assert ("birth:zero", "layout:image", "size:tiny", "tier:portable") == tags_of(MANIFEST, {})
        assert "causal" in tags_of(replace(MANIFEST, causal=True), {})


class TestBoard:
    async def test_new_watcher_gets_the_newest_kept_first(self, judgement):
        """A watcher begins with the newest verdicts kept, oldest first, and goes on with new ones."""
        board = Board()
        for number in range(KEPT + 8):
            board.post(judgement(number, passed=number % 2 == 0))
        with board.watch() as queue:
            board.post(judgement(99))
            seen = [await anext(queue) for _ in range(KEPT + 1)]
        assert [*range(8, KEPT + 8), 99] == [int(j.statement.kernel_id[7:], 16) for j in seen]
        assert (21, 20) == (board.validated, board.rejected)

    async def test_slow_watcher_loses_the_oldest(self, judgement):
        """A watcher that does not read holds nobody up, and finds the newest when it reads again."""
        board = Board()
        with board.watch() as slow:
            for number in range(WATCHER_QUEUE + 10):
                board.post(judgement(number))
            assert f"sha256:{10:064x}" == (await anext(slow)).statement.kernel_id
        board.post(judgement(5))
        assert WATCHER_QUEUE - 1 == len(slow)

    async def test_watchers_are_forgotten(self):
        """A watcher that left is told nothing more."""
        board = Board()
        with board.watch():
            await asyncio.sleep(0)
        assert set() == board._watchers


class TestConvert:
    def test_verdict_round_trip(self, judgement):
        """The fields beside the signed bytes say exactly what the bytes say, to the microsecond."""
        made = judgement(7)
        message = type(verdict_to_proto(made)).FromString(verdict_to_proto(made).SerializeToString())
        assert made.statement == statement_from_proto(message)
        assert made.signed == signed_from_proto(message)

    def test_candidate(self):
        """A staged kernel becomes what its manifest has to say; only a compiled one has a target that counts."""
        message = kernel_pb2.Kernel(
            id="sha256:" + "a" * 64,
            blueprint_id="sha256:" + "b" * 64,
            signature=signature_pb2.Signature(
                layout=signature_pb2.LAYOUT_SEQUENCE,
                in_features=8,
                out_features=6,
                dtype=tensor_pb2.DATA_TYPE_FLOAT32,
            ),
            tier=build_pb2.TIER_PORTABLE,
            target="any",
            birth=blueprint_pb2.BIRTH_ZERO,
            causal=True,
            parameters=12,
            size_bytes=34,
        )
        candidate = candidate_from_proto(message)
        told = {
            "blueprint_id": "sha256:" + "b" * 64,
            "signature": "sequence:8->6:float32",
            "tier": "portable",
            "birth": "zero",
            "causal": True,
            "parameters": 12,
        }
        assert told == dict(candidate.told)
        assert 34 == candidate.size_bytes
        message.tier = build_pb2.TIER_STANDARD
        assert "any" == candidate_from_proto(message).told["target"]

    def test_worker(self):
        """A worker process is shown with its work."""
        info = WorkerInfo(2, 77, WorkerState.BUSY, "sha256:" + "a" * 64, 3, ("network: seccomp",))
        assert (2, 77, forge_pb2.WORKER_STATE_BUSY, 3) == (
            worker_to_proto(info).index,
            worker_to_proto(info).pid,
            worker_to_proto(info).state,
            worker_to_proto(info).starts,
        )


class TestDownload:
    @staticmethod
    async def _collect(*responses):
        async def stream():
            for response in responses:
                yield response

        return [part async for part in _chunks(stream())]

    def _piece(self, offset, data):
        return urza_service_pb2.DownloadKernelResponse(chunk=blob_pb2.BlobChunk(offset=offset, data=data))

    def _end(self):
        return urza_service_pb2.DownloadKernelResponse(digest=blob_pb2.BlobDigest(size_bytes=4))

    async def test_pieces_in_order(self):
        """The kernel first, pieces, the digest: the pieces come out."""
        kernel = urza_service_pb2.DownloadKernelResponse(kernel=kernel_pb2.Kernel())
        parts = await self._collect(kernel, self._piece(0, b"ab"), self._piece(2, b"cd"), self._end())
        assert [b"ab", b"cd"] == parts

    async def test_gap_is_corrupt(self):
        """A piece that is missing is noticed at the next one."""
        with pytest.raises(Corrupt, match="expected the piece at 2, found one at 3"):
            await self._collect(self._piece(0, b"ab"), self._piece(3, b"d"), self._end())

    async def test_early_end_is_corrupt(self):
        """A stream that ends without its digest is no download."""
        with pytest.raises(Corrupt, match="digest at the end, found none after 2 bytes"):
            await self._collect(self._piece(0, b"ab"))


def test_checks_fit_the_contract():
    """Names and descriptions fit the contract, names are distinct, and every dtype has its tolerances."""
    assert len({spec.name for spec in CHECKS}) == len(CHECKS) <= 64
    assert all(len(spec.name) <= 64 and 20 < len(spec.description) <= 1024 for spec in CHECKS)
    assert {"float16", "bfloat16", "float32", "float64"} == set(TOLERANCES)
