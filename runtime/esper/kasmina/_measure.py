"""Runs the user's validation, with seeds on and off, and leaves the host as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsFloat

import torch

from esper.kasmina._quiet import untouched
from esper.kasmina.counterfactual import paired
from esper.kasmina.distributed import ALONE
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from torch import nn

    from esper.kasmina._seed import SeedRun
    from esper.kasmina.distributed import Ranks

__all__ = ["Measurer", "Validation", "read_validation"]

_log = get_logger("esper.kasmina.growth")


@dataclass(frozen=True, slots=True)
class Validation:
    """Result of one pass over held-out data; None where not given."""

    loss: float | None
    """Mean over batches."""
    accuracy: float | None
    epoch: float | None
    losses: tuple[float, ...] | None
    """One per batch."""


def read_validation(found: object) -> Validation:
    """Read what a loop gave: a mapping with numbers or a loss per batch, or the losses alone.

    Raises:
        InvalidInput: it is neither, or a value is no number.
    """
    if found is None:
        return Validation(None, None, None, None)
    try:
        if isinstance(found, Mapping):
            loss, losses = _loss(found.get("loss"))
            return Validation(loss, _number(found.get("accuracy")), _number(found.get("epoch")), losses)
        loss, losses = _loss(found)
        return Validation(loss, None, None, losses)
    except (TypeError, ValueError) as error:
        kind = type(found).__name__
        raise InvalidInput(
            f"validation: expected a mapping with loss and accuracy, or losses per batch, found {kind}: {error}"
        ) from error


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        raise TypeError(f"expected a number, found {type(value).__name__}")
    return float(value)


def _loss(value: object) -> tuple[float | None, tuple[float, ...] | None]:
    if isinstance(value, str):
        raise TypeError("expected a number or numbers, found a text")
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        value = value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, torch.Tensor):
        losses = tuple(float(item) for item in value)
        return (sum(losses) / len(losses) if losses else None), losses
    return _number(value), None


def joined(found: Sequence[Validation]) -> Validation:
    """One validation of those of all ranks: every batch counts once; ranks that all saw the same batches count once."""
    losses = [v.losses for v in found if v.losses is not None]
    same = all(loss == losses[0] for loss in losses)
    every = tuple(losses[0] if same else (value for own in losses for value in own)) if losses else None
    means = [v.loss for v in found if v.loss is not None]
    accuracies = [v.accuracy for v in found if v.accuracy is not None]
    return Validation(
        (sum(every) / len(every) if every else None)
        if every is not None
        else sum(means) / len(means)
        if means
        else None,
        sum(accuracies) / len(accuracies) if accuracies else None,
        found[0].epoch,
        every,
    )


class Measurer:
    """Counterfactuals of seeds, by repeating the user's validation.

    Args:
        model: the host.
        confidence: of the lower bound.
        validate: a validation that may be repeated; one that `validate` is called with takes its place.
        ranks: each validates what it has; what counts is all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        confidence: float,
        validate: Callable[[], object] | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._confidence = confidence
        self._validate = validate
        self._on: tuple[float, ...] | None = None
        self.passes = 0
        """Validations run for measuring alone."""
        self._said = False

    @property
    def possible(self) -> bool:
        """True where there is a validation to repeat."""
        return self._validate is not None

    def validate(self, validate: Callable[[], object]) -> Validation:
        """Run a validation of the network as it is, and keep it for measuring."""
        self._validate = validate
        found = self._run()
        self._on = found.losses
        return found

    def repeat(self) -> None:
        """Run the validation for those who watch its forwards; what it finds is not kept."""
        self._run()
        self.passes += 1

    def forget(self) -> None:
        """The network has changed: the losses with all seeds on must be taken anew."""
        self._on = None

    def measure(self, run: SeedRun) -> None:
        """Set ``run.counterfactual`` to what was measured just now, or to None."""
        run.counterfactual = None
        if self._validate is None or run.attachment is None:
            return
        if self._on is None:
            self._on = self._run().losses
            self.passes += 1
        run.attachment.seed.enabled = False
        try:
            off = self._run().losses
        finally:
            run.attachment.seed.enabled = True
        self.passes += 1
        if off is not None and self._on is not None:
            run.counterfactual = paired(off, self._on, self._confidence)
        if run.counterfactual is None and not self._said:
            self._said = True
            _log.warning(
                "counterfactual not measured: expected equally many finite losses, one per batch, from each validation",
                off=None if off is None else len(off),
                on=None if self._on is None else len(self._on),
            )

    def _run(self) -> Validation:
        assert self._validate is not None
        with untouched(self._model), torch.no_grad():
            return self.share(self._validate)

    def share(self, validate: Callable[[], object]) -> Validation:
        """What all ranks found; what one raises ends it on all."""
        found = self._ranks.together(lambda: read_validation(validate()))
        return found[0] if len(found) == 1 else joined(found)
