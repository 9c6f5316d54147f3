"""Data of the recipes: train, validation and test strictly apart, in an order that is a pure function of seed and step.

A data set is asked for the batch of an (epoch, index) and remembers nothing between two calls that matters: the
position in the data is the step count alone, so a resumed run sees exactly the batches that an uninterrupted one
would have seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.tolaria.config import Cifar10Data, Data, DigitsData

if TYPE_CHECKING:
    from esper.tolaria.data.base import Dataset

__all__ = ["load"]


def load(config: Data, seed: int) -> Dataset:
    """Read the data of a run.

    Args:
        config: which data, and how it is cut.
        seed: of the order of training batches and of augmentation; the cut does not depend on it.

    Raises:
        esper.mesh.errors.Conflict: DATA_MISSING, with what is missing, where it was looked for and how to give it.
    """
    # Late: only one of them is needed, and scikit-learn takes half a second to import.
    if isinstance(config, DigitsData):
        from esper.tolaria.data.digits import Digits

        return Digits(config, seed)
    if isinstance(config, Cifar10Data):
        from esper.tolaria.data.cifar10 import Cifar10

        return Cifar10(config, seed)
    from esper.tolaria.data.stdlib import StdlibText

    return StdlibText(config, seed)
