"""Hosts whose tensors are sharded over ranks by ``fully_shard``: newborns are sharded like the host they join.

A sharded tensor is a ``DTensor``. Its own shard can be looked at and written in place by each rank alone (`own`);
what is said of the whole (`whole`) needs all ranks, at the same point of the program.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["gathered", "like", "mesh_of", "own", "reshard", "shard", "whole"]


def _loaded() -> bool:
    return "torch.distributed.tensor" in sys.modules


def own(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; the tensor itself where it is not sharded."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def whole(tensor: Tensor) -> Tensor:
    """All of it; a collective where it is sharded."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def gathered(value: Any) -> Any:
    """A tree of dictionaries and lists with every sharded tensor made `whole`."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    return [gathered(item) for item in value] if isinstance(value, list) else value


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A `value` of the whole, sharded as `tensor` is; every rank has all of it, so nothing is sent."""
    if not hasattr(tensor, "device_mesh") or hasattr(value, "device_mesh") or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def mesh_of(target: nn.Module, model: nn.Module) -> DeviceMesh | None:
    """The ranks over which `target`, or where it has no parameters the model, is sharded; None where it is not."""
    if not _loaded():
        return None
    from torch.distributed.tensor import DTensor

    tensors = (*target.parameters(), *model.parameters())
    return next((t.device_mesh for t in tensors if isinstance(t, DTensor)), None)


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a module's parameters, equal on all ranks so far."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(module, FSDPModule):
        # Otherwise it would keep what a validation gathered, being the outermost of its own.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward gathered, so that a module's parameters are those that the optimizer knows."""
    if not _loaded():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
