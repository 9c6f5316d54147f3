"""A LightningModule that grows: one line makes the difference.

    python examples/lightning_loop.py localhost:7600     # beside `esper up`
    python examples/lightning_loop.py                    # the same address; without a mesh it trains all the same

The host is too narrow for its task on purpose: a layer of two units stands in the middle.
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper.kasmina.integrations.lightning import GrowthCallback

EPOCHS = 20


class Narrow(pl.LightningModule):  # type: ignore[misc]  # lightning is not followed by the type checker
    """Twenty numbers to ten classes, through two units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2), nn.ReLU(), nn.Linear(2, 10))

    def _loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Loss of one batch."""
        return self._loss(batch)

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        """Loss of one held-out batch."""
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer; newborns get groups of their own in it."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def data(count: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Ten classes: the largest of ten linear functions of twenty numbers."""
    rule = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x @ rule).argmax(1)), 32)


def main(mesh: str, epochs: int = EPOCHS) -> None:
    """Train, and say what grew."""
    growth = GrowthCallback(mesh=mesh, task="lightning-loop", parameter_budget=5000)  # the line
    trainer = pl.Trainer(
        callbacks=[growth], max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(Narrow(), data(1024, seed=1), data(512, seed=2))
    if growth.growth is not None:
        print(growth.growth.summary())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "localhost:7600")
