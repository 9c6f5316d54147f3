"""One architecture of the compatibility suite: how it is built, and what a batch of it looks like."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BART", "SMALL", "Batch", "Host", "images", "library", "numbers", "tokens", "transformer"]

Batch = Callable[[torch.Generator], Mapping[str, Any]]
"""Draws the arguments of one forward, by name; names that are digits are positional, in their order."""


SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
"""Options that most encoders and decoders share."""
BART: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Those of encoder-decoders in the manner of BART."""


@dataclass(frozen=True)
class Host:
    """One architecture with random weights, small enough for a step in some milliseconds."""

    name: str
    library: str
    """Distribution that it comes from."""
    family: str
    """What kind of network it is, for people."""
    build: Callable[[], nn.Module]
    draw: Batch

    def make(self) -> nn.Module:
        """The same weights each time, in training mode."""
        torch.manual_seed(0)
        return self.build().train()

    def batch(self, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments of one forward."""
        drawn = self.draw(torch.Generator().manual_seed(100 + step))
        positional = tuple(value for name, value in drawn.items() if name.isdigit())
        return positional, {name: value for name, value in drawn.items() if not name.isdigit()}


def library(name: str) -> Any:
    """An untyped library, imported when its first host is built."""
    return importlib.import_module(name)


def numbers(name: str, *shape: int) -> Batch:
    """Normal numbers."""
    return lambda generator: {name: torch.randn(shape, generator=generator)}


def images(name: str = "pixel_values", size: int = 32, channels: int = 3) -> Batch:
    """Two images."""
    return numbers(name, 2, channels, size, size)


def tokens(*names: str, length: int = 6, vocabulary: int = 40) -> Batch:
    """Two sequences of token ids for each name."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randint(3, vocabulary, (2, length), generator=generator) for name in names}

    return draw


def transformer(name: str, family: str, model: str, draw: Batch, *, config: str = "", **options: Any) -> Host:
    """A model of `transformers`.

    Args:
        name: of the host.
        family: of the host.
        model: class of the model.
        draw: a batch.
        config: class of the configuration; empty takes that of the model's class.
        options: of the configuration; an option that is a pair (class, options) is a configuration itself.
    """

    def build() -> nn.Module:
        transformers = library("transformers")
        made = getattr(transformers, model)
        given = {
            key: getattr(transformers, value[0])(**value[1])
            if isinstance(value, tuple) and isinstance(value[0], str) and value[0].endswith("Config")
            else value
            for key, value in options.items()
        }
        settings = getattr(transformers, config) if config else made.config_class
        host: nn.Module = made(settings(**given))
        return host

    return Host(name, "transformers", family, build, draw)
