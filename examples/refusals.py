"""What Esper refuses, and what it says then: each case is tried for real against a mesh of its own.

    python examples/refusals.py

Starts an embedded mesh in a temporary folder, has one kernel compiled and validated there, and then does seven things
that must not work. Each block names what was tried, who refused it, with which status and reason, and the sentence that
a user reads.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc

from esper.cli.connection import Mesh, connect
from esper.cli.state import State
from esper.kasmina.kernels.bundle import unpack
from esper.kasmina.kernels.load import load_kernel
from esper.kasmina.kernels.signing import PublicKey, SignedVerdict, TrustStore
from esper.kasmina.signature import Signature
from esper.mesh.errors import Code, EsperError, error_class, from_rpc_error
from esper.v1 import event_pb2, oona_service_pb2, urza_service_pb2
from esper.v1.build_pb2 import TIER_PORTABLE, Build
from esper.v1.kernel_pb2 import KERNEL_STATE_VALIDATED, Kernel
from esper.v1.oona_service_pb2_grpc import OonaServiceStub
from esper.v1.signature_pb2 import LAYOUT_VECTOR
from esper.v1.signature_pb2 import Signature as SignatureMessage
from esper.v1.tensor_pb2 import DATA_TYPE_FLOAT32
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_PATIENCE_S = 120.0
_DISK_BYTES = 3 << 20


def main() -> None:
    """Try everything, print every refusal."""
    with tempfile.TemporaryDirectory(prefix="esper-refusals-") as folder:
        with connect(State(home=Path(folder) / "home"), start=True) as mesh:
            kernel = validated_kernel(mesh)
            bundle, verdict = download(mesh, kernel.id)
            trust = trusted(mesh)
            wanted = unpack(bundle).manifest.signature
            load_kernel(bundle, verdict, trust, kernel.id, wanted)
            print(f"sound: {kernel.blueprint_name} {wanted}, {len(bundle)} bytes, signed and loaded: {kernel.id}")

            changed = bytearray(bundle)
            changed[len(changed) // 2] ^= 1
            other = Signature(wanted.layout, wanted.in_features, wanted.out_features + 1)
            refused(
                "a tampered kernel (one bit of one byte differs)",
                "Kasmina",
                lambda: load_kernel(bytes(changed), verdict, trust, kernel.id, wanted),
            )
            refused("an unsigned kernel", "Kasmina", lambda: load_kernel(bundle, None, trust, kernel.id, wanted))
            refused(
                f"a kernel of another shape ({other} is wanted)",
                "Kasmina",
                lambda: load_kernel(bundle, verdict, trust, kernel.id, other),
            )
            refused("an unknown blueprint operation", "Urza", lambda: submit_unknown_operation(mesh))
            refused("an oversized message", "the chassis", lambda: publish_too_much(mesh))
            refused("a missing deadline", "the chassis", lambda: call_without_deadline(mesh.address))
        with full_disk(Path(folder)) as address:
            refused("a full disk for the log", "Oona", lambda: publish_until_full(address))


def refused(what: str, by: str, attempt: Callable[[], object]) -> None:
    """Try something that must not work, and show how it is refused."""
    try:
        attempt()
    except grpc.RpcError as error:
        refusal = from_rpc_error(error)
    except EsperError as error:
        refusal = error
    else:
        raise SystemExit(f"{what} was accepted: expected a refusal")
    print(f"\n{what}\n  {by}: {Code(refusal.code).name}, {refusal.reason}")
    sentences = [refusal.public]
    if refusal.retry_after_s is not None:
        sentences.append(f"try again in {refusal.retry_after_s:g} s")
    for sentence in sentences:
        print(textwrap.fill(sentence, 110, initial_indent="  ", subsequent_indent="    "))


def validated_kernel(mesh: Mesh) -> Kernel:
    """Have one small kernel built by the forge and validated by the gauntlet."""
    blueprint = eventually(
        lambda: mesh.urza.GetBlueprint(urza_service_pb2.GetBlueprintRequest(blueprint="low_rank"), timeout=5).blueprint
    )
    signature = SignatureMessage(layout=LAYOUT_VECTOR, in_features=8, out_features=8, dtype=DATA_TYPE_FLOAT32)
    order = Build(blueprint_id=blueprint.id, signature=signature, tier=TIER_PORTABLE, priority=100)
    build = mesh.urza.RequestBuilds(urza_service_pb2.RequestBuildsRequest(builds=[order]), timeout=5).builds[0]

    def ready() -> Kernel | None:
        now = mesh.urza.GetBuild(urza_service_pb2.GetBuildRequest(build_id=build.id), timeout=5).build
        if not now.kernel_id:
            return None
        kernel = mesh.urza.GetKernel(urza_service_pb2.GetKernelRequest(kernel=now.kernel_id), timeout=5).kernel
        return kernel if kernel.state == KERNEL_STATE_VALIDATED else None

    return eventually(ready)


def eventually(look: Callable[[], T | None]) -> T:
    """What `look` finds once it finds something; a library that is still being filled says NOT_FOUND."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            found = look()
        except grpc.RpcError as error:
            if from_rpc_error(error).code is not Code.NOT_FOUND:
                raise
            found = None
        if found is not None:
            return found
        time.sleep(0.05)
    raise SystemExit(f"the mesh was not ready for this after {_PATIENCE_S:.0f} s")


