"""`wrap`: the one call that lets a model grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from esper.kasmina._compile import inner_module
from esper.kasmina._plane import reach
from esper.kasmina.config import Config
from esper.kasmina.distributed import unwrapped
from esper.kasmina.growth import Growth
from esper.kasmina.sites import Selection
from esper.mesh.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from esper.kasmina.control import ControlPlane
    from esper.kasmina.sites import Selectors

__all__ = ["wrap"]


def wrap(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    mesh: str | ControlPlane | None = None,
    sites: Selectors | None = None,
    exclude: Selectors | None = None,
    validate: Callable[[], object] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    cache_dir: Path | None = None,
    config: Config | None = None,
    group: ProcessGroup | None = None,
    **options: Any,
) -> Growth:
    """Let a model grow while it trains; it is not copied, replaced or changed, and stays usable exactly as before.

    Args:
        model: the host.
        optimizer: the host's; newborns get groups of their own in it.
        mesh: ``host:port`` of the mesh, any control plane, or None to stay dormant. None reachable is no error.
        sites: where it may grow: shell patterns of module names or of their last parts, types of modules, predicates
            over `SiteDescriptor`, or several of these in a list; None allows all.
        exclude: where it may not, in the same forms.
        validate: as for `Growth.boundary`, where that is given finished numbers.
        example_inputs: arguments of one forward, to learn shapes at once; None learns them from the first training
            forward.
        cache_dir: directory of the kernel cache; None keeps kernels in memory.
        config: all options.
        group: processes that train this model together, where they are not those of the ``DistributedDataParallel``
            around it, or of the default group.
        **options: single ones, see `Config`.

    Raises:
        InvalidInput: both `config` and options, an unknown option, a model that runs no hooks or is on several devices
            of one process, or sites that the model has not.
    """
    if config is not None and options:
        raise InvalidInput(f"wrap: expected config or single options, found both ({', '.join(sorted(options))})")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInput("wrap: expected a module before TorchScript compiled it, found a ScriptModule: no hooks run")
    if isinstance(model, torch.nn.DataParallel):
        raise InvalidInput(
            "wrap: expected the module inside DataParallel, found the wrapper: its replicas run no hooks"
        )
    unknown = set(options) - set(Config.__dataclass_fields__)
    if unknown:
        raise InvalidInput(f"wrap: expected options of Config, found {', '.join(sorted(unknown))}")
    growth = Growth(
        model,
        optimizer,
        plane=reach(mesh, cache_dir),
        select=Selection(inner_module(unwrapped(inner_module(model))[0]), sites, exclude),
        validate=validate,
        group=group,
        config=config or Config(**options),
    )
    growth.observation.look(example_inputs)
    return growth
