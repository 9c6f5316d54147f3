"""The callback for the Trainer of Hugging Face, with real trainers."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from esper.kasmina import wrap
from esper.kasmina.control import Stage
from esper.mesh.errors import InvalidInput
from tests.kasmina.hosts import blobs, mlp
from tests.kasmina.integrations.script import OPTIONS, Script, same, values

pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install 'esper[transformers]'")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from esper.kasmina.integrations.transformers import FILE, GrowthCallback

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

S = Stage


@pytest.fixture(autouse=True)
def _libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is downloaded, and what the libraries warn of is their own affair."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Rows(Dataset):
    """Rows of named tensors."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: values[i] for name, values in self.columns.items()}


class Host(nn.Module):
    """Any module whose forward takes labels."""

    fails_at = -1

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += self.training
        if self.calls == self.fails_at:
            raise RuntimeError("out of luck")
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def _rows(count: int = 64, seed: int = 1) -> Rows:
    x, y = blobs(count, seed=seed)
    return Rows(x=x, labels=y)


def _trainer(folder: Path, model: nn.Module, callback: GrowthCallback | None, **options: Any) -> Trainer:
    given = {
        "output_dir": str(folder),
        "num_train_epochs": 5,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 2e-2,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 4,
        "use_cpu": True,
        "seed": 3,
    } | options
    train, held_out = given.pop("train", _rows()), given.pop("held_out", _rows(32, 2))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return Trainer(
        model,
        TrainingArguments(**given),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[] if callback is None else [callback],
    )


def _callback(plane: Script | None = None, **more: Any) -> GrowthCallback:
    return GrowthCallback(mesh=plane, **(OPTIONS | more))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["plain", "together"])
