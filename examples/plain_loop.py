"""A hand-written PyTorch loop that grows: three lines make the difference.

    python examples/plain_loop.py localhost:7600     # beside `esper up`
    python examples/plain_loop.py                    # the same address; without a mesh it trains all the same, dormant

The host is too narrow for its task on purpose: a layer of two units stands in the middle.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import esper.kasmina

EPOCHS = 20
BATCH = 32


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes: the largest of ten linear functions of twenty numbers."""
    rule = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    x = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return x, (x @ rule).argmax(1)


def main(mesh: str, epochs: int = EPOCHS) -> None:
    """Train, validate, and say what grew."""
    torch.manual_seed(0)
    x, y = data(1024, seed=1)
    held_out_x, held_out_y = data(512, seed=2)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2), nn.ReLU(), nn.Linear(2, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def validate() -> dict[str, object]:
        logits = model(held_out_x)
        losses = nn.functional.cross_entropy(logits, held_out_y, reduction="none").view(-1, BATCH).mean(1)
        return {"loss": losses.tolist(), "accuracy": float((logits.argmax(1) == held_out_y).float().mean())}

    growth = esper.kasmina.wrap(  # the first line
        model, optimizer, mesh=mesh, task="plain-loop", total_steps=epochs * len(x) // BATCH, parameter_budget=5000
    )
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(x)).view(-1, BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            growth.step(loss)  # the second
        report = growth.boundary(validate)  # the third
        print(f"epoch {epoch:2}: loss {report.loss:.3f}, accuracy {report.accuracy:.3f}")
        for applied in report.applied:
            what = applied.decision
            print(f"  {what.action} at {growth.sites[what.seed].descriptor.name}: {what.explanation}")
    print(growth.summary())
    growth.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "localhost:7600")
