"""Noticing a spike, and going back."""

from __future__ import annotations

import copy
import math
import random

import torch
from torch import nn

from esper.kasmina._losses import LossReader, scalar
from esper.kasmina.spikes import HostSnapshot, SpikeDetector


def _ready(**options: float) -> SpikeDetector:
    detector = SpikeDetector(**options)  # type: ignore[arg-type]
    noise = random.Random(0)
    for i in range(64):
        assert not detector.update(2.0 - 0.005 * i + noise.gauss(0, 0.1))
    return detector


def test_noise_is_no_spike() -> None:
    """A noisy loss with a single bad batch now and then raises no alarm while armed."""
    detector, noise = _ready(), random.Random(1)
    detector.arm()
    for i in range(500):
        assert not detector.update(1.7 + noise.gauss(0, 0.1) + (4.0 if i % 10 == 0 else 0.0)), i
    assert (True, 564) == (detector.armed, detector.seen)


def test_a_lasting_rise_is_a_spike() -> None:
    """The loss stays high: the third high one in a row is told with its score."""
    detector = _ready()
    detector.arm()
    assert ["", ""] == [detector.update(6.0), detector.update(6.5)]
    why = detector.update(7.0)
    assert "found " in why
    assert "after 3 high losses" in why
    assert 0 == detector.high


def test_not_finite_is_a_spike_at_once() -> None:
    """NaN and infinity count at once, also before the window is full."""
    for value in (math.nan, math.inf):
        detector = SpikeDetector()
        detector.arm()
        assert "finite" in detector.update(value)


def test_unarmed_never_alarms() -> None:
    """Without a graft nothing is a spike, and disarming ends the watch."""
    detector = _ready()
    assert not detector.update(math.nan)
    detector.arm()
    detector.disarm()
    assert not any(detector.update(100.0) for _ in range(5))


def test_flat_losses() -> None:
    """A loss that does not move at all does not make rounding noise a spike."""
    detector = SpikeDetector(patience=1)
    for _ in range(64):
        detector.update(1.0)
    detector.arm()
    assert not detector.update(1.0 + 1e-4)
    assert detector.update(1.5)


def test_detector_state() -> None:
    """A resumed detector judges as the saved one."""
    detector = _ready()
    detector.arm()
    detector.update(6.0)
    twin = SpikeDetector()
    twin.load_state_dict(copy.deepcopy(detector.state_dict()))
    assert [detector.update(6.0), detector.update(6.0)] == [twin.update(6.0), twin.update(6.0)]
    assert detector.state_dict() == twin.state_dict()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()


def test_snapshot_restores_every_bit() -> None:
    """Parameters, buffers and moments are as at the snapshot; what came since stays; training goes on alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    _train(model, optimizer, 3)
    snapshot = HostSnapshot.take(model, optimizer, max_bytes=1 << 20)
    assert snapshot is not None
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    newborn = nn.Linear(1, 1)
    _train(model, optimizer, 5)
    model.add_module("later", newborn)
    with torch.no_grad():
        newborn.weight.fill_(3.0)
    HostSnapshot.from_state_dict(copy.deepcopy(snapshot.state_dict())).restore(model, optimizer)
    assert 3.0 == newborn.weight.item()
    del model.later
    _train(model, optimizer, 4)
    _train(twin, twin_optimizer, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_snapshot_before_the_first_step() -> None:
    """An optimizer without state is without state again."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    snapshot = HostSnapshot.take(model, optimizer, max_bytes=1 << 20)
    assert snapshot is not None
    _train(model, optimizer, 1)
    snapshot.restore(model, optimizer)
    assert not optimizer.state


def test_snapshot_is_bounded() -> None:
    """A host beyond the limit is not copied."""
    model = nn.Linear(100, 100)
    assert HostSnapshot.take(model, torch.optim.SGD(model.parameters(), lr=1.0), max_bytes=100) is None


def test_loss_reader() -> None:
    """Losses of any shape and type come back in order, with their mean since the last call."""
    reader = LossReader()
    assert reader.mean() is None
    for loss in (1.0, torch.tensor(2.0, requires_grad=True), torch.tensor([2.0, 4.0])):
        reader.push(scalar(loss))
    assert [1.0, 2.0, 3.0] == [loss.value for loss in reader.read()]
    assert (2.0, None) == (reader.mean(), reader.mean())
