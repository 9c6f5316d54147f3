"""Runs on disk: one folder each, found by id, by request, and page by page. The seam to where runs are kept.

The folders are the truth; an index in memory is read from them at the start, so a service may be killed at any moment.
"""

from __future__ import annotations

import secrets
import string
from dataclasses import replace
from typing import TYPE_CHECKING

from esper.mesh.errors import EsperError, NotFound
from esper.mesh.logging import get_logger
from esper.tolaria.core import NO_PROGRESS, SETTLED, Arm, RunRecord, RunState, View, view
from esper.tolaria.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from esper.tolaria.config import RunConfig

__all__ = ["RunStore", "new_run_id"]

_log = get_logger(__name__)
_ALPHABET = string.ascii_lowercase + string.digits


def new_run_id(recipe: str, now: datetime) -> str:
    """A name that sorts by time within its recipe: ``digits-20261123-201500-k3f9``."""
    tail = "".join(secrets.choice(_ALPHABET) for _ in range(4))
    return f"{recipe}-{now:%Y%m%d-%H%M%S}-{tail}"


class RunStore:
    """Every run below one folder. Not thread-safe; calls touch small files and return in about a millisecond.

    Args:
        folder: created when missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, RunRecord] = {}
        self._by_request: dict[str, str] = {}
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                self._load(RunDir(path))

    def _load(self, run_dir: RunDir) -> None:
        try:
            record = run_dir.record()
        except (FileNotFoundError, EsperError) as error:
            # A run that was never promised to anybody, or a folder of somebody else's: leave it alone.
            _log.warning("folder is no run", folder=run_dir.path.name, error=str(error))
            return
        self._remember(record)

    def _remember(self, record: RunRecord) -> None:
        self._records[record.id] = record
        if record.request_id:
            self._by_request[record.request_id] = record.id

    def run_dir(self, run_id: str) -> RunDir:
        """The folder of a run.

        Raises:
            NotFound: RUN_NOT_FOUND.
        """
        self.record(run_id)
        return RunDir(self.folder / run_id)

    def record(self, run_id: str) -> RunRecord:
        """What we know of a run.

        Raises:
            NotFound: RUN_NOT_FOUND.
        """
        record = self._records.get(run_id)
        if record is None:
            raise NotFound(
                f"no run {run_id[:64]!r}: expected one that ListRuns shows",
                reason="RUN_NOT_FOUND",
                metadata={"run_id": run_id[:64]},
            )
        return record

    def records(self) -> list[RunRecord]:
        """Every run, oldest first."""
        return sorted(self._records.values(), key=_key)

    def by_request(self, request_id: str) -> RunRecord | None:
        """The run that a request made, if it did."""
        run_id = self._by_request.get(request_id)
        return self._records[run_id] if run_id else None

    def create(self, record: RunRecord, config: RunConfig) -> None:
        """Promise a run: on return it survives a power cut."""
        run_dir = RunDir(self.folder / record.id)
        run_dir.path.mkdir()
        run_dir.write_config(config)
        run_dir.write_record(record)
        self._remember(record)

    def update(self, record: RunRecord) -> None:
        """Replace what we know of a run."""
        RunDir(self.folder / record.id).write_record(record)
        self._remember(record)

    def view(self, run_id: str) -> View:
        """A run as a client sees it now; the phase of one that no process works on yet says what it waits for."""
        record = self.record(run_id)
        try:
            status = RunDir(self.folder / run_id).status()
        except EsperError as error:
            _log.warning("status not readable", run_id=run_id, error=str(error))
            status = None
        seen = view(record, status)
        if seen.state is RunState.PREPARING and record.process is None:
            waiting = replace(seen.progress or NO_PROGRESS, phase=self._waits_for(record))
            seen = replace(seen, progress=waiting)
        return seen

    def _waits_for(self, record: RunRecord) -> str:
        reference_id = record.spec.reference_run_id
        if record.spec.arm is not Arm.STATIC or reference_id not in self._records:
            return "waits for its turn"
        state = self.view(reference_id).state
        if state is RunState.SUCCEEDED:
            return "waits for its turn"
        return f"waits for run {reference_id}" + (f", which is {state.value}" if state in SETTLED else "")

    def page(
        self, *, size: int, before: tuple[datetime, str] | None, wanted: Callable[[View], bool]
    ) -> tuple[list[View], tuple[datetime, str] | None]:
        """Runs that are `wanted`, newest first, older than `before`; where the next page begins, None at the end."""
        found: list[View] = []
        for record in reversed(self.records()):
            if before is not None and _key(record) >= before:
                continue
            seen = self.view(record.id)
            if not wanted(seen):
                continue
            if len(found) == size:
                return found, _key(found[-1].record)
            found.append(seen)
        return found, None


def _key(record: RunRecord) -> tuple[datetime, str]:
    return record.create_time, record.id