def test_dormant_is_absent(tmp_path: Path, options: dict[str, Any]) -> None:
    """Weights and losses are those of a training without the callback."""
    found = []
    for callback in (None, _callback()):
        host = Host()
        trainer = _trainer(tmp_path, host, callback, num_train_epochs=2, **options)
        trainer.train()
        log = [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
        found.append((values(host), log))
    (a, log_a), (b, log_b) = found
    same(a, b)
    assert log_a == log_b
    assert (trainer.state.global_step, 2) == (callback.growth.steps, callback.growth.boundaries)


def test_grows_and_logs(tmp_path: Path) -> None:
    """Decisions are taken at evaluations, worth is measured by repeating them, and figures go to the Trainer's log."""
    plane = Script("net")
    callback, host = _callback(plane), Host()
    trainer = _trainer(tmp_path, host, callback, num_train_epochs=6)
    trainer.train()
    growth = callback.growth
    assert S.FOSSILIZED is growth.life.stage(plane.seed)
    measured = plane.reports[-1].counterfactual
    assert (4, True, True) == (measured.batches, measured.mean_gain > 0, plane.closed)
    state, log = plane.states[-1], trainer.state.log_history
    evaluated = [entry for entry in log if "eval_loss" in entry][-1]
    assert (6, 6.0, 48) == (state.boundary, state.epoch, state.step)
    assert state.validation_loss == pytest.approx(evaluated["eval_loss"])
    assert state.validation_accuracy == pytest.approx(evaluated["eval_accuracy"])
    assert 48 == growth.config.total_steps
    train_losses = [entry["loss"] for entry in log if "grad_norm" in entry]
    assert state.train_loss == pytest.approx(sum(train_losses[-2:]) / 2, rel=1e-3)
    grown = [entry for entry in log if "growth/seeds_fossilized" in entry]
    assert (6, 1.0) == (len(grown), grown[-1]["growth/seeds_fossilized"])
    # Its groups follow the schedule of the Trainer, which has decayed to its end.
    assert {0.0} == {group["lr"] for group in growth.optimizer.param_groups[:-1]}


def test_resume_is_exact(tmp_path: Path) -> None:
    """Resumed from before, at and after the graft with fresh objects, a training ends with the same bits."""
    plane, whole = Script("net", first=2), Host()
    options = {"save_strategy": "epoch", "num_train_epochs": 5}
    _trainer(tmp_path, whole, _callback(plane), **options).train()
    for epochs in (1, 2):
        again, host = Script("net", first=2), Host()
        again.kernels.update(plane.kernels)
        path = tmp_path / f"checkpoint-{8 * epochs}"
        assert (path / FILE).is_file()
        options["save_strategy"] = "no"
        _trainer(tmp_path, host, _callback(again), **options).train(resume_from_checkpoint=str(path))
        same(values(whole), values(host))
        assert [s.boundary for s in again.states] == list(range(epochs + 1, 6))
    (path / FILE).unlink()
    with pytest.raises(InvalidInput, match="expected growth's state beside the seeds"):
        _trainer(tmp_path, Host(), _callback(), **options).train(resume_from_checkpoint=str(path))


def test_best_checkpoint_of_another_shape(tmp_path: Path) -> None:
    """Where the Trainer goes back to its best weights, the model gets the seeds that it had then."""
    plane, host = Script("net", first=1, cull=3), Host()
    callback = _callback(plane)
    trainer = _trainer(
        tmp_path,
        host,
        callback,
        num_train_epochs=4,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
        greater_is_better=False,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    loss = min(e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e)
    assert best is not None
    assert loss == pytest.approx(trainer.evaluate()["eval_accuracy"])
    assert (int(best.rpartition("-")[2]) in {8, 16}) == any("esper_seed_" in name for name in host.state_dict())


def test_training_twice_and_failures(tmp_path: Path) -> None:
    """A second train() goes on with what the first has grown; a failing step closes the session."""
    plane, host = Script("net"), Host()
    callback = _callback(plane)
    trainer = _trainer(tmp_path, host, callback, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    before, groups = list(values(host)), len(trainer.optimizer.param_groups)
    trainer.train()
    assert (before, groups, 4) == (list(values(host)), len(trainer.optimizer.param_groups), callback.growth.boundaries)
    assert S.GRAFTING < callback.growth.life.stage(plane.seed)
    failing, host = Script("net"), Host()
    host.fails_at = 10
    with pytest.raises(RuntimeError, match="out of luck"):
        _trainer(tmp_path, host, _callback(failing), eval_strategy="no").train()
    assert failing.closed
    late = _trainer(tmp_path, Host(), None)
    late.add_callback(_callback())
    with pytest.raises(InvalidInput, match="found it added later"):
        late.train()


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("site", ["model.layers.1", "model.layers.0.mlp", "model.layers.0..model.layers.1"])
def test_recomputation_that_the_model_enables(reentrant: bool, site: str) -> None:
    """With the model's own switch for activation checkpointing, outputs and gradients are those without it."""
    model, plane = _llama(), Script(site)
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growth = wrap(model, optimizer, mesh=plane, **(OPTIONS | {"causal": True}))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **found}

    gradients()
    optimizer.step()
    growth.step(1.0)
    growth.boundary({"loss": 1.0})
    assert S.GRAFTING is growth.life.stage(plane.seed)
    with torch.no_grad():
        for p in growth.life.runs[plane.seed].module.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    wanted = gradients()
    assert any("esper_seed_" in name for name in wanted)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients()
    assert list(wanted) == list(found)
    different = {name for name in wanted if not torch.allclose(wanted[name], found[name], atol=1e-5)}
    # What a span that crosses reentrant borders does not reach: what stands before it.
    crossing = reentrant and ".." in site
    assert {"model.embed_tokens.weight"} >= different if crossing else not different
    growth.close()


def test_a_language_model_with_recomputation(tmp_path: Path) -> None:
    """A Llama with tied weights and activation checkpointing grows a block, is saved, and resumes exactly."""
    tokens = torch.randint(0, 40, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = Rows(input_ids=tokens, labels=tokens)
    options = {
        "train": rows,
        "held_out": rows,
        "num_train_epochs": 4,
        "save_strategy": "epoch",
        "activation_checkpointing": True,
        "prediction_loss_only": True,
    }
    found, kernels = [], {}
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = _llama()
        plane = Script("model.layers.0")
        plane.kernels.update(kernels)
        callback = _callback(plane, causal=True)
        _trainer(tmp_path, model, callback, **options).train(resume_from_checkpoint=resume)
        kernels = plane.kernels
        found.append(values(model))
        assert S.GRAFTING <= callback.growth.life.stage(plane.seed)
    same(*found)
    assert model.lm_head.weight is model.model.embed_tokens.weight
