"""Judges one kernel: runs the gauntlet in the sandbox, reads what comes out of it, signs the verdict; torch-free.

What becomes of the sandbox is a finding about the kernel: a crash, a hang or hunger for memory fails the check during
which it happened, once it has happened `attempts` times. What becomes of the machinery (no worker can be started, the
gauntlet itself has a defect, the kernel is for another machine) is no finding, and gives `NotJudged`.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from esper.kasmina.kernels.signing import CheckResult, Statement
from esper.mesh.errors import InvalidInput, Unavailable
from esper.mesh.logging import get_logger
from esper.mesh.workers import WorkerCrashed, WorkerError, WorkerMemory, WorkerPool, WorkerTimeout
from esper.urabrask.board import Judgement
from esper.urabrask.checks import CHECKS, GAUNTLET_VERSION
from esper.urabrask.findings import MAX_FINDING, Findings, check_from, findings_from, shown
from esper.urabrask.keys import KeyRing

__all__ = ["Candidate", "Engine", "NotJudged"]

log = get_logger(__name__)

_NAMES = tuple(spec.name for spec in CHECKS)


class NotJudged(Unavailable):
    """No judgement came about, through no fault of the kernel: another attempt, perhaps elsewhere, may give one."""

    default_reason = "NOT_JUDGED"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A staged kernel as the library knows it."""

    id: str
    """Digest of its bundle."""
    size_bytes: int
    told: Mapping[str, Any]
    """What the forge told the library of it, as `gauntlet.bundle.facts` names it."""


@dataclass
class _Trace:
    """How far a run through the gauntlet came, from its progress."""

    running: str = CHECKS[0].name
    done: list[CheckResult] = field(default_factory=list)

    def note(self, progress: dict[str, Any]) -> None:
        """Take a report, if it is one that the gauntlet would send next: each check once, and in order."""
        check, name = None, progress.get("running")
        with contextlib.suppress(InvalidInput):
            check = check_from(progress["done"]) if "done" in progress else None
            name = name if check is None else check.name
        last = _NAMES.index(self.done[-1].name) if self.done else -1
        if name not in _NAMES or _NAMES.index(name) <= last:
            log.warning("the sandbox reported nonsense", progress=shown(progress))
            return
        self.running = name
        if check is not None:
            self.done.append(check)


class Engine:
    """The gauntlet with its sandbox and its key.

    Args:
        pool: workers whose entry is `esper.urabrask.gauntlet.run:evaluate`.
        keys: the current one signs; may be replaced after a revocation.
        attempts: runs that a kernel gets when the sandbox does not survive it.
        clock: UTC.
    """

    def __init__(self, pool: WorkerPool, keys: KeyRing, *, attempts: int, clock: Callable[[], datetime]) -> None:
        self.pool = pool
        self.keys = keys
        self.target = ""
        """Machine of the sandbox as a target string; empty until a worker has said it."""
        self._attempts = attempts
        self._clock = clock

    async def find_target(self) -> str:
        """Ask a worker for its machine; the first worker to be ready answers.

        Raises:
            NotJudged: no worker can be started.
        """
        if not self.target:
            try:
                self.target = str((await self.pool.run({}, work_id="target"))["target"])
            except (WorkerCrashed, WorkerError, WorkerMemory, WorkerTimeout) as error:
                raise NotJudged(f"no sandbox can be started: {error.public}", reason="SANDBOX_BROKEN") from error
        return self.target

    async def judge(self, candidate: Candidate, bundle: bytes) -> Judgement:
        """Run the gauntlet and sign what it found.

        Raises:
            NotJudged: the machinery failed, or the kernel is for another machine.
        """
        target = await self.find_target()
        findings = await self._examine(candidate, bundle, target)
        statement = Statement(
            kernel_id=candidate.id,
            passed=findings.passed,
            checks=findings.checks,
            measurements=findings.measurements,
            tags=findings.tags if findings.passed else (),
            target=findings.target,
            gauntlet_version=GAUNTLET_VERSION,
            issued_at=self._clock(),
        )
        return Judgement(statement, self.keys.current.sign(statement))

    async def _examine(self, candidate: Candidate, bundle: bytes, target: str) -> Findings:
        job = {"kernel_id": candidate.id, "bundle": bundle, "told": dict(candidate.told)}
        failure, trace = "", _Trace()
        for attempt in range(1, self._attempts + 1):
            trace = _Trace()
            try:
                answer = await self.pool.run(job, work_id=candidate.id, on_progress=trace.note)
            except WorkerError as error:
                raise NotJudged(f"the gauntlet has a defect: {error.public}", reason="GAUNTLET_DEFECT") from error
            except WorkerTimeout as error:
                failure = f"hang: {error.public}"
            except WorkerMemory as error:
                failure = f"memory: {error.public}"
            except WorkerCrashed as error:
                if error.reason == "WORKER_NOT_STARTED":
                    raise NotJudged(error.public, reason="SANDBOX_BROKEN") from error
                failure = f"crash: {error.public}"
            else:
                if "elsewhere" in answer:
                    raise NotJudged(str(answer["elsewhere"])[:500], reason="TARGET_NOT_HERE")
                try:
                    return findings_from(answer)
                except InvalidInput as error:
                    failure = f"nonsense: {error.public}"
            log.warning("sandbox lost", kernel_id=candidate.id, check=trace.running, attempt=attempt, failure=failure)
        tries = f" ({self._attempts} attempts)" if self._attempts > 1 else ""
        return _lost(trace, f"{failure}{tries}", target)


def _lost(trace: _Trace, failure: str, target: str) -> Findings:
    """What is known of a run whose sandbox did not survive: the checks before, and the one that ended it."""
    before = [check for check in trace.done if check.name != trace.running]
    text = failure.encode()[:MAX_FINDING].decode(errors="ignore")
    return Findings(target, (*before, CheckResult(trace.running, passed=False, finding=text)), (), ())
