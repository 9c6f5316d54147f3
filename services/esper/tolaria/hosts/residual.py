"""Residual convolutional host for 32 x 32 colour images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F  # noqa: N812  # torch's own convention
from torch import Tensor, nn

if TYPE_CHECKING:
    from esper.tolaria.config import ResidualHost

__all__ = ["ResidualNet"]

CLASSES = 10


class Block(nn.Module):
    """Two convolutions with group normalisation around a shortcut; no batch statistics, so that probes are exact."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(1, width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(1, width_out)
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next resolution."""
        h = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(h)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """Stem and three stages, each at half the resolution and twice the width of the one before: x_N3HW to logits_NK."""

    def __init__(self, config: ResidualHost) -> None:
        super().__init__()
        width = config.channels
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_norm = nn.GroupNorm(1, width)
        stages: list[nn.Module] = []
        for stage in range(3):
            out = config.channels * 2**stage
            for block in range(config.blocks):
                stages.append(Block(width, out, 2 if stage and block == 0 else 1))
                width = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x_N3HW: Tensor) -> Tensor:  # noqa: N803  # shape suffix
        """Logits."""
        h = F.relu(self.stem_norm(self.stem(x_N3HW)))
        logits: Tensor = self.head(self.stages(h).mean((2, 3)))
        return logits