def download(mesh: Mesh, kernel_id: str) -> tuple[bytes, SignedVerdict]:
    """The bytes of a kernel, and the verdict that came with them."""
    verdict, parts = None, []
    for message in mesh.urza.DownloadKernel(urza_service_pb2.DownloadKernelRequest(kernel_id=kernel_id), timeout=30):
        if message.HasField("kernel"):
            said = message.kernel.verdict
            verdict = SignedVerdict(said.statement, said.signature, said.key_id)
        elif message.HasField("chunk"):
            parts.append(message.chunk.data)
    assert verdict is not None
    return b"".join(parts), verdict


def trusted(mesh: Mesh) -> TrustStore:
    """The keys that the library vouches for."""
    keys = mesh.urza.ListSigningKeys(urza_service_pb2.ListSigningKeysRequest(), timeout=5).keys
    return TrustStore(PublicKey(key.public_key, key.revoked) for key in keys)


def submit_unknown_operation(mesh: Mesh) -> None:
    """Submit a blueprint of the library with the operation of one node renamed."""
    request = urza_service_pb2.GetBlueprintRequest(blueprint="low_rank")
    ir = json.loads(mesh.urza.GetBlueprint(request, timeout=5).blueprint.ir)
    ir["name"] = "mine"
    ir["nodes"][0]["op"] = "run_shell"
    changed = json.dumps(ir).encode()
    mesh.urza.SubmitBlueprint(urza_service_pb2.SubmitBlueprintRequest(ir=changed), timeout=5)


def publish_too_much(mesh: Mesh) -> None:
    """Publish six events of a megabyte each in one message."""
    events = [event_pb2.Event(id=f"big-{n}", payload=bytes(1 << 20)) for n in range(6)]
    batch = oona_service_pb2.PublishRequest(topic="decisions", events=events)
    next(iter(mesh.oona.Publish(iter([batch]), timeout=10)))


def call_without_deadline(address: str) -> None:
    """Call with plain gRPC, which sets no deadline unless it is told to; Esper's own channels always set one."""
    with grpc.insecure_channel(address) as channel:
        UrzaServiceStub(channel).ListKernels(urza_service_pb2.ListKernelsRequest())


def publish_until_full(address: str) -> None:
    """Publish to a bus until its log refuses."""
    with grpc.insecure_channel(address) as channel:
        stub = OonaServiceStub(channel)
        for number in range(200):
            events = [event_pb2.Event(id=f"{number}-{n}", payload=os.urandom(20_000)) for n in range(5)]
            batch = oona_service_pb2.PublishRequest(topic="decisions", events=events)
            answer = next(iter(stub.Publish(iter([batch]), timeout=10)))
            if answer.HasField("error"):
                said = answer.error
                wait_s = said.retry_delay.ToTimedelta().total_seconds() if said.HasField("retry_delay") else None
                raise error_class(said.code)(said.message, reason=said.reason, retry_after_s=wait_s)


@contextmanager
def full_disk(folder: Path) -> Iterator[str]:
    """A bus of its own whose log has little room: on a file system of 3 MiB where this user may mount one, else under a
    limit on the size of its files. Gives its address."""  # noqa: D205, D209
    disk = folder / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and _run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(disk))
    settings = {"ESPER_OONA__MIN_FREE_BYTES": "0", "ESPER_LOGGING__LEVEL": "error"}
    bus = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", "esper.cli", "--home", str(disk / "home"), "serve", "oona", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, **settings},
        text=True,
        cwd=folder,
    )
    if not mounted:
        resource.prlimit(bus.pid, resource.RLIMIT_FSIZE, (_DISK_BYTES, _DISK_BYTES))
    try:
        assert bus.stdout is not None
        # The document stands on several lines; the bus says nothing else there.
        lines = iter(bus.stdout.readline, "}\n")
        yield json.loads("".join(lines) + "}")["address"]
    finally:
        bus.terminate()
        bus.wait(30)
        if mounted:
            _run("umount", str(disk))


def _run(name: str, *arguments: str) -> bool:
    """Run a program of the system; true when it is there and succeeds."""
    program = shutil.which(name)
    if program is None:
        return False
    return subprocess.run([program, *arguments], check=False, capture_output=True).returncode == 0  # noqa: S603  # ours


if __name__ == "__main__":
    main()
