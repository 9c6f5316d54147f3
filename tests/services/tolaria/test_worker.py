"""One attempt at a run, in this process or in one that is killed."""

from __future__ import annotations

import io
import json
import signal
import sys
import time

import pytest
import torch

from esper.mesh.errors import Conflict
from esper.tolaria import data, trainer, worker
from esper.tolaria.checkpoints import CheckpointStore
from esper.tolaria.core import Arm, RunState
from esper.tolaria.growing import HostNetwork
from esper.tolaria.networks import read_modules
from esper.tolaria.rundir import Command, RunDir
from esper.tolaria.worker import Launch, Session, main
from tests.services.tolaria.conftest import result_of, start_scripted
from tests.services.tolaria.scripted_worker import connect


def grow(run_dir: RunDir, kernel_cache, *, attempt: int = 1, boundary: int | None = None, **plan) -> int:
    """Run an attempt here, with a scripted controller."""
    full = {"kernel_id": kernel_cache.kernel_id, "germinate": 1, "site": "body", **plan}
    (run_dir.path / "plan.json").write_text(json.dumps(full))
    launch = Launch(attempt=attempt, cache_dir=str(kernel_cache.folder), resume_boundary=boundary)
    return Session(run_dir, launch, connect(run_dir)).run()


def again(run_dir: RunDir, kernel_cache, **plan) -> int:
    """A second attempt."""
    return grow(run_dir, kernel_cache, attempt=2, **plan)


class TestHost:
    def test_a_host_run_ends_with_figures_history_and_lineage(self, make_run):
        """A host run succeeds, touches the test set at its end and leaves every file that a report needs."""
        run_dir = make_run()
        assert Session(run_dir, Launch()).run() == 0
        status = run_dir.status()
        assert status is not None
        assert status.state is RunState.SUCCEEDED
        assert status.result is not None
        assert status.result.final_parameters == status.result.host_parameters > 0
        assert [1, 2, 3] == [e["boundary"] for e in json.loads((run_dir.path / "history.json").read_text())]
        assert {"adaptations": [], "decisions": []} == json.loads((run_dir.path / "lineage.json").read_text())
        assert {"process", "boundary", "end"} <= {json.loads(line)["kind"] for line in _lines(run_dir)}

    def test_equal_runs_have_equal_weights_and_other_seeds_others(self, make_run):
        """The digest of the weights is a function of configuration and seed."""
        digests = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            run_dir = make_run(name, seed=seed)
            Session(run_dir, Launch()).run()
            digests.append(result_of(run_dir)["weights_digest"])
        assert digests[0] == digests[1]
        assert digests[0] != digests[2]

    def test_flops_are_three_forwards_a_sample_and_one_per_validation(self, make_run):
        """Training counts forward and twice that for backward; each validation counts its forwards."""
        from esper.tolaria import hosts
        from esper.tolaria.flops import forward_flops

        run_dir = make_run()
        Session(run_dir, Launch()).run()
        config = run_dir.config()
        dataset = data.load(config.data, 0)
        one = forward_flops(hosts.build(config.host, 0), dataset.train_batch(0, 0)[0])
        trained = 3 * dataset.steps_per_epoch * config.data.batch_size
        assert (
            pytest.approx(one * (3 * trained + 3 * dataset.sizes["validation"])) == result_of(run_dir)["training_flops"]
        )

    def test_missing_data_fails_with_the_sentence_of_the_loader(self, make_run, tmp_path):
        """What the loader says is what the owner of the run reads."""
        run_dir = make_run()
        config = json.loads((run_dir.path / "config.json").read_text())
        config["data"] = {"kind": "cifar10", "dir": str(tmp_path)}
        config["host"] = {"kind": "residual"}
        (run_dir.path / "config.json").write_text(json.dumps(config))
        assert Session(run_dir, Launch()).run() == 1
        status = run_dir.status()
        assert status is not None
        assert status.state is RunState.FAILED
        assert "data_batch_1.bin" in status.error

    def test_an_unexpected_error_fails_the_run_and_names_its_place(self, make_run):
        """An error that is nobody's plan ends as FAILED with type, text and line."""
        run_dir = make_run()
        (run_dir.path / "config.json").unlink()
        assert Session(run_dir, Launch()).run() == 1
        status = run_dir.status()
        assert status is not None
        assert "FileNotFoundError" in status.error
        assert "(" in status.error

    def test_the_program_reads_its_launch_from_standard_input(self, make_run, monkeypatch):
        """One line of JSON; an empty line means the defaults; another process on the run turns it away."""
        run_dir = make_run()
        monkeypatch.setattr(sys, "stdin", io.StringIO(Launch(attempt=3).line()))
        assert main([str(run_dir.path)]) == 0
        status = run_dir.status()
        assert status is not None
        assert 3 == status.attempt
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        with run_dir.claim():
            assert main([str(run_dir.path)]) == 1

    def test_running_out_of_memory_is_told_in_one_sentence(self, make_run, monkeypatch):
        """FAILED, and the owner knows why."""

        def exhausted(logits, targets):
            raise MemoryError

        monkeypatch.setattr(trainer, "loss_of", exhausted)
        run_dir = make_run()
        assert Session(run_dir, Launch()).run() == 1
        status = run_dir.status()
        assert status is not None
        assert "out of memory" in status.error


