"""Puts a seed's module into a host in place, by forward hooks and one child module, and takes it out without a trace.

The child is named ``esper_seed_<index>`` and belongs to the module whose output the seed adapts, so its parameters
travel with ``state_dict``, ``to`` and ``parameters``. A module that iterates over its children in its forward
(Sequential, ModuleList, ModuleDict, or a forward that calls ``children()`` and the like) must not get another one:
then the child belongs to its first descendant, in the order of ``named_modules``, that does not iterate. Where no
descendant qualifies the site is refused.

Hooks are bound methods of the child: ``copy.deepcopy(model)`` gives a copy whose hooks run the copied seed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper.kasmina import ops
from esper.kasmina._compile import forget_graphs, register_tap, tap
from esper.kasmina._guard import Guard, check_shape, in_backward
from esper.kasmina._ports import Port, first_tensor, fit, output_tensor, replace_first
from esper.kasmina._quiet import harmless
from esper.kasmina.control import SiteKind
from esper.kasmina.seeds import Execution
from esper.mesh.errors import Conflict

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from esper.kasmina.sites import Site

__all__ = ["Attachment", "Capture", "SeedModule", "child_name", "owner_of"]

_ITERATORS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def child_name(index: int) -> str:
    """Attribute under which a seed's module hangs in its owner."""
    return f"esper_seed_{index}"


def _iterates(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) or _mentions(type(module), ("forward",))


def _mentions(owner: type[nn.Module], methods: tuple[str, ...]) -> bool:
    """Whether one of the methods, or a method of the same class that they name, iterates over children."""
    seen: set[str] = set()
    wanted = list(methods)
    while wanted:
        name = wanted.pop()
        seen.add(name)
        # Decorators that watch all modules (as those of transformers do) call none of them.
        code = getattr(inspect.unwrap(getattr(owner, name)), "__code__", None)
        names = _names(code) if code is not None else set()
        if not _ITERATORS.isdisjoint(names):
            return True
        wanted += [
            other for other in names - seen if callable(getattr(owner, other, None)) and not hasattr(nn.Module, other)
        ]
    return False


def _names(code: CodeType) -> set[str]:
    """Every attribute and global that a function names, those of functions inside it included."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def owner_of(module: nn.Module) -> nn.Module:
    """The module that may take the seed of a site at `module` as a child.

    Raises:
        Conflict: `module` and all its descendants iterate over their children.
    """
    for candidate in module.modules():
        if not _iterates(candidate):
            return candidate
    raise Conflict(
        f"seed at {type(module).__name__}: expected a descendant that does not iterate over its children, found none",
        reason="NO_OWNER",
    )


@dataclass(slots=True)
class Capture:
    """What the isolation trainer sees of one forward; bounded copies, cut off from the host's graph."""

    features: Tensor
    """Canonical input of the kernel, pooled to the extent of y."""
    y: Tensor
    """Canonical output of the site."""
    gradient: Tensor | None = None
    """Of the loss at `y`; None until the backward came by."""
    overflowed: Tensor | None = None
    """Above 0 where a gradient scaler skipped this step; None where that is known not to be so."""


