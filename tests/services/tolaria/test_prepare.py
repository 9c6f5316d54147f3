"""Waiting for kernels before training, against a real server."""

from __future__ import annotations

from concurrent import futures
from types import SimpleNamespace

import grpc
import pytest

from esper.kasmina.control import RunHello
from esper.kasmina.kernels.signing import SigningKey
from esper.kasmina.local import LocalPlane
from esper.mesh.errors import NotFound
from esper.tolaria.prepare import Trust, prepare
from esper.v1 import tamiyo_service_pb2, urza_service_pb2, verdict_pb2
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceServicer, add_TamiyoServiceServicer_to_server
from esper.v1.urza_service_pb2_grpc import UrzaServiceServicer, add_UrzaServiceServicer_to_server

HELLO = RunHello(
    run_id="digits-1",
    target="cpu",
    total_steps=10,
    decay_start=0.7,
    host_parameters=10,
    parameter_budget=10,
    max_active_seeds=1,
    sites=(),
)
IDS = ["sha256:" + "ab" * 32, "sha256:" + "cd" * 32]


class Controller(TamiyoServiceServicer):
    """Answers from a list; the last answer is given for ever."""

    def __init__(self, answers) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def PrepareRun(self, request, context):  # noqa: N802  # the contract's name
        self.asked.append(request.hello.run_id)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "as the test wants")
        return tamiyo_service_pb2.PrepareRunResponse(kernel_ids=IDS[: answer[0]], pending=answer[1], failed=answer[2])


class Library(UrzaServiceServicer):
    """Knows one key, or fails."""

    def __init__(self, key: SigningKey | None) -> None:
        self.key = key

    def ListSigningKeys(self, request, context):  # noqa: N802  # the contract's name
        if self.key is None:
            context.abort(grpc.StatusCode.INTERNAL, "as the test wants")
        key = verdict_pb2.SigningKey(key_id=self.key.public.key_id, public_key=self.key.public.raw)
        return urza_service_pb2.ListSigningKeysResponse(keys=[key])