class SlowClock:
    """The clock of trainer and session; waiting for kernels takes an hour of it and no time of ours."""

    HOUR_S = 3600.0

    def __init__(self, monkeypatch) -> None:
        self.waited_s = 0.0
        monkeypatch.setattr(trainer, "time", self)
        monkeypatch.setattr(worker, "time", self)
        monkeypatch.setattr(HostNetwork, "prepare", lambda *_: self.wait())

    def monotonic(self) -> float:
        return time.monotonic() + self.waited_s

    def wait(self) -> None:
        self.waited_s += self.HOUR_S


class TestTime:
    def test_waiting_for_kernels_is_not_training(self, make_run, monkeypatch):
        """Preparation has a figure of its own, and none of it is in the time of training or in the progress."""
        clock, run_dir = SlowClock(monkeypatch), make_run()
        assert Session(run_dir, Launch()).run() == 0
        result = result_of(run_dir)
        assert clock.HOUR_S < result["preparation_time_s"]
        assert 0 < result["training_time_s"] < clock.HOUR_S
        assert run_dir.status().progress.elapsed_s < clock.HOUR_S
        assert json.loads((run_dir.path / "history.json").read_text())[-1]["seconds"] < clock.HOUR_S

    def test_both_times_go_on_where_a_resume_goes_on(self, make_run, monkeypatch):
        """What an attempt spent before its last checkpoint is in the figures of the run that it belongs to."""
        clock, run_dir = SlowClock(monkeypatch), make_run()
        session, honest = Session(run_dir, Launch()), trainer.loss_of

        def slow(logits, targets):
            clock.wait()
            session.desk.ask("pause")
            return honest(logits, targets)

        with monkeypatch.context() as first:
            first.setattr(trainer, "loss_of", slow)
            session.run()
        assert RunState.PAUSED is run_dir.status().state
        Session(run_dir, Launch(attempt=2)).run()
        result = result_of(run_dir)
        assert 2 * clock.HOUR_S < result["preparation_time_s"] < 3 * clock.HOUR_S
        assert clock.HOUR_S < result["training_time_s"] < 2 * clock.HOUR_S


class WatchedData:
    """A dataset that knows what was asked of it, and gives the test set only after the last step of training."""

    def __init__(self, inner, epochs: int) -> None:
        self._inner, self._last = inner, (epochs - 1, inner.steps_per_epoch - 1)
        self.steps, self.validations, self.tests = [], 0, []

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def train_batch(self, epoch: int, index: int):
        self.steps.append((epoch, index))
        return self._inner.train_batch(epoch, index)

    def validation(self):
        self.validations += 1
        return self._inner.validation()

    def test(self):
        assert self._last == self.steps[-1], "the test set was asked for while the run trained"
        self.tests.append(sys._getframe(1).f_code.co_name)
        return self._inner.test()


class TestParts:
    @pytest.mark.parametrize("arm", [Arm.HOST, Arm.GROWN])
    def test_decisions_see_validation_data_and_the_test_set_is_evaluated_once(
        self, make_run, kernel_cache, monkeypatch, arm
    ):
        """Boundaries, gates and counterfactuals included: the test set is touched by the end of the run alone."""
        honest, watched = data.load, []

        def load(config, seed):
            watched.append(WatchedData(honest(config, seed), epochs=8))
            return watched[0]

        monkeypatch.setattr(data, "load", load)
        run_dir = make_run(arm=arm, schedule__epochs=8, artifacts__export=True)
        assert (grow(run_dir, kernel_cache) if arm is Arm.GROWN else Session(run_dir, Launch()).run()) == 0
        assert ["finish"] == watched[0].tests
        assert watched[0].validations >= 8
        if arm is Arm.GROWN:
            (adaptation,) = json.loads((run_dir.path / "lineage.json").read_text())["adaptations"]
            assert adaptation["gain_low"] is not None


