"""Convolutional host for 8 x 8 images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F  # noqa: N812  # torch's own convention
from torch import Tensor, nn

if TYPE_CHECKING:
    from esper.tolaria.config import ConvHost

__all__ = ["ConvNet"]

CLASSES = 10


class ConvNet(nn.Module):
    """Stem, a body whose middle is narrow, pooling, linear head: x_N1HW to logits_NK, K = 10."""

    def __init__(self, config: ConvHost) -> None:
        super().__init__()
        stem, narrow, wide = config.stem_channels, config.narrow_channels, config.body_channels
        self.stem = nn.Conv2d(1, stem, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(stem, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, wide, 3, padding=1))
        self.head = nn.Linear(wide * config.pooled_extent**2, CLASSES)
        self.pooled_extent = config.pooled_extent

    def forward(self, x_N1HW: Tensor) -> Tensor:  # noqa: N803  # shape suffix
        """Logits."""
        h = F.max_pool2d(F.relu(self.stem(x_N1HW)), 2)
        h = F.max_pool2d(F.relu(self.body(h)), 2)
        if self.pooled_extent == 1:
            h = h.mean((2, 3), keepdim=True)
        logits: Tensor = self.head(h.flatten(1))
        return logits
