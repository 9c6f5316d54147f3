"""Networks written in plain torch, as people write them: feed-forward, convolutional, recurrent, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from loadtests.zoo._host import Host, images, numbers, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtests.zoo._host import Batch

__all__ = ["HOSTS"]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


class _Dense(nn.Module):
    """Each layer is given all features before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(torch.relu(layer(torch.cat(features, 1))))
        logits: Tensor = self.head(torch.cat(features, 1).mean((2, 3)))
        return logits


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.SiLU())
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.down1(x))
        deep = self.middle(torch.relu(self.down2(first)))
        mask: Tensor = self.out(torch.cat([first, self.up(deep)], 1))
        return mask


class _TimedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(2, outputs)
        self.time = nn.Linear(8, outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return functional.silu(self.norm(self.conv(x)) + self.time(time)[:, :, None, None])


class _Diffusion(nn.Module):
    """Predicts noise at a time step: blocks with two inputs, attention at the coarsest scale."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.down = nn.ModuleList([_TimedBlock(3, 8), _TimedBlock(8, 8)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ModuleList([_TimedBlock(16, 8), _TimedBlock(16, 8)])
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] * torch.exp(-torch.arange(4.0))
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        skips = []
        for block in self.down:
            x = block(x, time)
            skips.append(x)
            x = functional.avg_pool2d(x, 2)
        flat = x.flatten(2).transpose(1, 2)
        x = x + self.attention(flat, flat, flat, need_weights=False)[0].transpose(1, 2).view_as(x)
        for block in self.up:
            x = block(torch.cat([functional.interpolate(x, scale_factor=2.0), skips.pop()], 1), time)
        noise: Tensor = self.out(x)
        return noise


class _Recurrent(nn.Module):
    """Token ids through a recurrent network to a class."""

    def __init__(self, make: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(40, 8), make(), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.body(self.embed(ids))
        logits: Tensor = self.head(states[:, -1])
        return logits


class _CellLoop(nn.Module):
    """A cell called once per position."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        logits: Tensor = self.head(state)
        return logits


class _ConvLSTM(nn.Module):
    """Gates by a convolution that runs once per frame."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = nn.Conv2d(3 + 4, 16, 3, padding=1), nn.Conv2d(4, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        h = c = frames.new_zeros(len(frames), 4, *frames.shape[3:])
        for t in range(frames.shape[1]):
            i, f, o, g = self.gates(torch.cat([frames[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        out: Tensor = self.head(h)
        return out


class _Packed(nn.Module):
    """Sequences of several lengths in one packed batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.head = nn.Linear(5, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            torch.relu(self.first(x)), torch.tensor([x.shape[1], x.shape[1] - 2]), batch_first=True
        )
        _, (state, _) = self.lstm(packed)
        logits: Tensor = self.head(state[-1])
        return logits


class _EncoderDecoder(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Transformer(16, 2, 1, 1, 24, dropout=0.1, batch_first=batch_first)
        self.head = nn.Linear(16, 40)
        self.batch_first = batch_first

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.embed(source), self.embed(target)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        if not self.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        logits: Tensor = self.head(self.body(x, y, tgt_mask=mask))
        return logits


class _TiedDecoder(nn.Module):
    """A small GPT whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(40, 16), nn.Parameter(0.02 * torch.randn(1, 32, 16))
        layers = (nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True) for _ in range(2))
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[:, : ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Mixer(nn.Module):
    """MLPs over positions and over features in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.positions = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.features = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.norm1, self.norm2, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.positions(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.features(self.norm2(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


class _Dilated(nn.Module):
    """Gated causal convolutions with growing holes, as in WaveNet."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(2, 8, 1)
        self.filters = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
        self.leave = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        total = torch.zeros_like(x)
        for i, (gate, skip) in enumerate(zip(self.filters, self.skips, strict=True)):
            left, right = gate(functional.pad(x, (2**i, 0))).chunk(2, 1)
            step = skip(left.tanh() * right.sigmoid())
            x, total = x + step, total + step
        out: Tensor = self.leave(total)
        return out


class _PointNet(nn.Module):
    """A function of each point, and the largest value over them."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 16, 1))
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.points(x).amax(2))
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 4), nn.ReLU(), nn.Linear(4, 5))


def _cnn() -> nn.Module:
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def _resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, _Residual(8), _Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _volumes() -> nn.Module:
    body = [nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 3, stride=2, padding=1)]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 5))


def _super_resolution() -> nn.Module:
    body = [nn.Conv2d(3, 8, 5, padding=2), nn.PReLU(8), nn.Conv2d(8, 12, 3, padding=1)]
    return nn.Sequential(*body, nn.PixelShuffle(2))


def _denoising() -> nn.Module:
    down = [nn.Conv1d(1, 6, 4, stride=2, padding=1), nn.ReLU(), nn.Conv1d(6, 8, 4, stride=2, padding=1), nn.ReLU()]
    up = [nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose1d(6, 1, 4, stride=2, padding=1)]
    return nn.Sequential(nn.Sequential(*down), nn.Sequential(*up))


def _moved(generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 16, 16, generator=generator), "timesteps": torch.tensor([3.0, 40.0])}


def _host(name: str, family: str, build: Callable[[], nn.Module], draw: Batch) -> Host:
    return Host(name, "torch", family, build, draw)


HOSTS = (
    _host("mlp", "feed-forward", _mlp, numbers("0", 8, 12)),
    _host("cnn", "convolutional", _cnn, images("0", 16)),
    _host("residual cnn", "convolutional", _resnet, images("0", 16)),
    _host("dense cnn", "convolutional", _Dense, images("0", 16)),
    _host("super-resolution (pixel shuffle)", "convolutional", _super_resolution, images("0", 8)),
    _host("3-d cnn", "convolutional", _volumes, numbers("0", 2, 1, 6, 8, 8)),
    _host("1-d denoising autoencoder", "autoencoder", _denoising, numbers("0", 2, 1, 16)),
    _host("dilated causal 1-d cnn", "convolutional", _Dilated, numbers("0", 2, 2, 12)),
    _host("u-net", "u-net", _UNet, images("0", 16)),
    _host("diffusion u-net", "diffusion", _Diffusion, _moved),
    _host("mlp-mixer", "feed-forward", _Mixer, images("0", 16)),
    _host("pointnet", "points", _PointNet, numbers("0", 4, 3, 10)),
    _host(
        "bidirectional lstm",
        "recurrent",
        lambda: _Recurrent(lambda: nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True), 16),
        tokens("0"),
    ),
    _host("gru", "recurrent", lambda: _Recurrent(lambda: nn.GRU(8, 8, batch_first=True), 8), tokens("0")),
    _host("gru cell in a loop", "recurrent", _CellLoop, numbers("0", 3, 5, 5)),
    _host("convolutional lstm", "recurrent", _ConvLSTM, numbers("0", 2, 3, 3, 8, 8)),
    _host("lstm over packed sequences", "recurrent", _Packed, numbers("0", 2, 6, 5)),
    _host("transformer encoder", "text encoder", _encoder, numbers("0", 2, 6, 16)),
    _host("transformer", "encoder-decoder", lambda: _EncoderDecoder(batch_first=True), tokens("0", "1")),
    _host(
        "transformer, positions first", "encoder-decoder", lambda: _EncoderDecoder(batch_first=False), tokens("0", "1")
    ),
    _host("decoder with a tied head", "text decoder", _TiedDecoder, tokens("0")),
)
