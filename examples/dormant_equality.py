"""Shows that a model with dormant seeds is the bare model, bit for bit.

Each host is built twice from the same random state, wrapped once, and trained for three steps on the same batches, two
of them sampled steps on which statistics are taken. Compared exactly: outputs in training and evaluation, gradients,
keys and values of ``state_dict``, types, the state of the optimizer, and that of the random generator.

    python examples/dormant_equality.py
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.kasmina import wrap

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 3


class Residual(nn.Module):
    """Two convolutions with batch norms and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return torch.relu(x + self.body(x))


class Recurrent(nn.Module):
    """Two LSTM layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 24, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 12) -> (N, 5)."""
        states, _ = self.lstm(x)
        logits: Tensor = self.head(states[:, -1])
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 5))


def _resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(*stem, Residual(12), Residual(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(16 * 7, 5))


def _host(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return make


def _batch(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def make(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        return torch.randn(16, *shape, generator=generator), torch.randint(0, 5, (16,), generator=generator)

    return make


HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (_host(_mlp), _batch(20)),
    "resnet": (_host(_resnet), _batch(3, 8, 8)),
    "transformer": (_host(_transformer), _batch(7, 16)),
    "lstm": (_host(Recurrent), _batch(9, 12)),
}
"""Name to (a function that builds the host, a function from step to inputs and labels)."""


def _train(name: str, *, wrapped: bool) -> dict[str, list[Tensor]]:
    make, batch = HOSTS[name]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    growth = wrap(model, optimizer, sample_every=1) if wrapped else None
    torch.manual_seed(1)
    seen: dict[str, list[Tensor]] = {"outputs": [], "gradients": [], "evaluation": []}
    for step in range(STEPS):
        x, labels = batch(step)
        optimizer.zero_grad()
        output = model(x)
        loss = nn.functional.cross_entropy(output, labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        seen["outputs"].append(output.detach())
        seen["gradients"] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        if growth is not None:
            growth.step(loss)
            growth.boundary({"loss": float(loss.detach())})
        model.eval()
        with torch.no_grad():
            seen["evaluation"].append(model(x))
        model.train()
    if growth is not None and not growth.sites:
        raise RuntimeError(f"{name}: expected sites to be found, found none")
    if growth is not None:
        growth.close()
    state = model.state_dict()
    seen["state"] = list(state.values())
    seen["optimizer"] = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    seen["random"] = [torch.get_rng_state()]
    seen["keys"] = [torch.tensor([ord(c) for key in state for c in key])]
    seen["types"] = [torch.tensor([ord(c) for m in model.modules() for c in type(m).__qualname__])]
    return seen


def compare(name: str) -> dict[str, bool]:
    """What was compared, and whether it was equal in every bit."""
    bare, wrapped = _train(name, wrapped=False), _train(name, wrapped=True)
    return {
        what: len(bare[what]) == len(wrapped[what])
        and all(torch.equal(a, b) for a, b in zip(bare[what], wrapped[what], strict=True))
        for what in bare
    }


def main() -> int:
    """Print the table; 1 where anything differs."""
    results = {name: compare(name) for name in HOSTS}
    columns = list(next(iter(results.values())))
    print("host".ljust(12), *(column.ljust(10) for column in columns))
    for name, equal in results.items():
        print(name.ljust(12), *(("identical" if equal[column] else "DIFFERS").ljust(10) for column in columns))
    return 0 if all(all(equal.values()) for equal in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
