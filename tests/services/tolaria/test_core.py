"""What a run is, on the wire and on disk."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.control import Stage
from esper.mesh.errors import Corrupt, NotFound
from esper.tolaria.config import OptimizerConfig, ResidualHost, ScheduleConfig
from esper.tolaria.convert import run_to_proto, spec_from_proto, spec_to_proto
from esper.tolaria.core import (
    Arm,
    ProcessMark,
    Progress,
    Result,
    RunRecord,
    RunSpec,
    RunState,
    SeedProgress,
    Status,
    from_json,
    to_json,
    view,
)
from esper.tolaria.desk import Desk
from esper.tolaria.optim import build_optimizer, rate_at
from esper.tolaria.processes import Processes
from esper.tolaria.rundir import Command, RunDir, write_atomic
from esper.tolaria.store import RunStore

NOW = datetime(2026, 11, 23, 20, 15, tzinfo=UTC)
SEED = SeedProgress(index=3, site="body", stage=Stage.FINE_TUNING, blueprint_name="low_rank", alpha=1.0)
PROGRESS = Progress(
    sequence=4,
    phase="training",
    epoch=1.5,
    epochs=10.0,
    step=30,
    steps=200,
    train_loss=0.5,
    validation_loss=None,
    validation_accuracy=0.9,
    parameters=1234,
    seeds=(SEED,),
    last_decision="because",
    control_plane=True,
    elapsed_s=12.25,
)
RESULT = Result(
    test_loss=0.1,
    test_accuracy=0.95,
    validation_loss=0.2,
    validation_accuracy=0.94,
    host_parameters=1000,
    final_parameters=1234,
    training_flops=1e9,
    training_time_s=30.0,
    kernel_ids=("sha256:" + "ab" * 32,),
    weights_digest="sha256:" + "cd" * 32,
    preparation_time_s=90.5,
)
RECORD = RunRecord(id="digits-1", spec=RunSpec(recipe="digits"), create_time=NOW, update_time=NOW)
STATUS = Status(attempt=1, state=RunState.RUNNING, update_time=NOW, progress=PROGRESS)

specs = st.builds(
    RunSpec,
    recipe=st.sampled_from(["digits", "stdlib-lm"]),
    seed=st.integers(0, 2**63 - 1),
    overrides=st.dictionaries(
        st.text(min_size=1, max_size=8), st.booleans() | st.floats(-1e6, 1e6) | st.text(max_size=8)
    ),
    arm=st.sampled_from(Arm),
    reference_run_id=st.text(max_size=8),
    group=st.text(max_size=8),
)


@given(specs)
def test_a_spec_survives_the_wire(spec):
    """From proto to core and back, nothing is lost."""
    assert spec == spec_from_proto(spec_to_proto(spec))


@given(specs, st.sampled_from(RunState), st.booleans())
def test_records_and_states_survive_the_disk(spec, state, known):
    """JSON -> core -> JSON loses nothing."""
    record = replace(
        RECORD, spec=spec, process=ProcessMark(pid=7, started=1.5) if known else None, verdict=state if known else None
    )
    status = replace(STATUS, state=state, result=RESULT if known else None, process=ProcessMark(pid=7, started=1.5))
    assert record == from_json(RunRecord, json.loads(json.dumps(to_json(record))))
    assert status == from_json(Status, json.loads(json.dumps(to_json(status))))


@pytest.mark.parametrize("data", [None, [], {}, {"attempt": 1}, {**to_json(STATUS), "state": "dancing"}])
def test_a_file_of_another_form_is_corrupt_and_not_a_crash(data):
    """DATA_LOSS with what was expected."""
    with pytest.raises(Corrupt, match="expected a Status"):
        from_json(Status, data)


def test_a_run_on_the_wire_has_everything_and_cuts_texts_to_their_bounds():
    """Progress, seeds, result; a long decision ends within 512 bytes, between characters."""
    status = replace(
        STATUS, state=RunState.SUCCEEDED, result=RESULT, progress=replace(PROGRESS, last_decision="ä" * 600)
    )
    message = run_to_proto(view(RECORD, status))
    assert (30, 1.5) == (message.progress.step, message.progress.epoch)
    assert not message.progress.HasField("validation_loss")
    assert [("body", 8)] == [(s.site, s.stage) for s in message.progress.seeds]
    assert len(message.progress.last_decision.encode()) <= 512
    assert message.progress.last_decision.endswith("ä…")
    assert (12, 250_000_000) == (message.progress.elapsed.seconds, message.progress.elapsed.nanos)
    assert 1234 == message.result.final_parameters
    assert (30, 90) == (message.result.training_time.seconds, message.result.preparation_time.seconds)


class TestView:
    def test_a_status_of_an_earlier_attempt_tells_progress_but_no_state(self):
        """After a resume the run is PREPARING, and shows how far it had come."""
        seen = view(replace(RECORD, attempt=2), replace(STATUS, state=RunState.FAILED, error="boom"))
        assert (RunState.PREPARING, "") == (seen.state, seen.error)
        assert PROGRESS == seen.progress

    def test_the_services_verdict_overrules_a_process_that_is_gone(self):
        """It said RUNNING, and is not there."""
        seen = view(replace(RECORD, verdict=RunState.INTERRUPTED, error="gone"), STATUS)
        assert (RunState.INTERRUPTED, "gone") == (seen.state, seen.error)

    def test_a_success_cannot_be_overruled(self):
        """It came to its end before the stop arrived."""
        status = replace(STATUS, state=RunState.SUCCEEDED, result=RESULT)
        seen = view(replace(RECORD, verdict=RunState.STOPPED), status)
        assert (RunState.SUCCEEDED, RESULT) == (seen.state, seen.result)


class TestRunDir:
    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        """Atomic: the old bytes or the new ones, and no litter."""
        path = tmp_path / "status.json"
        write_atomic(path, b"old")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, b"new", durable=True)
        assert b"old" == path.read_bytes()
        assert ["status.json"] == [p.name for p in tmp_path.iterdir()]

    def test_commands_of_another_form_are_corrupt(self, tmp_path):
        """Half a command is none."""
        (tmp_path / "command.json").write_text('{"attempt": 1}')
        with pytest.raises(Corrupt, match="attempt and word"):
            RunDir(tmp_path).command()
        (tmp_path / "command.json").write_text("{")
        with pytest.raises(Corrupt, match="expected JSON"):
            RunDir(tmp_path).command()

    def test_one_process_at_a_time_works_on_a_run(self, tmp_path):
        """The second is turned away; after the first has let go, it is not."""
        with RunDir(tmp_path).claim() as first, RunDir(tmp_path).claim() as second:
            assert first
            assert not second
        with RunDir(tmp_path).claim() as again:
            assert again

    def test_a_second_process_on_a_run_ends_at_once(self, make_run):
        """A service that was killed while starting a process may start another: it does no harm."""
        run_dir = make_run()
        with run_dir.claim():
            child = subprocess.run(
                [sys.executable, "-m", "esper.tolaria.worker", str(run_dir.path)],
                input=b"",
                capture_output=True,
                check=False,
            )
        assert 1 == child.returncode
        assert run_dir.status() is None


class TestStore:
    def test_folders_that_are_no_runs_are_left_alone(self, tmp_path):
        """A half-made run, a damaged one and a stranger's folder do not stop the service."""
        (tmp_path / "half").mkdir()
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "run.json").write_text("{")
        store = RunStore(tmp_path)
        assert [] == store.records()
        with pytest.raises(NotFound, match="no run 'half'"):
            store.run_dir("half")

    def test_a_damaged_status_is_no_status(self, make_run):
        """The run is shown by what the service knows."""
        run_dir = make_run("digits-1")
        (run_dir.path / "status.json").write_text("{")
        store = RunStore(run_dir.path.parent)
        assert RunState.PREPARING is store.view("digits-1").state


