"""Growth in Lightning: one callback.

Typical use::

    trainer = lightning.pytorch.Trainer(callbacks=[GrowthCallback(mesh="localhost:7600")])
    trainer.fit(module, train_loader, validation_loader)                    # also with ckpt_path="last"

A boundary is the end of a validation; without one, of a training epoch, and then no seed can be measured. To measure
what a seed is worth, the callback runs ``validation_step`` again over the same data; nothing that is logged there
reaches a logger, and metrics keep their state.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina._quiet import untouched
from esper.kasmina.attach import SeedModule
from esper.kasmina.integrations._session import Session, is_of_a_seed, unwrapped
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

try:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import CombinedLoader
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "esper.kasmina.integrations.lightning: expected lightning 2.6, found none: pip install 'esper[lightning]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lightning.pytorch import Trainer
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from esper.kasmina.config import Config
    from esper.kasmina.control import ControlPlane
    from esper.kasmina.growth import Growth
    from esper.kasmina.integrations._session import Kernels
    from esper.kasmina.sites import Selectors

__all__ = ["GrowthCallback"]

_log = get_logger("esper.kasmina.integrations.lightning")


class GrowthCallback(Callback):  # type: ignore[misc]  # lightning is not followed by the type checker
    """Lets a LightningModule grow; as an entry of ``Trainer(callbacks=[...])``.

    Args:
        mesh: as for `esper.kasmina.wrap`, like `sites`, `exclude`, `cache_dir`, `config` and `options`.
        module: name of the submodule that grows; None takes the outermost one that the training step calls: the
            LightningModule itself for ``self(x)``, a child for ``self.net(x)``.
        monitor: metric that holds the validation loss, by the name under which ``validation_step`` logs it.
        kernels: where the kernels of a resumed run are, by id or as a function of it; None asks the mesh.

    Attributes:
        growth: the session; None until the first training step is done.
    """

    def __init__(
        self,
        *,
        mesh: str | ControlPlane | None = None,
        module: str | None = None,
        monitor: str = "val_loss",
        sites: Selectors | None = None,
        exclude: Selectors | None = None,
        cache_dir: Path | None = None,
        kernels: Kernels | None = None,
        config: Config | None = None,
        **options: Any,
    ) -> None:
        self.module = module
        self.monitor = monitor
        self._session = Session(
            mesh=mesh,
            sites=sites,
            exclude=exclude,
            cache_dir=cache_dir,
            config=config,
            kernels=kernels,
            options=options,
        )
        self._found: str | None = module
        self._state: Mapping[str, Any] | None = None
        self._averaged: dict[str, Tensor] = {}
        """Averages of seeds that a checkpoint held."""
        self._watched: list[RemovableHandle] = []
        self._steps = 0
        self._undo: Callable[[], None] = lambda: None

    @property
    def growth(self) -> Growth | None:
        """The session."""
        return self._session.growth

    # ---- begin and end -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before optimizers are made and weights are loaded."""
        if stage == "fit":
            # Seeds of an earlier fit() must not be in the host's groups of the optimizer that is about to be made.
            state = self._session.take_out()
            if state is not None:
                self._state = {"module": self._found, "growth": state}
        loading = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._before_weights(trainer, pl_module, checkpoint)
            loading(checkpoint)

        # Callbacks are told of a checkpoint when its weights are loaded already; the module is told before.
        pl_module.on_load_checkpoint = on_load_checkpoint

        def undo() -> None:
            pl_module.__dict__.pop("on_load_checkpoint", None)

        self._undo = undo

    def _before_weights(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        found = (checkpoint.get("callbacks") or {}).get(self.state_key)
        weights = checkpoint.get("state_dict", {})
        seeds = [name for name in weights if is_of_a_seed(name)]
        if seeds and not found:
            raise InvalidInput(
                f"checkpoint: expected the state of GrowthCallback beside the seeds in its weights, found {seeds[0]} "
                "alone; was it saved with save_weights_only=True?"
            )
        if trainer.state.fn == TrainerFn.FITTING:
            self._state = found or None
            # They come back with their values when the optimizer is there.
            current = checkpoint.get("current_model_state", {})
            taken = {name: weights.pop(name) for name in seeds}
            self._averaged = taken if current else {}
            for name in filter(is_of_a_seed, list(current)):
                del current[name]
        elif found:
            self._session.structure(_submodule(pl_module, found["module"]), found["growth"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is there, and its state is not loaded yet."""
        if len(trainer.optimizers) != 1:
            raise InvalidInput(f"GrowthCallback: expected one optimizer, found {len(trainer.optimizers)}")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            found = type(trainer.strategy).__name__
            raise InvalidInput(f"GrowthCallback: expected the strategy of a single device or DDP, found {found}")
        state, self._state = self._state, None
        if state is not None:
            self._found = state["module"]
        if self._found is not None:
            self._begin(trainer, pl_module, self._found, None if state is None else state["growth"])
            return
        names = ["", *(name for name, child in pl_module.named_children() if any(True for _ in child.parameters()))]
        self._watched = [_submodule(pl_module, n).register_forward_pre_hook(self._called(trainer, n)) for n in names]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loops have their counts now, those of a checkpoint too."""
        del pl_module
        self._steps = trainer.global_step

    def _called(self, trainer: Trainer, name: str) -> Callable[[nn.Module, Any], None]:
        """A hook that finds the first module that a training step calls."""

        def hook(module: nn.Module, _args: Any) -> None:
            # A strategy that wraps the module goes through its forward to call the training step.
            redirected = "forward" in vars(module)
            if self._found is None and torch.is_grad_enabled() and trainer.training and not redirected:
                self._found = name

        return hook

    def _unwatch(self) -> None:
        for handle in self._watched:
            handle.remove()
        self._watched.clear()

    def _begin(self, trainer: Trainer, pl_module: LightningModule, name: str, state: Mapping[str, Any] | None) -> None:
        steps = trainer.estimated_stepping_batches

        def validate() -> dict[str, list[float]]:
            return self._validate(trainer, pl_module)

        growth = self._session.begin(
            _submodule(pl_module, name),
            unwrapped(trainer.optimizers[0]),
            state,
            validate=validate if trainer.enable_validation else None,
            total_steps=steps if isinstance(steps, int) and steps > 0 else None,
        )
        for callback in trainer.callbacks:
            # The average is a copy of the whole module, by no other name than this.
            average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
            if average is not None:
                growth.follow(_submodule(average.module, name))
                average.module.load_state_dict(self._averaged, strict=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Deliver what is buffered also where training fails."""
        del exception
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the session; `growth` stays to be looked at."""
        del trainer, pl_module, stage
        self._undo()
        self._unwatch()
        self._session.close()

    # ---- steps and boundaries ----------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One backward pass; the last one of an optimizer step is followed by growth's own."""
        del batch, batch_idx
        if self.growth is None and self._found is not None:
            # The forward that showed what to wrap is over: growth sees whole steps only.
            self._unwatch()
            self._begin(trainer, pl_module, self._found, None)
            self._steps = trainer.global_step
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._session.saw(loss if isinstance(loss, torch.Tensor) else None)
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self._session.step(mean=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A boundary, with what the validation has logged."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = trainer.callback_metrics
        loss = metrics.get(self.monitor)
        accuracy = next((value for name, value in metrics.items() if "acc" in name and "train" not in name), None)
        found = {"loss": loss, "accuracy": accuracy, "epoch": trainer.current_epoch + 1}
        self._boundary(trainer, {name: float(value) for name, value in found.items() if value is not None})
        del pl_module

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A boundary where the training has no validation."""
        del pl_module
        if not trainer.enable_validation:
            self._boundary(trainer, {"epoch": trainer.current_epoch + 1})

    def _boundary(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        growth = self.growth
        if growth is None:
            return
        growth.boundary(metrics)
        # After a validation lightning restores the modes of the modules that were there before it.
        for module in growth.model.modules():
            if isinstance(module, SeedModule):
                module.train()
        for logger in trainer.loggers:
            logger.log_metrics(self._session.figures(), step=trainer.global_step)

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, list[float]]:
        """The validation once more, without a trace; a loss per batch."""
        loaders = CombinedLoader(trainer.val_dataloaders, "sequential")
        loaders.limits = trainer.num_val_batches
        several = len(loaders.flattened) > 1
        losses = []
        with untouched(pl_module), _metrics_kept(pl_module), _logging_caught(pl_module) as caught:
            pl_module.eval()
            for batch, index, loader in loaders:
                caught.clear()
                moved = trainer.precision_plugin.convert_input(batch)
                moved = pl_module.on_before_batch_transfer(moved, loader)
                moved = trainer.strategy.batch_to_device(moved, dataloader_idx=loader)
                output = trainer.strategy.validation_step(moved, index, *((loader,) if several else ()))
                losses.append(float(self._loss(output, caught)))
        return {"loss": losses}

    def _loss(self, output: Any, caught: Mapping[str, Any]) -> Tensor | float:
        loss = caught.get(self.monitor)
        if loss is None:
            loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            raise InvalidInput(
                f"validation_step: expected it to log {self.monitor!r} or to return the loss, found neither; "
                "give GrowthCallback the name with monitor="
            )
        found: Tensor | float = loss
        return found

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What lightning saves of the callback."""
        if self.growth is None:
            return dict(self._state or {})
        return {"module": self._found, "growth": self.growth.state_dict()}


def _submodule(pl_module: LightningModule, name: str) -> nn.Module:
    found: nn.Module = pl_module.get_submodule(name)
    return found


@contextmanager
def _logging_caught(pl_module: LightningModule) -> Iterator[dict[str, Any]]:
    """What the module logs goes here, and nowhere else."""
    caught: dict[str, Any] = {}

    def log(name: str, value: Any, *_: Any, **__: Any) -> None:
        caught[name] = value

    def log_dict(values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        caught.update(values)

    pl_module.log, pl_module.log_dict = log, log_dict
    try:
        yield caught
    finally:
        del pl_module.log, pl_module.log_dict


@contextmanager
def _metrics_kept(pl_module: LightningModule) -> Iterator[None]:
    """Give back what metrics have counted."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    kept = [dict(metric.__dict__) | _states(metric) for metric in metrics]
    try:
        yield
    finally:
        for metric, state in zip(metrics, kept, strict=True):
            metric.__dict__.update(state)


def _states(metric: Any) -> dict[str, Any]:
    """Copies of the counters of a metric, which it may change in place."""
    return {
        name: list(value) if isinstance(value, list) else value.clone() for name, value in metric.metric_state.items()
    }
