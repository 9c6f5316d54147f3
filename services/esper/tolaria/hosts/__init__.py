"""The networks of the recipes. Plain ``nn.Module`` classes that know nothing of growth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from esper.tolaria.config import ConvHost, Host, ResidualHost
from esper.tolaria.hosts.conv import ConvNet
from esper.tolaria.hosts.residual import ResidualNet
from esper.tolaria.hosts.transformer import ByteTransformer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ByteTransformer", "ConvNet", "ResidualNet", "build"]


def build(config: Host, seed: int) -> nn.Module:
    """A host with initial weights that depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, ConvHost):
            return ConvNet(config)
        if isinstance(config, ResidualHost):
            return ResidualNet(config)
        return ByteTransformer(config)
