"""A trained network as plain PyTorch: a `torch.export` program and safetensors weights that need no Esper to load.

::

    export/model.pt2            torch.export.load("model.pt2").module()(x)
    export/model.safetensors    the same weights by name: host.*, grown.seed<index>.*
    export/lineage.json         every adaptation, kernel digest and decision, with its explanation

What is exported runs the blueprints in plain torch; compiled kernels agree with it up to rounding, which is checked
here on validation data before anything is written.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from esper.kasmina.kernels.tracing import quiet
from esper.mesh.errors import InternalError
from esper.tolaria import hosts
from esper.tolaria.attach import Grown
from esper.tolaria.rundir import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from esper.tolaria.config import RunConfig
    from esper.tolaria.data.base import Dataset
    from esper.tolaria.growing import Network
    from esper.tolaria.rundir import RunDir

__all__ = ["TOLERANCE", "export_run", "plain_network"]

TOLERANCE = 1e-4
"""Largest difference of a logit between the network as it ran and as it is exported."""


def plain_network(config: RunConfig, network: Network) -> Grown:
    """The network in plain torch, in evaluation mode; copies of its weights."""
    host = hosts.build(config.host, config.seed)
    host.load_state_dict(network.host_state())
    plain = Grown(host, network.grown())
    return plain.eval()


def export_run(run_dir: RunDir, config: RunConfig, network: Network, dataset: Dataset) -> None:
    """Write the three files.

    Raises:
        InternalError: EXPORT_DIFFERS, the exported program does not predict what the network predicts.
    """
    plain = plain_network(config, network)
    sample = dataset.validation()[0][0]
    program = _program(plain, sample)
    _compare(network, program, sample)
    weights = {name: value.detach().contiguous().clone() for name, value in plain.state_dict().items()}
    lineage = {
        "run_id": run_dir.run_id,
        "recipe": config.recipe,
        "input": {"shape": ["batch", *sample.shape[1:]], "dtype": str(sample.dtype).removeprefix("torch.")},
        "torch": torch.__version__,
        **network.lineage(),
    }
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    run_dir.export.mkdir(exist_ok=True)
    write_atomic(run_dir.export / "model.pt2", buffer.getvalue())
    write_atomic(run_dir.export / "model.safetensors", safetensors.torch.save(weights))
    write_atomic(run_dir.export / "lineage.json", (json.dumps(lineage, indent=1, default=str) + "\n").encode())


def _program(plain: Grown, sample: Tensor) -> torch.export.ExportedProgram:
    # A batch size that equals no other dimension: equal sizes would be taken for one and the same.
    batch = sample[:1].repeat(37, *[1] * (sample.dim() - 1))
    shapes: dict[str, Any] = {"x": {0: torch.export.Dim("batch", min=1, max=1 << 20)}}
    with quiet():
        return torch.export.export(plain, (batch,), dynamic_shapes=shapes, strict=False)


def _compare(network: Network, program: torch.export.ExportedProgram, sample: Tensor) -> None:
    training = network.model.training
    network.model.eval()
    try:
        with torch.no_grad():
            expected, found = network.model(sample), program.module()(sample)
    finally:
        network.model.train(training)
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise InternalError(
            f"export: expected logits within {TOLERANCE:g} of the run's own, found a difference of {difference:g}",
            reason="EXPORT_DIFFERS",
        )
