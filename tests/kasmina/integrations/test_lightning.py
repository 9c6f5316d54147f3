"""The callback for Lightning, with real trainers."""

from __future__ import annotations

import runpy
import sys
import warnings
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from esper.kasmina.control import Stage
from esper.kasmina.integrations.lightning import GrowthCallback
from esper.mesh.errors import InvalidInput
from examples import lightning_loop
from tests.kasmina.hosts import blobs, mlp
from tests.kasmina.integrations.script import OPTIONS, Script, same, values
from tests.kasmina.training.tools import CastDelta

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

S = Stage


@pytest.fixture(autouse=True)
def _libraries() -> Iterator[None]:
    """What lightning warns of (few workers, few batches) is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Host(pl.LightningModule):
    """As the tutorials write it: the network is a child, and steps call it."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.net = mlp()
        self.accuracy = MulticlassAccuracy(4)
        self.optimizer_count = optimizers
        self.validations = 0
        self.fails_at = -1

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if self.trainer.global_step == self.fails_at:
            raise RuntimeError("out of luck")
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.validations += 1
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log_dict({"val_acc": self.accuracy})

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-3) for _ in range(self.optimizer_count)
        ]
        if len(optimizers) > 1:
            self.automatic_optimization = False
            return optimizers
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], max_lr=2e-2, total_steps=200)
        return {"optimizer": optimizers[0], "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Direct(Host):
    """Calls itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self(batch[0]), batch[1])}

    def validation_step(self, batch: list[Tensor], index: int, dataloader_idx: int = 0) -> Tensor:
        self.validations += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def _trainer(folder: Path, callback: GrowthCallback | None, epochs: int, **options: Any) -> pl.Trainer:
    given = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    } | options
    extra = given.pop("callbacks", [])
    return pl.Trainer(callbacks=[*([] if callback is None else [callback]), *extra], **given)


def _loaders(batch: int = 8) -> tuple[DataLoader, DataLoader]:
    return DataLoader(TensorDataset(*blobs(64)), batch), DataLoader(TensorDataset(*blobs(32, seed=2)), 8)


def _callback(plane: Script | None = None, **more: Any) -> GrowthCallback:
    return GrowthCallback(mesh=plane, **(OPTIONS | more))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
    ],
    ids=["plain", "accumulation", "bfloat16"],
)
def test_dormant_is_absent(tmp_path: Path, options: dict[str, Any]) -> None:
    """The module, its optimizer and its logs are those of a training without the callback."""
    found = []
    for callback in (None, _callback()):
        host = Host()
        trainer = _trainer(tmp_path, callback, 2, **options)
        trainer.fit(host, *_loaders())
        found.append((values(host), dict(trainer.callback_metrics), trainer.optimizers[0].state_dict()))
    (a, logs_a, optimizer_a), (b, logs_b, optimizer_b) = found
    same(a, b)
    assert logs_a == logs_b
    assert str(optimizer_a) == str(optimizer_b)
    # Which module to wrap shows in the first batch.
    assert trainer.global_step - 1 <= callback.growth.steps <= trainer.global_step
    assert 2 == callback.growth.boundaries
    assert "net" == callback.state_dict()["module"]


def test_grows_and_logs(tmp_path: Path) -> None:
    """Decisions are taken at validations, worth is measured by repeating them, and figures go to the logger."""
    plane = Script()
    callback, host = _callback(plane), Host()
    trainer = _trainer(tmp_path, callback, 7, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit(host, *_loaders())
    growth = callback.growth
    assert S.FOSSILIZED is growth.life.stage(plane.seed)
    assert any("esper_seed_" in name for name in host.state_dict())
    assert plane.closed
    measured = plane.reports[-1].counterfactual
    assert (4, True) == (measured.batches, measured.mean_gain > 0)
    state = plane.states[-1]
    assert (7, 7.0, 55) == (state.boundary, state.epoch, state.step)
    assert state.validation_loss == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert state.validation_accuracy == pytest.approx(float(trainer.callback_metrics["val_acc"]))
    # Sanity check, one validation an epoch, and two passes for each measurement.
    assert host.validations == 2 + 4 * 7 + 4 * growth.measurer.passes
    written = (tmp_path / "metrics.csv").read_text()
    header, *_ = [line for line in written.splitlines() if line]
    assert {"growth/parameters_added", "growth/seeds_fossilized"} <= set(header.split(","))
    assert "val_acc" in header
    assert all(m.training for m in host.modules())
    assert 56 == growth.config.total_steps


def test_resume_is_exact(tmp_path: Path) -> None:
    """Resumed from before, at and after the graft with fresh objects, a training ends with the same bits."""
    plane, whole = Script(first=2), Host()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    _trainer(tmp_path, _callback(plane), 5, callbacks=[keep], enable_checkpointing=True).fit(whole, *_loaders())
    for epochs in (1, 3):
        again, host = Script(first=2), Host()
        again.kernels.update(plane.kernels)
        resumed = _callback(again)
        _trainer(tmp_path, resumed, 5).fit(host, *_loaders(), ckpt_path=tmp_path / f"epoch={epochs - 1}.ckpt")
        same(values(whole), values(host))
        assert 5 == resumed.growth.boundaries
        assert [s.boundary for s in again.states] == list(range(epochs + 1, 6))


def test_averages_follow_and_resume(tmp_path: Path) -> None:
    """Lightning's own average of the weights gets the newborn, and both come back from a checkpoint."""
    found, kernels = [], {}
    for path in (None, tmp_path / "epoch=1.ckpt"):
        plane, host = Script(), Host()
        plane.kernels.update(kernels)
        callbacks: list[pl.Callback] = [EMAWeightAveraging(decay=0.9)]
        if path is None:
            callbacks.append(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
        trainer = _trainer(tmp_path, _callback(plane), 3, callbacks=callbacks, enable_checkpointing=path is None)
        trainer.fit(host, *_loaders(), ckpt_path=path)
        kernels = plane.kernels
        # When training is over, the module has the averaged values.
        found.append(values(host))
    assert any("esper_seed_" in name for name in found[0])
    same(*found)


def test_metrics_keep_their_counts(tmp_path: Path) -> None:
    """A validation that is repeated to measure a seed leaves metrics, modes and logs as they were."""
    callback, host = _callback(), Host()
    trainer = _trainer(tmp_path, callback, 1)
    trainer.fit(host, *_loaders())
    before = {name: value.clone() for name, value in host.accuracy.metric_state.items()}
    count, log = host.accuracy._update_count, host.log
    losses = callback._validate(trainer, host)["loss"]
    assert 4 == len(losses)
    same(before, host.accuracy.metric_state)
    assert (count, log) == (host.accuracy._update_count, host.log)
    assert host.training


def test_testing_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    """The best checkpoint may be from before or after a graft: the module gets its seeds, also in a new process."""
    plane = Script(first=2, cull=4)
    callback, host = _callback(plane), Host()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = _trainer(tmp_path, callback, 4, callbacks=[keep], enable_checkpointing=True)
    train, held_out = _loaders()
    trainer.fit(host, train, held_out)
    assert not any("esper_seed_" in name for name in host.state_dict())
    host.test_step = host.validation_step
    for epoch, grown in ((2, True), (0, False), (1, True)):
        path = tmp_path / f"epoch={epoch}.ckpt"
        trainer.test(host, held_out, ckpt_path=path, verbose=False)
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert grown == any("esper_seed_" in name for name in weights)
        same(weights, values(host))
    loss = trainer.callback_metrics["val_loss"]
    fresh, other = Host(), _callback(kernels=plane.kernels)
    fresh.test_step = fresh.validation_step
    trainer = _trainer(tmp_path, other, 1)
    trainer.test(fresh, held_out, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert torch.equal(loss, trainer.callback_metrics["val_loss"])


def test_scaled_float16_and_accumulation(tmp_path: Path) -> None:
    """With a gradient scaler that skips steps and accumulation, only real steps count, and a seed still grows."""
    plane = Script(delta=CastDelta)
    callback, host = _callback(plane), Host()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = _trainer(tmp_path, callback, 8, plugins=[precision], accumulate_grad_batches=2)
    trainer.fit(host, *_loaders(4))
    assert 0 < trainer.global_step - callback.growth.steps < 20
    assert S.GRAFTING < callback.growth.life.stage(plane.seed) <= S.FOSSILIZED
    assert 0 == callback.growth.counters["rollbacks"] + callback.growth.counters["failed_step"]


def test_module_that_calls_itself(tmp_path: Path) -> None:
    """The LightningModule grows where the step calls it; validation may return its loss; there may be two loaders."""
    plane = Script("net")
    callback, host = _callback(plane), Direct()
    train, held_out = _loaders()
    trainer = _trainer(tmp_path, callback, 5, limit_val_batches=2)
    trainer.fit(host, train, [held_out, held_out])
    assert callback.growth.model is host
    assert S.FOSSILIZED is callback.growth.life.stage(plane.seed)
    assert 4 == plane.reports[-1].counterfactual.batches


def test_without_a_validation(tmp_path: Path) -> None:
    """Boundaries are the ends of epochs; nothing can be measured, and a seed stays on probation."""
    plane = Script()
    callback = _callback(plane)
    _trainer(tmp_path, callback, 5).fit(Host(), _loaders()[0])
    assert (5, S.FINE_TUNING) == (callback.growth.boundaries, callback.growth.life.stage(plane.seed))


def test_fitting_twice(tmp_path: Path) -> None:
    """A second fit() goes on with what the first one has grown; its new optimizer has the seeds in their own groups."""
    plane = Script()
    callback, host = _callback(plane), Host()
    trainer = _trainer(tmp_path, callback, 2)
    trainer.fit(host, *_loaders())
    before = values(host)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(host, *_loaders())
    assert set(before) == set(host.state_dict())
    assert (4, 2) == (callback.growth.boundaries, len(trainer.optimizers[0].param_groups))
    assert S.GRAFTING < callback.growth.life.stage(plane.seed)


def test_refusals_and_failures(tmp_path: Path) -> None:
    """Several optimizers are refused; weights alone can not be resumed; a failing step closes the session."""
    plane = Script()
    with pytest.raises(InvalidInput, match="expected one optimizer, found 2"):
        _trainer(tmp_path, _callback(plane), 1).fit(Host(2), *_loaders())
    host, callback = Host(), _callback(plane)
    host.fails_at = 10
    with pytest.raises(RuntimeError, match="out of luck"):
        _trainer(tmp_path, callback, 2).fit(host, *_loaders())
    assert (9, True, True) == (callback.growth.steps, plane.closed, "on_load_checkpoint" not in host.__dict__)
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, save_weights_only=True)
    _trainer(tmp_path, _callback(Script()), 2, callbacks=[keep], enable_checkpointing=True).fit(Host(), *_loaders())
    with pytest.raises(InvalidInput, match="save_weights_only=True"):
        _trainer(tmp_path, _callback(), 3).fit(Host(), *_loaders(), ckpt_path=tmp_path / "last.ckpt")


def test_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The example trains to its end with no mesh at its address."""
    monkeypatch.chdir(tmp_path)
    lightning_loop.main("127.0.0.1:9", epochs=2)
    assert "0 seeds not dormant" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "package"), [("lightning", "lightning.pytorch"), ("transformers", "transformers")])
def test_missing_framework(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    """Without the framework, its module says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'esper\[{name}\]'"):
        runpy.run_module(f"esper.kasmina.integrations.{name}")
