"""What the training thread takes of one output on a sampled step: copies of a few rows, and nothing is read."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina import ops
from esper.kasmina._ports import first_tensor, output_tensor, why_no_tensor
from esper.kasmina._quiet import harmless
from esper.kasmina.attach import SeedModule
from esper.kasmina.control import SiteKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.hooks import RemovableHandle

    from esper.kasmina._ports import Port
    from esper.kasmina.sites import Site

__all__ = ["ROWS", "Place", "Taken", "rows_of"]

ROWS = 256
"""Rows of a sample: samples times positions."""
_BATCH = 32
_POSITIONS = ((), (ROWS // _BATCH,), (2, ROWS // _BATCH // 2))
"""Positions taken of each sample, by dimension: of a vector, a sequence, an image."""
_FEATURES = 4096
"""Features of a sample at most; wider outputs, as over a vocabulary, are thinned out."""
_CUTS = 64
"""Shapes whose cuts are remembered: sequences come in many lengths."""
_PLAIN = (Tensor, nn.Parameter)


class Taken:
    """What one sampled forward and backward left of one output."""

    __slots__ = ("branch", "gradient", "norm", "own", "place", "shape", "site", "statistics", "y")

    def __init__(self, place: Place, shape: torch.Size) -> None:
        self.place = place
        self.shape = shape
        self.y: Tensor | None = None
        self.site: Site | None = None
        """Whose branch is weighed."""
        self.branch: Tensor | None = None
        """What it would read."""
        self.own: Tensor | None = None
        """What the weights that give y read."""
        self.gradient: Tensor | None = None
        self.statistics: ops.Health | None = None
        """Of all of y, where a device measured it."""
        self.norm: ops.Health | None = None
        """Of all of the gradient, likewise."""

    @harmless
    def keep_gradient(self, gradient: Tensor) -> None:
        """Hook of the output: the rows of the sample."""
        if not _readable(gradient):
            return
        self.gradient = self.place.sample(gradient)
        if ops.use_kernels(gradient):
            self.norm = ops.health(gradient, feature_dim=self.place.port.feature_dim)

    def tensors(self) -> list[Tensor]:
        """All that there are, in a fixed order."""
        rows = [tensor for tensor in (self.y, self.branch, self.own, self.gradient) if tensor is not None]
        return [*rows, *(self.statistics or ()), *(self.norm or ())]

    def hosted(self, tensors: Iterable[Tensor]) -> None:
        """Take the copies of `tensors` on the host in their place."""
        copies = iter(tensors)
        for name in ("y", "branch", "own", "gradient"):
            if getattr(self, name) is not None:
                setattr(self, name, next(copies))
        for name in ("statistics", "norm"):
            if getattr(self, name) is not None:
                setattr(self, name, ops.Health(*islice(copies, len(ops.Health._fields))))


class Place:
    """One output and the sites that share it.

    Args:
        model: the host.
        sites: all with this output.
        samples: of the forward that is sampled, by place.
    """

    def __init__(self, model: nn.Module, sites: list[Site], samples: dict[Place, Taken]) -> None:
        self.module = model.get_submodule(sites[0].target)
        self.rows = [site.index for site in sites]
        self.port = sites[0].y
        self.seed: SeedModule | None = None
        """Blends the output last, where one does on a device."""
        # Of a layer its input is known to be what its weights read; of a block the output has to stand for that.
        self._layer = all(isinstance(child, SeedModule) for child in self.module.children())
        parallel = [site for site in sites if site.descriptor.kind is SiteKind.PARALLEL]
        self._branches = [
            (site, model.get_submodule(site.source))
            for site in parallel
            if site.source != site.target or not self._layer
        ]
        self._rank = self.port.layout.rank + self.port.folds
        self._site: Site | None = None
        """Whose branch is weighed in this forward, instead of what the output is measured for."""
        self._input: tuple[torch.Size, Tensor] | None = None
        """Shape and rows of what the branch would read, in this forward."""
        self._samples = samples
        self._cuts: dict[tuple[torch.Size, tuple[int, ...]], tuple[list[int], list[int]]] = {}
        """Sizes and strides of samples, by those of what is sampled."""

    def install(self, turn: int) -> list[RemovableHandle]:
        """Hooks for the next forward: in one turn for the output, in the other for its gradient and a branch."""
        self._site = self._input = None
        if turn % 2 == 0:
            if self.seed is not None:
                self.seed.sampling = ROWS
            return [self.module.register_forward_hook(self._observe)]
        handles = [self.module.register_forward_hook(self._observe_gradient)]
        if self._branches:
            self._site, source = self._branches[turn // 2 % len(self._branches)]
            handles.append(source.register_forward_pre_hook(self._enter, with_kwargs=True))
        return handles

    @harmless
    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-forward hook at the source of the branch."""
        x = first_tensor(args, kwargs)
        if torch.is_grad_enabled() and x is not None and _readable(x) and x.dim() == self._rank:
            self._input = x.shape, self.sample(x)

    def _take(self, output: Any) -> tuple[Tensor, Taken] | None:
        if type(output) is not Tensor:
            if why_no_tensor(output):
                return None
            output = output_tensor(output)
        if not _readable(output) or output.dim() != self._rank:
            return None
        y: Tensor = output
        taken = self._samples[self] = Taken(self, y.shape)
        return y, taken

    @harmless
    def _observe(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Forward hook that measures the output."""
        if (found := self._take(output)) is None:
            return
        y, taken = found
        if ops.use_kernels(y):
            blended = self.seed.take_found() if self.seed is not None else None
            taken.statistics = blended or ops.health(y, feature_dim=self.port.feature_dim, buckets=ROWS)
        else:
            taken.y = self.sample(y)

    @harmless
    def _observe_gradient(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook that measures the gradient of the output, and weighs a branch."""
        if (found := self._take(output)) is None:
            return
        y, taken = found
        if not y.requires_grad:
            return
        y.register_hook(taken.keep_gradient)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self._site is not None:
            self._keep_inputs(taken, self._site, args, y)

    def _keep_inputs(self, taken: Taken, site: Site, args: tuple[Any, ...], y: Tensor) -> None:
        taken.site = site
        seen, self._input = self._input, None
        own = y if not self._layer else args[0] if args and isinstance(args[0], Tensor) else None
        if seen is None or own is None or not _readable(own):
            return
        if self._same_rows(seen[0], y.shape) and self._same_rows(own.shape, y.shape):
            taken.branch, taken.own = seen[1], self.sample(own)

    def sample(self, x: Tensor) -> Tensor:
        """A copy of a few rows of the output, or of what has its positions."""
        form = x.shape, x.stride()
        cut = self._cuts.get(form)
        if cut is None:
            if len(self._cuts) >= _CUTS:
                self._cuts.clear()
            cut = self._cuts[form] = _cut(*form, self.port)
        # One operation where slices would be one for each dimension.
        return x.detach().as_strided(*cut, x.storage_offset()).clone()

    def _same_rows(self, a: torch.Size, b: torch.Size) -> bool:
        """Whether positions are the same but for their features: nothing else can be compared row by row."""
        dim = self.port.feature_dim
        return len(a) == len(b) and a[:dim] == b[:dim] and a[dim + 1 :] == b[dim + 1 :]


def _readable(x: Tensor) -> bool:
    """Tensors of other kinds and those inside ``torch.func`` are not all there, or mean more than they hold."""
    dense = type(x) in _PLAIN and x.layout is torch.strided and not x.is_nested
    return dense and x.is_floating_point() and not ops.transformed(x)


def _cut(shape: torch.Size, strides: tuple[int, ...], port: Port) -> tuple[list[int], list[int]]:
    """Sizes and strides of evenly spaced samples and positions, at most `ROWS` of them, in the order of the tensor."""
    spread = iter(_POSITIONS[port.layout.rank - 2])
    wanted = {
        dim: min(size, next(spread, 1))
        for dim, size in enumerate(shape)
        if dim not in {port.feature_dim, port.batch_dim}
    }
    # What few positions leave of the rows is filled by more samples.
    wanted[port.batch_dim] = ROWS // max(1, math.prod(wanted.values()))
    wanted[port.feature_dim] = _FEATURES
    steps = [max(1, -(-size // max(1, wanted[dim]))) for dim, size in enumerate(shape)]
    sizes = [-(-size // step) for size, step in zip(shape, steps, strict=True)]
    return sizes, [stride * step for stride, step in zip(strides, steps, strict=True)]


def rows_of(sample: Tensor, port: Port) -> NDArray[np.float64]:
    """(rows, features) of a sample on the host."""
    features = sample.movedim(port.feature_dim, -1)
    return features.reshape(-1, features.shape[-1]).double().numpy()
