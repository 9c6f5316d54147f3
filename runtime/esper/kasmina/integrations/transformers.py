"""Growth in the Trainer of Hugging Face: one callback.

Typical use::

    trainer = transformers.Trainer(model, arguments, ..., callbacks=[GrowthCallback(mesh="localhost:7600")])
    trainer.train()                                                 # also with resume_from_checkpoint=True

A boundary is the end of an evaluation; without one, of an epoch, and then no seed can be measured. To measure what a
seed is worth, the callback runs `Trainer.prediction_step` again over the evaluation data.

The Trainer tells its callbacks neither the loss of a step nor where it resumes from, nor that it failed, so the
callback stands in front of three of its public methods: ``train``, ``create_scheduler`` and ``training_step``.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina._quiet import untouched
from esper.kasmina.integrations._session import LeftOut, Session, unwrapped
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        "esper.kasmina.integrations.transformers: expected transformers 5 and accelerate, found none: "
        "pip install 'esper[transformers]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from esper.kasmina.config import Config
    from esper.kasmina.control import ControlPlane
    from esper.kasmina.growth import Growth
    from esper.kasmina.integrations._session import Kernels
    from esper.kasmina.sites import Selectors

__all__ = ["FILE", "GrowthCallback"]

FILE = "esper_growth.pt"
"""What growth must remember, in each checkpoint's folder; ``torch.load(weights_only=True)`` reads it."""

_log = get_logger("esper.kasmina.integrations.transformers")


class GrowthCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by the type checker
    """Lets the model of a Trainer grow; as an entry of ``Trainer(callbacks=[...])``, not of ``add_callback``.

    Args:
        mesh: as for `esper.kasmina.wrap`, like `sites`, `exclude`, `cache_dir`, `config` and `options`.
        kernels: where the kernels of a resumed run are, by id or as a function of it; None asks the mesh.

    Attributes:
        growth: the session; None before the first training.
    """

    def __init__(
        self,
        *,
        mesh: str | ControlPlane | None = None,
        sites: Selectors | None = None,
        exclude: Selectors | None = None,
        cache_dir: Path | None = None,
        kernels: Kernels | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> None:
        self._session = Session(
            mesh=mesh,
            sites=sites,
            exclude=exclude,
            cache_dir=cache_dir,
            config=config,
            kernels=kernels,
            options=options,
        )
        self._trainer: Trainer | None = None
        self._resume: Path | None = None
        self._left_out: LeftOut | None = None
        self._judged = 0
        """Step of the last boundary."""

    @property
    def growth(self) -> Growth | None:
        """The session."""
        return self._session.growth

    # ---- begin and end -----------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer is made; a callback is not told which, so who holds its state is asked for."""
        del control, kwargs
        if args.n_gpu > 1:
            raise InvalidInput(
                f"GrowthCallback: expected one device to a process, found {args.n_gpu}: start one process for each, "
                "as torchrun does"
            )
        holders = gc.get_referrers(state)
        holders += gc.get_referrers(*(holder for holder in holders if type(holder) is dict))
        trainer = next(h for h in holders if isinstance(h, Trainer) and h.state is state)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InvalidInput(
                "GrowthCallback: expected one process or DistributedDataParallel, found FSDP or DeepSpeed"
            )
        self._trainer = trainer
        train, create_scheduler, training_step = trainer.train, trainer.create_scheduler, trainer.training_step

        def training(resume_from_checkpoint: str | bool | None = None, *more: Any, **options: Any) -> Any:
            return self._train(train, resume_from_checkpoint, *more, **options)

        def scheduling(*given: Any, **options: Any) -> Any:
            scheduler = create_scheduler(*given, **options)
            if self._left_out is not None:
                self._begin(trainer)
            return scheduler

        def stepping(*given: Any, **options: Any) -> Tensor:
            loss: Tensor = training_step(*given, **options)
            self._session.saw(loss)
            return loss

        trainer.train, trainer.create_scheduler, trainer.training_step = training, scheduling, stepping

    def _train(self, train: Callable[..., Any], resume: str | bool | None, *more: Any, **options: Any) -> Any:
        trainer = self._trainer
        assert trainer is not None
        if resume is True:
            resume = get_last_checkpoint(trainer.args.output_dir)
            if resume is None:
                resume = True  # the Trainer's own error says it best
        self._resume = Path(resume) if isinstance(resume, str) else None
        self._judged = 0
        # The weights of a checkpoint are loaded before the optimizer is made of what the model has.
        self._left_out = LeftOut(trainer.model)
        try:
            return train(resume, *more, **options)
        finally:
            self._stop_leaving_out()
            self._session.close()

    def _stop_leaving_out(self) -> None:
        if self._left_out is not None:
            self._left_out.remove()
            self._left_out = None

    def _begin(self, trainer: Trainer) -> None:
        """The optimizer and its scheduler are there, and their states are not loaded yet."""
        optimizer = unwrapped(trainer.optimizer)
        assert self._left_out is not None
        left_out = self._left_out.names
        self._stop_leaving_out()
        state, moments = self._earlier(optimizer, left_out)
        self._session.begin(
            trainer.model,
            optimizer,
            state,
            validate=self._validate if trainer.eval_dataset is not None else None,
            total_steps=trainer.state.max_steps or None,
        )
        if moments is not None:
            optimizer.load_state_dict(moments)

    def _earlier(self, optimizer: Any, left_out: list[str]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """What to go on with: of the checkpoint, of an earlier training with this callback, or nothing."""
        last = self.growth
        moments = optimizer.state_dict() if last is not None and last.optimizer is optimizer else None
        mine = self._session.take_out()
        if self._resume is None:
            return mine, moments
        path = self._resume / FILE
        if path.is_file():
            return torch.load(path, weights_only=True, map_location="cpu"), None
        if left_out:
            raise InvalidInput(f"{path}: expected growth's state beside the seeds in the weights, found no such file")
        return None, None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The session was made before the optimizer's state was loaded."""
        del args, state, control, kwargs
        if self._trainer is None:
            raise InvalidInput("GrowthCallback: expected in Trainer(callbacks=[...]), found it added later")
        if self._left_out is not None:
            raise InvalidInput("GrowthCallback: expected the Trainer to call create_scheduler(), found it replaced")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the Trainer has gone back to the weights of its best checkpoint: to the seeds of that, too."""
        del control, kwargs
        if not args.load_best_model_at_end or state.best_model_checkpoint is None or self.growth is None:
            return
        path = Path(state.best_model_checkpoint) / FILE
        if path.is_file():
            best = torch.load(path, weights_only=True, map_location="cpu")
            self._session.structure(self.growth.model, best)

    # ---- steps and boundaries ----------------------------------------------------------------------------------------

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After an optimizer step."""
        del args, state, control, kwargs
        # The Trainer has divided each loss by the number of backward passes, or of items, already.
        self._session.step(mean=False)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """A boundary; of several evaluation sets the first counts."""
        del args, control, kwargs
        found = metrics or {}
        loss = next((value for name, value in found.items() if name.endswith("_loss")), None)
        accuracy = next((value for name, value in found.items() if name.endswith("accuracy")), None)
        given = {"loss": loss, "accuracy": accuracy, "epoch": state.epoch}
        self._boundary(state, {name: value for name, value in given.items() if value is not None})

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A boundary where the training has no evaluation."""
        del control, kwargs
        if args.eval_strategy == "no" and state.epoch is not None:
            self._boundary(state, {"epoch": state.epoch})

    def _boundary(self, state: TrainerState, metrics: dict[str, float]) -> None:
        trainer = self._trainer
        if trainer is None or self.growth is None or not trainer.is_in_train or state.global_step == self._judged:
            return
        self._judged = state.global_step
        self.growth.boundary(metrics)
        trainer.log(self._session.figures())

    def _validate(self) -> dict[str, list[float]]:
        """The evaluation once more, a loss per batch."""
        trainer = self._trainer
        assert trainer is not None
        model, data = trainer.model, trainer.eval_dataset
        losses = []
        with untouched(model):
            model.eval()
            for inputs in trainer.get_eval_dataloader(next(iter(data)) if isinstance(data, dict) else None):
                loss, *_ = trainer.prediction_step(model, inputs, prediction_loss_only=True)
                if loss is None:
                    raise InvalidInput("evaluation: expected labels, and a model that returns a loss, found none")
                losses.append(float(loss.mean()))
        return {"loss": losses}

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Beside what the Trainer has just saved."""
        del control, kwargs
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.growth is None or not args.should_save:
            return
        if folder.is_dir():
            torch.save(self.growth.state_dict(), folder / FILE)
        else:
            _log.warning("growth not saved", expected=str(folder), why="the Trainer has saved its checkpoint elsewhere")
