"""Before training: have the library build what this run could grow, and wait for it a while.

Runs on the training process's main thread, before the loop begins: the loop itself never waits for anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import grpc

from esper.kasmina.convert import run_hello_to_proto
from esper.kasmina.kernels.signing import PublicKey
from esper.mesh.channel import open_sync_channel
from esper.mesh.errors import DeadlineMissed, EsperError, LimitExceeded, from_rpc_error
from esper.mesh.logging import get_logger
from esper.v1 import tamiyo_service_pb2 as pb
from esper.v1 import urza_service_pb2
from esper.v1.tamiyo_service_pb2_grpc import TamiyoServiceStub
from esper.v1.urza_service_pb2_grpc import UrzaServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.control import RunHello

__all__ = ["Prepared", "Trust", "prepare"]

_log = get_logger(__name__)
_POLL_S = 0.5
_CALL_S = 5.0


@dataclass(frozen=True, slots=True)
class Trust:
    """Public keys of the gauntlet, as the library named them when the run began.

    They travel in the run's checkpoints, so that a run can be resumed with its own kernels while the library is away.
    """

    keys: tuple[PublicKey, ...] = ()

    def document(self) -> list[list[Any]]:
        """As plain data."""
        return [[key.raw.hex(), key.revoked] for key in self.keys]

    @classmethod
    def from_document(cls, document: list[list[Any]]) -> Trust:
        """Read `document`."""
        return cls(tuple(PublicKey(bytes.fromhex(raw), bool(revoked)) for raw, revoked in document))


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the library has for a run."""

    kernels: tuple[str, ...]
    """Ids of the kernels that are validated and fit."""
    pending: int
    """Builds still under way when the wait ended."""
    failed: int
    """Builds that failed."""
    reached: bool
    """Whether the controller answered at all."""
    trust: Trust = field(default_factory=Trust)
    """Keys whose verdicts the library believes now."""


def prepare(
    hello: RunHello,
    *,
    mesh: str,
    token: Callable[[], str] | None,
    wait_s: float,
    say: Callable[[str], None],
    leave: Callable[[], bool],
) -> Prepared:
    """Ask for builds and poll until none is under way, `wait_s` is over, somebody asks to leave or nobody answers.

    Args:
        hello: the run as it will introduce itself.
        mesh: ``host:port`` of the controller.
        token: gives the identity to call with; None for none.
        wait_s: longest wait; 0 asks once and goes on.
        say: takes the phase, for progress.
        leave: true when the run was asked to pause or stop.
    """
    if not mesh:
        return Prepared((), 0, 0, reached=False)
    deadline = time.monotonic() + wait_s
    last = Prepared((), 0, 0, reached=False)
    request = pb.PrepareRunRequest(hello=run_hello_to_proto(hello))
    with open_sync_channel(mesh, token=token) as channel:
        stub = TamiyoServiceStub(channel)
        while True:
            try:
                answer = stub.PrepareRun(request, timeout=_CALL_S)
            except grpc.RpcError as error:
                fault = from_rpc_error(error)
                _log.warning("library not asked", mesh=mesh, reason=fault.reason, error=str(fault))
                if not _passing(fault):
                    return last  # no control plane: train without growth, at once
            else:
                last = Prepared(tuple(answer.kernel_ids), answer.pending, answer.failed, reached=True)
                done = len(last.kernels) + last.failed
                say(f"waiting for kernels {done}/{done + last.pending}")
            left = deadline - time.monotonic()
            if (last.reached and last.pending == 0) or left <= 0 or leave():
                return replace(last, trust=_trust(channel))
            time.sleep(min(_POLL_S, left))


def _trust(channel: grpc.Channel) -> Trust:
    try:
        answer = UrzaServiceStub(channel).ListSigningKeys(urza_service_pb2.ListSigningKeysRequest(), timeout=_CALL_S)
    except grpc.RpcError as error:
        _log.warning("signing keys not known", error=str(from_rpc_error(error)))
        return Trust()
    return Trust(tuple(PublicKey(key.public_key, key.revoked) for key in answer.keys))


def _passing(fault: EsperError) -> bool:
    """Whether asking again may help within the wait: a slow or busy controller, not one that is away."""
    return isinstance(fault, DeadlineMissed | LimitExceeded)