class TestPause:
    def test_a_pause_checkpoints_and_a_resume_ends_where_it_would_have_ended(self, make_run):
        """Pausing costs nothing but time: the weights are those of the run that was left alone."""
        left_alone = make_run("alone")
        Session(left_alone, Launch()).run()
        paused = make_run("paused")
        paused.write_command(Command(1, "pause"))
        assert Session(paused, Launch()).run() == 0
        status = paused.status()
        assert status is not None
        assert status.state is RunState.PAUSED
        Session(paused, Launch(attempt=2)).run()
        assert result_of(left_alone)["weights_digest"] == result_of(paused)["weights_digest"]

    def test_a_stop_ends_as_stopped(self, make_run):
        """A stop leaves a checkpoint and no result."""
        run_dir = make_run()
        run_dir.write_command(Command(1, "stop"))
        Session(run_dir, Launch()).run()
        status = run_dir.status()
        assert status is not None
        assert status.state is RunState.STOPPED
        assert status.result is None

    def test_a_command_for_another_attempt_is_not_obeyed(self, make_run):
        """A pause that was meant for the attempt before does not pause this one."""
        run_dir = make_run()
        run_dir.write_command(Command(1, "pause"))
        Session(run_dir, Launch(attempt=2)).run()
        status = run_dir.status()
        assert status is not None
        assert status.state is RunState.SUCCEEDED


class TestUnstable:
    def test_a_loss_that_is_not_finite_goes_back_and_cuts_the_rate(self, make_run, monkeypatch):
        """One bad step: back to the last boundary, half the rate, and the run succeeds."""
        calls = {"n": 0}
        honest = trainer.loss_of

        def poisoned(logits, targets):
            calls["n"] += 1
            loss = honest(logits, targets)
            return loss * torch.nan if calls["n"] == 20 else loss

        monkeypatch.setattr(trainer, "loss_of", poisoned)
        run_dir = make_run()
        assert Session(run_dir, Launch()).run() == 0
        assert 1 == result_of(run_dir)["rollbacks"]
        rolled = [json.loads(line) for line in _lines(run_dir) if "rollback" in line]
        assert rolled[0]["to_step"] < rolled[0]["step"]
        rates = [entry["learning_rate"] for entry in json.loads((run_dir.path / "history.json").read_text())]
        assert pytest.approx(0.5) == rates[1] / rates[0]

    def test_a_run_that_stays_unstable_fails_and_says_what_to_change(self, make_run, monkeypatch):
        """Rollbacks are bounded."""
        honest = trainer.loss_of
        monkeypatch.setattr(trainer, "loss_of", lambda logits, targets: honest(logits, targets) * torch.nan)
        run_dir = make_run(guard__max_rollbacks=2)
        assert Session(run_dir, Launch()).run() == 1
        status = run_dir.status()
        assert status is not None
        assert "optimizer.learning_rate" in status.error


