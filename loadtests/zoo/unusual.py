"""Networks in plain torch that break an adapter's assumptions: outputs, control flow, sharing, parameters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from loadtests.zoo._host import Host, images, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtests.zoo._host import Batch

__all__ = ["HOSTS"]


class _Variational(nn.Module):
    """Gives (reconstruction, mean, log variance)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.encoder(x))
        mean, spread = self.mean(h), self.spread(h)
        z = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        return self.decoder(z), mean, spread


@dataclass
class _Answer:
    hidden: Tensor
    name: str = "answer"


class _Structured(nn.Module):
    """A block whose output is a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> _Answer:
        return _Answer(self.second(torch.tanh(self.first(x))))


class _Pair(NamedTuple):
    weight: Tensor
    features: Tensor


class _Named(nn.Module):
    """A block whose output is a named tuple that begins with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.inner = nn.Linear(6, 1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> _Pair:
        return _Pair(self.score(x).mean(), self.inner(x))


class _Mapped(nn.Module):
    """A block over a dictionary that gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"left": self.left(x["features"]), "right": self.right(x["features"])}


class _Outputs(nn.Module):
    """A dataclass, a named tuple and a dictionary between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.structured, self.named, self.mapped = _Structured(), _Named(), _Mapped()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pair = self.named(self.structured(x).hidden)
        sides: dict[str, Tensor] = self.mapped({"features": pair.features * pair.weight})
        return sides


class _Early(nn.Module):
    """Stops when it is sure enough: the number of layers depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
            if float(x.detach().mean()) > 0.2:
                break
        logits: Tensor = self.head(x)
        return logits


class _Dropped(nn.Module):
    """Skips whole layers at random, by Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or random.random() < 0.7:
                x = x + torch.tanh(layer(x))
        logits: Tensor = self.head(x)
        return logits


class _Routed(nn.Module):
    """Each sample goes to one of two experts; an expert may be left without any."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(1)
        chosen, out = shares.argmax(1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * shares[rows, i, None])
        return out


class _Siamese(nn.Module):
    """One encoder called for both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return functional.cosine_similarity(self.encoder(left), self.encoder(right))


class _Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        velocity: Tensor = self.layers(torch.cat([x, time.expand(len(x), 1)], 1))
        return velocity


class _Flow(nn.Module):
    """A neural differential equation, solved by fourth-order Runge-Kutta: one network called many times."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = _Field(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for step in range(2):
            time = torch.tensor(step / 2)
            a = self.field(time, x)
            b = self.field(time + 0.25, x + 0.25 * a)
            c = self.field(time + 0.25, x + 0.25 * b)
            d = self.field(time + 0.5, x + 0.5 * c)
            x = x + (a + 2 * b + 2 * c + d) / 12
        logits: Tensor = self.head(x)
        return logits


class _Pyramid(nn.Module):
    """A list of scales, and one head that is called at each, with another extent each time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = [torch.relu(self.stem(x))]
        scales.append(functional.avg_pool2d(scales[0], 2))
        return [self.head(scale) for scale in scales]


class _Iterating(nn.Module):
    """Runs its children in order, by a helper."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def _run(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 8), _Iterating(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(x)))
        return logits


class _Recomputed(nn.Module):
    """Its blocks are run again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8)) for _ in range(2))
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        logits: Tensor = self.head(x)
        return logits


class _Recommender(nn.Module):
    """Bags of ids in embeddings, crossed with numbers, as in DLRM."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 6, mode="sum") for _ in range(2))
        self.bottom = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        parts = [self.bottom(dense), *(bag(ids[:, i]) for i, bag in enumerate(self.bags))]
        stacked = torch.stack(parts, 1)
        crossed = stacked @ stacked.transpose(1, 2)
        pairs = [crossed[:, i, j] for i in range(3) for j in range(i)]
        clicks: Tensor = self.top(torch.cat([parts[0], torch.stack(pairs, 1)], 1))
        return clicks


class _Spectral(nn.Module):
    """Multiplies complex weights in the frequencies, as Fourier neural operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(8, 8, 4, dtype=torch.cfloat))
        self.local = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(x)
        mixed = torch.zeros_like(waves)
        mixed[:, :, :4] = torch.einsum("nct,cdt->ndt", waves[:, :, :4], self.weight)
        return functional.gelu(torch.fft.irfft(mixed, n=x.shape[2]) + self.local(x))


class _Raw(nn.Module):
    """All parameters are its own: no module inside could hold a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(4, 8)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class _Gan(nn.Module):
    """Generator and discriminator in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 12), nn.LeakyReLU(0.2), nn.Linear(12, 1))

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        made = self.generator(noise)
        return self.discriminator(made), made


class _Tasks(nn.Module):
    """A trunk and a head for each task, in a dictionary of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 12)
        self.heads = nn.ModuleDict({"depth": nn.Linear(12, 1), "class": nn.Linear(12, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.trunk(x))
        return {name: head(features) for name, head in self.heads.items()}


def _parametrized() -> nn.Module:
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 12))
    return nn.Sequential(first, nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(12, 3)))


def _scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))


def _halves() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)).to(torch.bfloat16)


def _clicks(generator: torch.Generator) -> dict[str, Any]:
    return {
        "dense": torch.randn(4, 4, generator=generator),
        "ids": torch.randint(0, 20, (4, 2, 3), generator=generator),
    }


def _two(generator: torch.Generator) -> dict[str, Tensor]:
    return {"left": torch.randn(4, 8, generator=generator), "right": torch.randn(4, 8, generator=generator)}


def _half_numbers(generator: torch.Generator) -> dict[str, Tensor]:
    return {"0": torch.randn(4, 8, generator=generator).bfloat16()}


def _host(name: str, family: str, build: Callable[[], nn.Module], draw: Batch) -> Host:
    return Host(name, "torch", family, build, draw)


_VECTORS = numbers("0", 4, 8)
HOSTS = (
    _host("variational autoencoder", "autoencoder", _Variational, numbers("0", 4, 12)),
    _host("gan", "adversarial", _Gan, numbers("0", 4, 4)),
    _host("dataclass, named tuple, dictionary", "structured outputs", _Outputs, _VECTORS),
    _host("heads in a dictionary", "structured outputs", _Tasks, _VECTORS),
    _host("feature pyramid (one head, several extents)", "shared modules", _Pyramid, images("0", 8)),
    _host("siamese", "shared modules", _Siamese, _two),
    _host("neural ode", "shared modules", _Flow, numbers("0", 4, 4)),
    _host("early exit", "dynamic control flow", _Early, _VECTORS),
    _host("layers dropped at random", "dynamic control flow", _Dropped, _VECTORS),
    _host("hard routing", "mixture of experts", _Routed, numbers("0", 8, 8)),
    _host("forward over children()", "custom modules", _Wrapped, numbers("0", 4, 6)),
    _host("activation checkpointing", "custom modules", _Recomputed, _VECTORS),
    _host("spectral and weight norm", "custom modules", _parametrized, _VECTORS),
    _host("bfloat16", "custom modules", _halves, _half_numbers),
    _host("recommender (embedding bags)", "recommender", _Recommender, _clicks),
    _host(
        "fourier neural operator",
        "custom modules",
        lambda: nn.Sequential(_Spectral(), _Spectral()),
        numbers("0", 2, 8, 12),
    ),
    _host("parameters without modules", "custom modules", _Raw, _VECTORS),
    _host("torchscript", "custom modules", _scripted, _VECTORS),
)
