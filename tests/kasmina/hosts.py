"""Small hosts, kernels and policies shared by the tests of the growth core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.control import Action, BlendStrategy, Decision, KernelChoice, Stage
from esper.kasmina.signature import Layout, Signature

__all__ = [
    "MLP",
    "TinyKernel",
    "blobs",
    "choice",
    "decide",
    "mlp",
    "small_cnn",
    "small_lstm",
    "small_transformer",
]


@dataclass(frozen=True)
class TinyManifest:
    """The part of a manifest that the runtime reads."""

    signature: Signature
    birth: str
    parameter_count: int
    causal: bool = False
    flops_per_position: int = 100


class TinyDelta(nn.Module):
    """A bottleneck over the feature dimension, for any layout."""

    def __init__(self, signature: Signature, birth: str, width: int = 8) -> None:
        super().__init__()
        dtype = getattr(torch, signature.dtype)
        self.dim = signature.layout.feature_dim
        generator = torch.Generator().manual_seed(7)
        down = torch.randn(width, signature.in_features, generator=generator) / signature.in_features**0.5
        up = torch.randn(signature.out_features, width, generator=generator) / width**0.5
        self.down = nn.Parameter(down.to(dtype))
        self.up = nn.Parameter((up * (0.0 if birth == "zero" else 0.1)).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) along the feature dimension."""
        inner = torch.tanh(x.movedim(self.dim, -1) @ self.down.T)
        return (inner @ self.up.T).movedim(-1, self.dim)


class BrokenDelta(TinyDelta):
    """Fails in the forward once it has been told to."""

    broken = False

    def forward(self, x: Tensor) -> Tensor:
        """As its base, or an error."""
        if type(self).broken:
            raise RuntimeError("native code says no")
        return super().forward(x)


@dataclass
class TinyKernel:
    """A kernel whose module is plain torch."""

    id: str
    signature: Signature
    birth: str = "zero"
    causal: bool = False
    delta: type[TinyDelta] = TinyDelta
    made: list[nn.Module] = field(default_factory=list)

    @property
    def manifest(self) -> TinyManifest:
        """What it is."""
        count = sum(p.numel() for p in self.delta(self.signature, self.birth).parameters())
        return TinyManifest(self.signature, self.birth, count, self.causal)

    def instantiate(self, device: torch.device | str = "cpu") -> nn.Module:
        """A fresh module."""
        module = self.delta(self.signature, self.birth).to(device)
        self.made.append(module)
        return module


class Residual(nn.Module):
    """Two convolutions with batch norms and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


class LSTMHost(nn.Module):
    """Tokens to one class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, 3)."""
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states[:, -1])


class MLP(nn.Module):
    """Two hidden layers, the second of one unit."""

    def __init__(self, inputs: int = 8, wide: int = 16, narrow: int = 1, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, wide)
        self.second = nn.Linear(wide, narrow)
        self.head = nn.Linear(narrow, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def mlp(seed: int = 0) -> MLP:
    """A host whose weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return MLP()


def small_cnn(seed: int = 0) -> nn.Sequential:
    """ResNet-like, for (N, 3, 8, 8)."""
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return nn.Sequential(stem, Residual(8), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def small_transformer(seed: int = 0) -> nn.Sequential:
    """Encoder over (N, T, 16) with a head per position; the fast path is possible in evaluation."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 5))


def small_lstm(seed: int = 0) -> LSTMHost:
    """LSTM over tokens (N, T) below 11."""
    torch.manual_seed(seed)
    return LSTMHost()


def blobs(count: int = 256, inputs: int = 8, classes: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The largest of four linear functions: easy for a branch around a layer of one unit, hard through it."""
    rule = torch.randn(inputs, classes, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))
    return x, (x @ rule).argmax(1)


def choice(
    kernel_id: str, *, blend: BlendStrategy = BlendStrategy.IMMEDIATE, steps: int = 10, scale: float = 3.0
) -> KernelChoice:
    """The kernel of a GERMINATE decision."""
    return KernelChoice(
        kernel_id=kernel_id, blueprint_name="tiny", blend=blend, blend_steps=steps, learning_rate_scale=scale
    )


def decide(boundary: int, seed: int, action: Action, **more: Any) -> Decision:
    """A decision with the least to say."""
    to = more.get("to_stage")
    return Decision(
        **{
            "decision_id": f"t/{boundary}/{seed}/{action.value}/{'' if to is None else Stage(to).name}",
            "boundary": boundary,
            "seed": seed,
            "action": action,
            "reason": "TEST",
            "explanation": "because the test says so",
            **more,
        }
    )


def vector(inputs: int, outputs: int) -> Signature:
    """(N, inputs) -> (N, outputs)."""
    return Signature(Layout.VECTOR, inputs, outputs)
