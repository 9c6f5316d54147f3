"""Causal byte transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from torch import Tensor, nn

from esper.tolaria.config_task import MAX_CONTEXT

if TYPE_CHECKING:
    from esper.tolaria.config import TransformerHost

__all__ = ["ByteTransformer"]

SYMBOLS = 256
LONGEST = MAX_CONTEXT


class CausalAttention(nn.Module):
    """Self-attention that looks back only: x_NTC to y_NTC."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NTC: Tensor) -> Tensor:  # noqa: N803  # shape suffix
        """Mixed positions."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_NTC).chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class CausalBlock(nn.Module):
    """Pre-normalised attention and feed-forward, each around a shortcut."""

    def __init__(self, config: TransformerHost) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalAttention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.feed_forward), nn.GELU(), nn.Linear(config.feed_forward, config.width)
        )

    def forward(self, x_NTC: Tensor) -> Tensor:  # noqa: N803  # shape suffix
        """Features of the next depth."""
        h = x_NTC + self.attention(self.attention_norm(x_NTC))
        y: Tensor = h + self.mlp(self.mlp_norm(h))
        return y


class ByteTransformer(nn.Module):
    """Bytes x_NT to logits_NTV of the byte that follows each position, V = 256; output weights are the embedding's."""

    def __init__(self, config: TransformerHost) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, config.width)
        self.position = nn.Parameter(torch.zeros(LONGEST, config.width))
        self.blocks = nn.Sequential(*(CausalBlock(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, x_NT: Tensor) -> Tensor:  # noqa: N803  # shape suffix
        """Logits."""
        h = self.embedding(x_NT) + self.position[: x_NT.shape[1]]
        h = self.norm(self.blocks(h))
        return F.linear(h, self.embedding.weight)