class TestGrown:
    def test_a_seed_goes_all_the_way_and_is_told_in_lineage_and_report(self, make_run, kernel_cache):
        """Germinated at boundary 1, fossilized after probation; the lineage names kernel, decisions and gain."""
        run_dir = make_run(arm=Arm.GROWN, schedule__epochs=8)
        assert grow(run_dir, kernel_cache) == 0
        result = result_of(run_dir)
        lineage = json.loads((run_dir.path / "lineage.json").read_text())
        assert [kernel_cache.kernel_id] == result["kernel_ids"]
        assert [("body", "fossilized")] == [(a["site"], a["outcome"]) for a in lineage["adaptations"]]
        assert lineage["adaptations"][0]["gain_low"] is not None
        assert "germinate" == lineage["decisions"][0]["action"]
        assert result["final_parameters"] - result["host_parameters"] == lineage["adaptations"][0]["parameters"] > 0
        report = json.loads((run_dir.path / "report.json").read_text())
        assert "conv_bottleneck at body" in report["verdict"]
        assert "as the script says" == report["decisions"][0]["advice"]

    def test_a_culled_seed_leaves_no_parameters_but_its_flops(self, make_run, kernel_cache):
        """What was tried and taken out is paid for all the same."""
        tried = make_run("tried", arm=Arm.GROWN, schedule__epochs=6)
        assert grow(tried, kernel_cache, cull=4) == 0
        alone = make_run("alone", schedule__epochs=6)
        Session(alone, Launch()).run()
        one, other = result_of(tried), result_of(alone)
        assert one["final_parameters"] == one["host_parameters"]
        assert one["training_flops"] > other["training_flops"]
        assert "kept" in json.loads((tried.path / "report.json").read_text())["verdict"]

    def test_a_seed_that_is_alive_at_the_end_is_part_of_the_network_and_said_so(self, make_run, kernel_cache):
        """The network that was trained is the network that is tested, also with a seed on probation."""
        run_dir = make_run(arm=Arm.GROWN, schedule__epochs=6)
        assert grow(run_dir, kernel_cache, fossilize=False) == 0
        adaptation = json.loads((run_dir.path / "lineage.json").read_text())["adaptations"][0]
        assert "unfinished" == adaptation["outcome"]
        assert "FINE_TUNING" in adaptation["reason"]
        assert result_of(run_dir)["final_parameters"] > result_of(run_dir)["host_parameters"]

    def test_without_a_mesh_it_trains_like_the_host(self, make_run):
        """A grown run whose control plane is away computes what the host computes, to the bit."""
        grown, host = make_run("grown", arm=Arm.GROWN), make_run("host")
        assert Session(grown, Launch(mesh="127.0.0.1:9")).run() == 0
        Session(host, Launch()).run()
        assert result_of(grown)["weights_digest"] == result_of(host)["weights_digest"]

    def test_a_killed_process_resumes_to_the_same_weights(self, make_run, kernel_cache):
        """SIGKILL twice: the resumed run ends with the weights of the one that was left alone."""
        settings = {"arm": Arm.GROWN, "schedule__epochs": 14, "checkpoint__every_steps": 4, "data__batch_size": 32}
        alone = make_run("alone", **settings)
        assert grow(alone, kernel_cache) == 0
        killed = make_run("killed", **settings)
        plan = {"kernel_id": kernel_cache.kernel_id, "germinate": 1, "site": "body"}
        # Held later on, however fast the machine: the schedule cannot run out before the kill.
        for attempt, until, hold in ((1, 2, 5), (2, 6, 10)):
            launch = Launch(attempt=attempt, cache_dir=str(kernel_cache.folder))
            child = start_scripted(killed, launch, {**plan, "hold": hold})
            _wait_for_checkpoint(killed, attempt, until, child)
            child.send_signal(signal.SIGKILL)
            assert child.wait(30) == -signal.SIGKILL
        assert grow(killed, kernel_cache, attempt=3) == 0
        assert result_of(alone)["weights_digest"] == result_of(killed)["weights_digest"]
        resumed = [json.loads(line)["step"] for line in _lines(killed) if '"resumed"' in line]
        assert 2 == len(resumed)
        assert 0 < resumed[0] < resumed[1]

    def test_resuming_from_an_earlier_boundary_repeats_the_same_run(self, make_run, kernel_cache):
        """Any checkpoint that was kept leads to the same end."""
        run_dir = make_run(arm=Arm.GROWN, schedule__epochs=8, checkpoint__keep=8)
        grow(run_dir, kernel_cache)
        first = result_of(run_dir)["weights_digest"]
        assert again(run_dir, kernel_cache, boundary=4) == 0
        assert first == result_of(run_dir)["weights_digest"]

    def test_losing_the_controller_pauses_before_the_boundary_where_asked_to(self, make_run, kernel_cache):
        """on_loss=pause: nothing is decided without the controller, and a resume takes the decision then."""
        settings = {"arm": Arm.GROWN, "schedule__epochs": 8, "control__on_loss": "pause"}
        alone = make_run("alone", **settings)
        grow(alone, kernel_cache)
        lost = make_run("lost", **settings)
        assert grow(lost, kernel_cache, silent=[3]) == 0
        status = lost.status()
        assert status is not None
        assert status.state is RunState.PAUSED
        assert "control plane" in (status.progress.phase if status.progress else "")
        assert again(lost, kernel_cache) == 0
        assert result_of(alone)["weights_digest"] == result_of(lost)["weights_digest"]

    def test_losing_the_controller_trains_on_by_default(self, make_run, kernel_cache):
        """on_loss=continue: the run finishes; the history says at which boundary nobody answered."""
        run_dir = make_run(arm=Arm.GROWN)
        grow(run_dir, kernel_cache, silent=[2])
        history = json.loads((run_dir.path / "history.json").read_text())
        assert [True, False, True] == [entry["control_plane"] for entry in history]

    def test_a_checkpoint_holds_the_kernels_in_use_with_their_verdicts(self, make_run, kernel_cache):
        """With the cache emptied, bundle and verdict are still in the checkpoint."""
        run_dir = make_run(arm=Arm.GROWN, schedule__epochs=6)
        grow(run_dir, kernel_cache)
        snapshot = CheckpointStore(run_dir.checkpoints, 3).load()
        assert snapshot is not None
        fetched = snapshot.bundles[kernel_cache.kernel_id]
        assert kernel_cache.bundle == fetched.bundle
        assert kernel_cache.key.public.key_id == (fetched.verdict.key_id if fetched.verdict else "")