class SeedModule(nn.Module):
    """The living part of a seed: ``y + alpha * delta(...)`` as hooks of the host's modules.

    Args:
        delta: the kernel's module, (canonical x pooled to the extent of y) -> canonical delta.
        site: where it stands.
        capture_elements: bound of what isolation keeps of one forward, in elements.
    """

    gate: Tensor
    alpha: Tensor
    """0-dimensional, float32, on the device of the site: never a Python number, so that graphs survive its changes."""
    probe: Tensor
    """0-dimensional; not finite any more once the kernel's output was not, where the device is not waited for."""

    def __init__(self, delta: nn.Module, site: Site, capture_elements: int = 1 << 18) -> None:
        super().__init__()
        self.index = site.index
        self.delta = delta
        device = next((p.device for p in delta.parameters()), torch.device("cpu"))
        self.register_buffer("alpha", torch.zeros((), device=device))
        # What `enabled` is to a compiled graph: a Python value would be a graph of its own.
        self.register_buffer("gate", torch.ones((), dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("probe", torch.zeros((), device=device), persistent=False)
        self.guard = Guard(delta.parameters())
        self.mode = Execution.ABSENT
        self._enabled = True
        self.measuring = False
        """True while the ratio of alpha * delta to y is wanted."""
        self.ratio: Tensor | None = None
        self.shared = False
        """True where other ranks train the same seed."""
        self.sampling = 0
        """Rows of the sketch that is due of the blended output in this forward; 0 while none is."""
        self.found: ops.Health | None = None
        self.capture: Capture | None = None
        self._captures = capture_elements
        self._parallel = site.descriptor.kind is SiteKind.PARALLEL
        self._split = site.source != site.target
        self._from: Port = site.x
        self._to: Port = site.y
        # In a tuple, since a module registers a parameter or buffer that is assigned to it: hosts pass them around too.
        self._x: tuple[Tensor | None] = (None,)
        self._used = False
        """True where the last module of the span has seen `_x`."""
        self._cut = False
        """True where the graph of `_x` can not be reached from where the last module of the span runs."""
        self._watched: Capture | None = None
        """What a compiled graph has shown of the forward, until its backward comes by."""
        self._tap = register_tap(self)

    @property
    def enabled(self) -> bool:
        """False while a counterfactual runs the network without this seed."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        self.gate.fill_(value)

    @property
    def error(self) -> str:
        """What was wrong with the kernel in the last forward; the host runs without it until the runtime has judged."""
        return "" if self.guard.fault is None else self.guard.fault.text

    def forward(self, x: Any) -> Any:
        """Identity: a seed acts by its hooks, and a host that runs all its children in turn runs it without effect."""
        return x

    def __getstate__(self) -> dict[str, Any]:
        """Without the activation of the last forward, which belongs to a graph that can not be copied."""
        return {**self.__dict__, "_x": (None,), "_watched": None, "found": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is tapped for itself."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._tap = register_tap(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """With an alpha of its own: that of the module may share its memory with those of all seeds."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}alpha"] = destination[f"{prefix}alpha"].clone()

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-forward hook at the first module of a span: remember x."""
        self._x, self._used, self._cut = (first_tensor(args, kwargs),), False, False

    def after(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook at the module whose output is y."""
        guard, compiling = self.guard, torch.compiler.is_compiling()
        if self.mode is Execution.ABSENT or not (compiling or self._enabled):
            return None
        if guard.shut:
            return self._absent(output)
        y = output_tensor(output)
        x = self._input(args, kwargs) if self._parallel else y
        if x is None:
            return None
        try:
            if self.mode is Execution.ISOLATED:
                watched = self._watch(x, y)
                return None if watched is None else replace_first(output, watched)
            delta = self._change(x, y)
            # Before it is judged: a forward that is run again in a backward has to save what the first one saved.
            changed = self._blend(y, delta)
        except Exception as error:  # a kernel that fails on some input must not fail the user's forward
            # Activation checkpointing ends a recomputation by an exception of its own.
            if compiling or (in_backward() and not guard.repeats(error)):
                raise
            guard.failed(error)
        if guard.fault is not None:
            # Just now, or in the forward that is run again here.
            self.found = None
            return self._absent(output)
        # Asked in this order: evaluation is not to be compiled again because training no longer measures.
        if torch.is_grad_enabled() and self.measuring:
            self._measure(delta, y)
        return replace_first(output, torch.where(self.gate, changed, y) if compiling else changed)

    def _absent(self, output: Any) -> Any:
        """The host's output without the seed; where other ranks wait for its gradients they get zeros."""
        if not (self.shared and torch.is_grad_enabled()):
            return None
        learning = [p for p in self.delta.parameters() if p.requires_grad]
        return replace_first(output, _Unmoved.apply(output_tensor(output), *learning))  # type: ignore[no-untyped-call]  # torch ships it untyped

    def _blend(self, y: Tensor, delta: Tensor) -> Tensor:
        """``y + alpha * delta``; on a device in one pass, and where a sample of it is due with its statistics."""
        if not ops.use_kernels(y, delta):
            return y + (delta * self.alpha).to(y.dtype)
        if not self.sampling:
            return ops.blend(y, [delta], self.alpha)
        blended, self.found = ops.blend_health(
            y, [delta], self.alpha, feature_dim=self._to.feature_dim, buckets=self.sampling
        )
        return blended

    def take_found(self) -> ops.Health | None:
        """Statistics of the last blended output, where they were wanted and found; they are wanted no longer."""
        self.sampling = 0
        found, self.found = self.found, None
        return found

    def _change(self, x: Tensor, y: Tensor) -> Tensor:
        """The change, delta, in the order of the host."""
        delta = self.guard.run(self.delta, self._features(x, y), self.probe)
        delta = self._to.restore(delta, tuple(y.shape))
        check_shape(delta, y)
        return delta

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What a branch is given."""
        return self._span_input() if self._split else first_tensor(args, kwargs)

    def _span_input(self) -> Tensor | None:
        """What `before` saw in this forward; None where the first module of the span was not called in it.

        Inside a backward it may be asked for once more: there, activation checkpointing runs the last module of the
        span again, without the first one. Where it is reentrant, that is a graph of its own whose backward must not
        run into the one outside.
        """
        if torch.compiler.is_compiling():
            # Left there, it would be one more result of the graph. Checkpointing is traced as a whole.
            x, self._x = self._x[0], (None,)
            return x
        x = self._x[0]
        if not self._used:
            self._used = True
            self._cut = x is not None and x.requires_grad and not torch.is_grad_enabled()
            return x
        if not in_backward():
            return None
        return x.detach() if self._cut and x is not None else x

    def forget(self) -> None:
        """Let go of the last forward's activation."""
        self._x = (None,)

    def _features(self, x: Tensor, y: Tensor) -> Tensor:
        ordered = self._from.ordered(x)
        if self._parallel:
            ordered = fit(ordered, self._from.layout, self._to.layout, self._to.extent(tuple(y.shape)))
        return self._to.fold(ordered)

    def _measure(self, delta: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            size, change = _norm(y.detach()), _norm(delta.detach()) * self.alpha
            self.ratio = change / size.clamp_min(torch.finfo(torch.float32).tiny)

    def _watch(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Keep a bounded copy and ask for the gradient at y; the host's values and graph stay as they are.

        Returns:
            What takes the place of `y` in a compiled graph: the same values, tapped.
        """
        if not (torch.is_grad_enabled() and y.requires_grad):
            return None
        if torch.compiler.is_compiling():
            with torch.no_grad():
                features = self._features(x.detach(), y.detach())
            return tap(y, features, self._tap)
        record = self._record(self._features(x.detach(), y.detach()), y)

        @harmless
        def keep(gradient: Tensor) -> None:
            self._complete(record, gradient)

        y.register_hook(keep)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return None

    def _record(self, features: Tensor, y: Tensor) -> Capture:
        rows = max(1, min(len(y), self._captures * len(y) // max(1, y.numel())))
        with torch.no_grad():
            return Capture(features[:rows].clone(), self._to.canonical(y.detach())[:rows].clone())

    def _complete(self, record: Capture, gradient: Tensor) -> None:
        record.gradient = self._to.canonical(gradient.detach())[: len(record.y)].clone()
        self.capture = record

    def tapped(self, y: Tensor, features: Tensor) -> None:
        """As an uncompiled forward would have kept it."""
        self._watched = self._record(features, y)

    def tapped_gradient(self, gradient: Tensor) -> None:
        """As an uncompiled backward would have kept it."""
        if self._watched is not None:
            record, self._watched = self._watched, None
            self._complete(record, gradient)


class _Unmoved(torch.autograd.Function):
    """``y``, with a gradient of zero for everything else."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return (gradient, *map(torch.zeros_like, ctx.saved_tensors))


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm in float32, without overflow on the way there."""
    # What is wider than the sum refuses to be summed in it.
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.float()


@dataclass(slots=True)
class Attachment:
    """A seed's module in its host; `detach` undoes everything."""

    seed: SeedModule
    owner: nn.Module
    name: str
    handles: list[RemovableHandle] = field(default_factory=list)
    nested: list[nn.Module] = field(default_factory=list)

    @classmethod
    def attach(cls, model: nn.Module, site: Site, seed: SeedModule) -> Attachment:
        """Register child and hooks.

        Raises:
            Conflict: no owner, or the host already has an attribute of the child's name.
        """
        target, source = model.get_submodule(site.target), model.get_submodule(site.source)
        owner, name = owner_of(target), child_name(site.index)
        if hasattr(owner, name):
            raise Conflict(f"seed {site.index}: expected no attribute {name} in {type(owner).__name__}, found one")
        seed.train(target.training)
        owner.add_module(name, seed)
        attachment = cls(seed, owner, name)
        if site.source != site.target and site.descriptor.kind is SiteKind.PARALLEL:
            attachment.handles.append(source.register_forward_pre_hook(seed.before, with_kwargs=True))
        attachment.handles.append(target.register_forward_hook(seed.after, with_kwargs=True))
        attachment._avoid_nested_tensors(model, site)
        forget_graphs()
        return attachment

    def _avoid_nested_tensors(self, model: nn.Module, site: Site) -> None:
        """A hooked layer leaves its fast path by itself, but its encoder would still hand it a nested tensor."""
        for path in (site.source, site.target):
            parts = path.split(".")
            for depth in range(len(parts) + 1):
                module = model.get_submodule(".".join(parts[:depth]))
                if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
                    module.use_nested_tensor = False
                    self.nested.append(module)

    def detach(self) -> None:
        """Remove hooks and child; calling it again does nothing."""
        if self.handles:
            forget_graphs()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.owner._modules.pop(self.name, None)  # noqa: SLF001  # delattr would do the same with more ceremony
        for module in self.nested:
            others = any(isinstance(inner, SeedModule) for inner in module.modules())
            module.use_nested_tensor = not others  # type: ignore[assignment]  # a plain flag of TransformerEncoder
        self.nested.clear()
        self.seed.mode = Execution.ABSENT
        self.seed.capture = None
        self.seed.forget()
