"""Hosts whose training steps are timed: common networks at sizes that people train on one machine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.dormant_equality import Residual

__all__ = ["HOSTS", "StepHost", "llama_1b"]

_GPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class StepHost:
    """A network, a batch for it, and its loss."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    """Batch size to inputs and labels."""
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    batches: tuple[int, ...]
    """Batch sizes to measure."""
    site: str
    """Where an active seed is measured; the module's output is what the site adapts. Empty where it is not."""

    def make(self) -> nn.Module:
        """The network, the same weights each time."""
        torch.manual_seed(0)
        return self.build()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        """One training step; its loss."""
        optimizer.zero_grad()
        loss = self.loss(model, x, y)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        return loss


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def _cnn() -> nn.Module:
    stem = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    stages = [Residual(32), nn.MaxPool2d(2), Residual(32), nn.MaxPool2d(2), Residual(32)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(256, 256))


def _gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel(GPT2Config())
    return model


def llama_1b() -> nn.Module:
    """A decoder of 1.1 billion parameters; on the meta device where that is the default one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
    )
    return model


def _random(*shape: int, classes: int, labels: tuple[int, ...] = ()) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(size, *shape, generator=generator)
        return x, torch.randint(0, classes, (size, *labels), generator=generator)

    return batch


def _tokens(size: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 50_000, (size, _GPT_TOKENS), generator=torch.Generator().manual_seed(size))
    return tokens, tokens


def _classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def _model_language(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=x, labels=y).loss
    return loss


HOSTS: tuple[StepHost, ...] = (
    StepHost("MLP", _mlp, _random(784, classes=10), _classify, (1, 256), "2"),
    StepHost("CNN", _cnn, _random(3, 32, 32, classes=10), _classify, (1, 64), "5"),
    StepHost(
        "transformer", _transformer, _random(32, 256, classes=256, labels=(32,)), _classify, (1, 16), "0.layers.1"
    ),
    StepHost("GPT of 124 million parameters", _gpt, _tokens, _model_language, (1,), ""),
)
"""Those of the table of numbers."""