class TestStatic:
    def test_the_static_twin_has_the_grown_runs_modules_from_step_0(self, make_run, kernel_cache):
        """Same parameters as the grown run at its end; another way there."""
        grown = make_run("grown", arm=Arm.GROWN, schedule__epochs=8)
        grow(grown, kernel_cache)
        static = make_run("static", arm=Arm.STATIC, reference="grown", schedule__epochs=8)
        assert Session(static, Launch()).run() == 0
        assert result_of(grown)["final_parameters"] == result_of(static)["final_parameters"]
        assert result_of(grown)["training_flops"] < result_of(static)["training_flops"]
        assert result_of(grown)["weights_digest"] != result_of(static)["weights_digest"]
        attached = read_modules(grown)[0][0]
        assert 3.0 == attached.learning_rate_scale
        assert attached.newborn_steps > 0

    def test_the_twin_of_a_run_that_ended_on_a_ramp_is_exported(self, make_run, kernel_cache):
        """The grown network keeps the blend factor that it ended with; its twin has the module in full, and says so."""
        grown = make_run("grown", arm=Arm.GROWN)
        assert grow(grown, kernel_cache) == 0
        modules = grown.path / "modules" / "modules.json"
        # As a blueprint that is not born at zero output would have left it.
        modules.write_text(json.dumps([{**document, "alpha": 0.4} for document in json.loads(modules.read_text())]))
        static = make_run("static", arm=Arm.STATIC, reference="grown", artifacts__export=True)
        assert Session(static, Launch()).run() == 0, static.status().error
        assert (static.export / "model.pt2").exists()

    def test_a_static_twin_resumes_exactly(self, make_run, kernel_cache):
        """Modules and their optimizer state travel in its checkpoints too."""
        grown = make_run("grown", arm=Arm.GROWN, schedule__epochs=7)
        grow(grown, kernel_cache)
        digests = []
        for name in ("one", "two"):
            static = make_run(name, arm=Arm.STATIC, reference="grown", checkpoint__keep=5)
            Session(static, Launch()).run()
            if name == "two":
                Session(static, Launch(attempt=2, resume_boundary=1)).run()
            digests.append(result_of(static)["weights_digest"])
        assert digests[0] == digests[1]

    def test_a_reference_without_modules_is_refused_with_its_name(self, make_run):
        """A host run grew nothing that one could refer to."""
        host = make_run("host")
        with pytest.raises(Conflict, match="host has no grown modules"):
            read_modules(host)


def _lines(run_dir: RunDir) -> list[str]:
    return (run_dir.path / "events.jsonl").read_text().splitlines()


def _resumed(run_dir: RunDir, attempt: int) -> dict[str, int] | None:
    """Where an attempt went on from; None before it did."""
    if attempt == 1:
        return {"boundary": 0, "step": 0}
    said = [json.loads(line) for line in _lines(run_dir)]
    return next((line for line in said if line["kind"] == "resumed" and line["attempt"] == attempt), None)


def _wait_for_checkpoint(run_dir: RunDir, attempt: int, boundary: int, child) -> None:
    """Until an attempt has come beyond where it began and beyond a boundary, on disk."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert child.poll() is None, (run_dir.path / "log.txt").read_text()
        names = [path.name for path in run_dir.checkpoints.glob("b*")] if run_dir.checkpoints.exists() else []
        began = _resumed(run_dir, attempt)
        if began and any(int(name[1:7]) >= boundary and int(name[9:]) > began["step"] for name in names):
            return
        time.sleep(0.005)
    raise AssertionError("no checkpoint in 150 s")