@pytest.fixture
def mesh():
    """Start servers and stop them again."""
    servers = []

    def start(answers, key=None):
        server = grpc.server(futures.ThreadPoolExecutor(2))
        controller = Controller(answers)
        add_TamiyoServiceServicer_to_server(controller, server)
        add_UrzaServiceServicer_to_server(Library(key), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return SimpleNamespace(address=f"127.0.0.1:{port}", controller=controller)

    yield start
    for server in servers:
        server.stop(0)


def ask(address: str, wait_s: float = 20.0, leave=lambda: False):
    """Prepare, and what was said meanwhile."""
    said: list[str] = []
    return prepare(HELLO, mesh=address, token=None, wait_s=wait_s, say=said.append, leave=leave), said


def test_it_waits_until_nothing_is_pending_and_tells_how_far(mesh):
    """1 of 3, then everything; failed builds count as done."""
    key = SigningKey.generate()
    server = mesh([(1, 2, 0), (2, 0, 1)], key)
    found, said = ask(server.address)
    assert ["waiting for kernels 1/3", "waiting for kernels 3/3"] == said
    assert (tuple(IDS), 0, 1, True) == (found.kernels, found.pending, found.failed, found.reached)
    assert [key.public.raw] == [k.raw for k in found.trust.keys]
    assert ["digits-1", "digits-1"] == server.controller.asked


def test_it_gives_up_when_its_time_is_over(mesh):
    """A library that is never ready costs the wait and no more."""
    found, _ = ask(mesh([(1, 5, 0)]).address, wait_s=0.6)
    assert 5 == found.pending
    assert () == found.trust.keys


def test_it_leaves_when_the_run_was_asked_to(mesh):
    """A pause does not wait for kernels."""
    found, said = ask(mesh([(0, 5, 0)]).address, leave=lambda: True)
    assert 5 == found.pending
    assert 1 == len(said)


def test_a_slow_controller_is_asked_again_one_that_is_away_is_not(mesh):
    """DEADLINE_EXCEEDED may pass, INTERNAL does not."""
    found, _ = ask(mesh([grpc.StatusCode.DEADLINE_EXCEEDED, (2, 0, 0)]).address)
    assert found.reached
    found, _ = ask(mesh([grpc.StatusCode.INTERNAL, (2, 0, 0)]).address)
    assert not found.reached


def test_without_a_mesh_nothing_is_asked():
    """No address, no call, no wait."""
    found, said = ask("")
    assert not found.reached
    assert [] == said


def test_keys_travel_as_plain_data():
    """Through a checkpoint and back, revocation included."""
    from esper.kasmina.kernels.signing import PublicKey

    trust = Trust((PublicKey(b"a" * 32), PublicKey(b"b" * 32, revoked=True)))
    assert trust == Trust.from_document(trust.document())


class TestKernelsOfARun:
    """What a grown run does with kernels before its first step and at a resume."""

    def network(self, make_run, kernel_cache, plane, mesh: str = ""):
        """A grown network whose plane is given."""
        from esper.tolaria import data
        from esper.tolaria.core import Arm
        from esper.tolaria.seeded import SeededNetwork
        from esper.tolaria.worker import Launch

        config = make_run(arm=Arm.GROWN).config()
        return SeededNetwork(
            config,
            run_id="digits-1",
            launch=Launch(mesh=mesh, cache_dir=str(kernel_cache.folder)),
            plane=plane,
            sample=data.load(config.data, 0).train_batch(0, 0)[0],
            total_steps=10,
        )

    def test_fitting_kernels_are_loaded_before_the_first_step(self, mesh, make_run, kernel_cache):
        """A kernel that comes late is waited for; one that is refused is not."""

        class SlowPlane(LocalPlane):
            looks = 0

            def kernel(self, kernel_id):
                self.looks += 1
                if kernel_id == IDS[1]:
                    raise NotFound("refused by the test")
                return object() if self.looks > 4 else None

            def under_way(self, kernel_ids):
                return frozenset(kernel_ids) if self.looks <= 4 else frozenset()

        plane = SlowPlane()
        server = mesh([(2, 0, 0)], SigningKey.generate())
        network = self.network(make_run, kernel_cache, plane, server.address)
        network.prepare(lambda _: None, lambda: False)
        assert plane.looks > 4
        assert 1 == len(network.state_dict()["trust"])

    @pytest.mark.timeout(20)
    def test_kernels_that_were_not_kept_are_not_waited_for(self, mesh, make_run, kernel_cache):
        """A cache without room declines what no seed uses: it will not be there however long one waits."""

        class FullPlane(LocalPlane):
            looks = 0

            def under_way(self, kernel_ids):
                self.looks += 1
                return frozenset(kernel_ids) if self.looks < 3 else frozenset()

        plane = FullPlane()
        server = mesh([(2, 0, 0)], SigningKey.generate())
        self.network(make_run, kernel_cache, plane, server.address).prepare(lambda _: None, lambda: False)
        assert 3 == plane.looks

    def test_a_resume_loads_the_checkpoints_kernel_by_the_keys_it_knows(self, make_run, kernel_cache):
        """Verified bundle: loaded. Altered bundle, foreign key or no key: left to the library."""
        network = self.network(make_run, kernel_cache, None)
        fetched = network.bundle(kernel_cache.kernel_id)
        assert fetched is not None
        altered = fetched._replace(bundle=fetched.bundle[:-1] + b"\x01")
        ours, foreign = Trust((kernel_cache.key.public,)), Trust((SigningKey.generate().public,))
        expected = [(ours, fetched, True), (ours, altered, False), (foreign, fetched, False), (Trust(), fetched, False)]
        for trust, offered, loads in expected:
            network._trust = trust
            found = network._kernel_from({kernel_cache.kernel_id: offered})(kernel_cache.kernel_id)
            assert loads == (found is not None)
        assert network._kernel_from({})(kernel_cache.kernel_id) is None
