"""What a control plane costs a training loop when it is not there, and when it dies.

    python -m loadtests.bench_control

The same hand-written loop is timed in turn: without Esper; wrapped, with nothing listening at the address of the mesh;
and wrapped beside a real `esper up` that is killed (kill -9) in the middle. Blocks alternate, so that noise of the
machine hits all alike; what counts are the ratios. Growth is not allowed here (no parameters to spend), so that every
variant trains the same network and ends with the same weights, which is checked.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import esper.kasmina
from esper.cli.lock import find_running
from loadtests._report import Report, Target

REPEATS = 5
EPOCHS, STEPS, BATCH = 10, 60, 64
HOOK = Callable[[int], None]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def _data(batches: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, 1, 16, 16, generator=generator), torch.randint(10, (BATCH,), generator=generator))
        for _ in range(batches)
    ]


def train(mesh: str | None, at_epoch: HOOK = lambda _epoch: None) -> tuple[float, str]:
    """Run the loop; seconds of its steps and validations, and the digest of the final weights."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    training, held_out = _data(STEPS, 1), _data(6, 2)
    growth = None
    if mesh is not None:
        growth = esper.kasmina.wrap(model, optimizer, mesh=mesh, parameter_budget=0)

    def validate() -> dict[str, list[float]]:
        with torch.no_grad():
            return {"loss": [nn.functional.cross_entropy(model(x), y).item() for x, y in held_out]}

    spent = 0.0
    for epoch in range(EPOCHS):
        at_epoch(epoch)
        begin = time.perf_counter()
        for x, y in training:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            if growth is not None:
                growth.step(loss)
        if growth is not None:
            growth.boundary(validate)
        else:
            validate()
        spent += time.perf_counter() - begin
    if growth is not None:
        growth.close()
    weights = sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    return spent, weights


class _Mesh:
    """A real mesh in a process of its own."""

    def __init__(self, home: Path) -> None:
        command = [sys.executable, "-m", "esper.cli", "--home", str(home), "up", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while (running := find_running(home)) is None:
            if self.process.poll() is not None:
                raise RuntimeError(f"esper up ended with status {self.process.returncode}")
            time.sleep(0.05)
        self.address = running.address
        time.sleep(8)  # its workers import torch: let that pass before anything is timed

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _dying(folder: Path) -> tuple[float, str]:
    mesh = _Mesh(folder)
    try:
        return train(mesh.address, lambda epoch: mesh.kill() if epoch == EPOCHS // 2 else None)
    finally:
        if mesh.process.poll() is None:
            mesh.kill()


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    report = Report("control", ["torch", "grpcio"])
    train(None)
    plain: list[float] = []
    dead: list[float] = []
    dying: list[float] = []
    digests = set()
    with TemporaryDirectory() as folder:
        for repeat in range(REPEATS):
            variants: list[tuple[list[float], Callable[[], tuple[float, str]]]] = [
                (plain, lambda: train(None)),
                (dead, lambda: train("127.0.0.1:1")),
                (dying, partial(_dying, Path(folder, str(repeat)))),
            ]
            for values, run in variants:
                seconds, digest = run()
                values.append(seconds)
                digests.add(digest)
    sizes: dict[str, Any] = {"steps": EPOCHS * STEPS, "boundaries": EPOCHS, "batch": BATCH}
    report.add("training without Esper", statistics.median(plain), unit="s", runs=plain, **sizes)
    for name, values in (("control plane dead from the start", dead), ("control plane killed in mid-run", dying)):
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        report.add(f"{name} / without Esper", statistics.median(ratios), unit="ratio", runs=ratios,
                   target=Target.below(1.05), **sizes)  # fmt: skip
    report.add(
        "different final weights among all runs", len(digests) - 1, unit="count", target=Target.below(0), **sizes
    )


if __name__ == "__main__":
    main()