class TestDesk:
    def test_status_is_coalesced_and_events_are_kept_in_order(self, make_run):
        """The newest status, every event."""
        run_dir = make_run()
        desk = Desk(run_dir, 1)
        for step in range(5):
            desk.say(replace(STATUS, progress=replace(PROGRESS, step=step)))
            desk.event("tick", step=step)
        desk.close()
        lines = [json.loads(line) for line in (run_dir.path / "events.jsonl").read_text().splitlines()]
        assert list(range(5)) == [line["step"] for line in lines]
        assert 4 == run_dir.status().progress.step

    def test_trouble_with_the_folder_does_not_end_the_desk(self, make_run):
        """A torn command file is passed over; the next good one is heard."""
        run_dir = make_run()
        desk = Desk(run_dir, 1)
        desk.start()
        (run_dir.path / "command.json").write_text("{")
        desk._stop.wait(0.3)
        run_dir.write_command(Command(1, "pause"))
        deadline = datetime.now(UTC) + timedelta(seconds=10)
        while not desk.command and datetime.now(UTC) < deadline:
            desk._stop.wait(0.05)
        desk.close()
        assert "pause" == desk.command

    def test_events_wait_for_room_on_the_disk(self, make_run):
        """What a full disk refused is written once there is room, in order; the status does not wait for it."""
        run_dir = make_run()
        desk, events = Desk(run_dir, 1), run_dir.path / "events.jsonl"
        events.symlink_to("/dev/full")
        for step in range(3):
            desk.event("tick", step=step)
            desk.say(STATUS)
            with pytest.raises(OSError, match="No space"):
                desk._write()
            assert STATUS == run_dir.status()
        events.unlink()
        desk.event("tick", step=3)
        desk.close()
        assert [0, 1, 2, 3] == [json.loads(line)["step"] for line in events.read_text().splitlines()]

    def test_half_a_line_is_taken_back(self, make_run):
        """A disk that becomes full within a line leaves the lines before it whole."""
        run_dir = make_run()
        desk, events = Desk(run_dir, 1), run_dir.path / "events.jsonl"
        desk.event("tick", step=0)
        desk._write()
        whole = events.read_text()
        desk.event("tick", step=1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
        try:
            with pytest.raises(OSError, match="No space"):
                desk._write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert whole == events.read_text()
        desk.close()
        assert [0, 1] == [json.loads(line)["step"] for line in events.read_text().splitlines()]

    def test_the_last_word_is_said_although_events_cannot_be(self, make_run):
        """A run that succeeded has succeeded, whatever becomes of its events."""
        run_dir = make_run()
        desk = Desk(run_dir, 1)
        (run_dir.path / "events.jsonl").symlink_to("/dev/full")
        desk.event("end")
        last = replace(STATUS, state=RunState.SUCCEEDED, result=RESULT)
        desk.close(last)
        assert last == run_dir.status()

    def test_the_first_word_counts_for_signals(self, make_run):
        """A stop is not turned into a pause by a signal that follows it."""
        desk = Desk(make_run(), 1)
        desk.ask("stop")
        desk.ask("pause")
        assert "stop" == desk.command


class TestProcesses:
    def test_a_number_that_was_given_to_somebody_else_is_not_our_process(self):
        """Same number, other start time: not alive, and never killed."""
        processes = Processes()
        stranger = ProcessMark(pid=os.getpid(), started=1.0)
        assert not processes.alive(stranger)
        processes.kill(stranger)
        assert not processes.alive(ProcessMark(pid=2**22 + 1, started=0.0))


class TestOptimizer:
    def test_the_rate_warms_up_stays_and_decays_once(self):
        """Linear up, flat, linear down to the final share."""
        config = ScheduleConfig(epochs=1, warmup_steps=10, decay_start=0.5, final_scale=0.1)
        rates = [rate_at(step, 100, config) for step in range(100)]
        assert pytest.approx(0.1) == rates[0]
        assert [1.0] * 40 == rates[10:50]
        assert all(a > b for a, b in pairwise(rates[50:]))
        assert pytest.approx(0.1 + 0.9 / 50) == rates[-1]

    def test_both_optimizers_take_the_hosts_parameters_in_order(self):
        """One group, nothing left out."""
        from esper.tolaria import hosts

        model = hosts.build(ResidualHost(channels=2, blocks=2), 0)
        for name in ("adamw", "sgd"):
            optimizer = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1), model)
            assert list(map(id, model.parameters())) == list(map(id, optimizer.param_groups[0]["params"]))

    def test_hosts_differ_by_seed_and_leave_the_generator_alone(self):
        """Initial weights are a function of the seed."""
        import torch

        from esper.tolaria import hosts

        before = torch.get_rng_state()
        one, same, other = (hosts.build(ResidualHost(channels=2), seed).stem.weight for seed in (1, 1, 2))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        images = torch.rand(2, 3, 32, 32)
        assert (2, 10) == tuple(hosts.build(ResidualHost(channels=2), 1)(images).shape)
