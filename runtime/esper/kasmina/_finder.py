"""The rules by which sites are found: what counts as a layer, block or span, and what can not grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from esper.kasmina._ports import MAX_RANK, Port, parameter_dtype
from esper.kasmina._site import Refusal, Site
from esper.kasmina.control import SiteDescriptor, SiteKind
from esper.kasmina.signature import FLOAT_DTYPES, MAX_FEATURES, Layout, Signature

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.kasmina._probe import Call, Spec

__all__ = ["MAX_SPAN", "Draft", "Finder"]

MAX_SPAN = 3
"""Parametrised children, norms not counted, that a span may hold."""

_NORMS = (
    nn.modules.batchnorm._NormBase,  # noqa: SLF001  # the base of batch and instance norms has no public name
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_FEATURES_FIRST = (
    nn.modules.conv._ConvNd,  # noqa: SLF001  # likewise of all convolutions
    nn.modules.batchnorm._NormBase,  # noqa: SLF001
    nn.GroupNorm,
)
_SEQUENCE_OWNERS = (nn.MultiheadAttention, nn.RNNBase)
_SEQUENCE_BLOCKS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


class _Refused(Exception):
    """Control flow inside this module; no error of anybody."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A site before it has an index."""

    name: str
    source: str
    target: str
    kind: SiteKind
    granularity: str
    x: Port
    y: Port
    x_spec: Spec
    y_spec: Spec
    inside: tuple[str, ...]
    """Names of the modules whose outputs and parameters count as inside."""
    dtype: str


class Finder:
    """Reads a model and what one forward showed of it."""

    def __init__(self, model: nn.Module, calls: Mapping[str, Call], *, causal: bool) -> None:
        self.model = model
        self.modules = {name: module for name, module in model.named_modules() if name}
        compiled = [name for name, module in self.modules.items() if isinstance(module, torch.jit.ScriptModule)]
        for name in [name for name in self.modules if any(_inside(name, owner) for owner in compiled)]:
            del self.modules[name]
        self.calls = calls
        self.causal = causal
        self.refusals: list[Refusal] = []
        self.parametric = {n for n, m in self.modules.items() if next(m.parameters(), None) is not None}
        self.attention_inner = {
            inner
            for name, m in self.modules.items()
            if isinstance(m, nn.MultiheadAttention)
            for inner in self._under(name)
        }
        self.leaves = [n for n in self.modules if self._is_leaf(n)]
        first = {n for n, m in self.modules.items() if isinstance(m, _SEQUENCE_OWNERS) and not m.batch_first}
        self.sequence_first = set(first)
        for name, module in self.modules.items():
            if isinstance(module, _SEQUENCE_BLOCKS) and any(_inside(f, name) for f in first):
                self.sequence_first |= {name, *self._under(name)}
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        """One copy of each: hundreds of sites have the same few."""
        self.end = max((call.end for call in calls.values()), default=1)

    def _under(self, name: str) -> list[str]:
        return [other for other in self.modules if _inside(other, name)]

    def _is_leaf(self, name: str) -> bool:
        own = next(self.modules[name].parameters(recurse=False), None) is not None
        return (own or isinstance(self.modules[name], nn.MultiheadAttention)) and name not in self.attention_inner

    def drafts(self) -> list[Draft]:
        """Every site that can grow; the rest is in ``refusals``."""
        result: list[Draft] = []
        leaves = set(self.leaves)
        for name in self.modules:
            if name not in self.parametric or name in self.attention_inner:
                continue
            granularity = "layer" if name in leaves else "block"
            if granularity == "block" and not self._is_real_block(name):
                continue
            result += self._attempt(name, name, name, granularity)
        parents = ["", *(n for n in self.modules if n not in leaves)]
        for parent in parents:
            for first, last in self._spans(parent):
                result += self._attempt(f"{first}..{last}", first, last, "span")
        return result

    def branch(self, draft: Draft) -> tuple[object, object] | None:
        """Which tensor a parallel site reads and which it adds to, their names where that is not known; else None."""
        if draft.kind is not SiteKind.PARALLEL:
            return None
        x, y = self.calls[draft.source].source, self.calls[draft.target].result
        return draft.source if x is None else x, draft.target if y is None else y

    def _is_real_block(self, name: str) -> bool:
        """A wrapper around a single module would be the same site twice, and a list is never called."""
        if isinstance(self.modules[name], torch.jit.ScriptModule):
            return True
        if isinstance(self.modules[name], nn.ModuleList | nn.ModuleDict):
            return False
        return sum(1 for inner in self._under(name) if inner in self.calls and self.calls[inner].calls) > 1

    def _attempt(self, name: str, source: str, target: str, granularity: str) -> list[Draft]:
        found: list[Draft] = []
        reasons: list[str] = []
        kinds = (SiteKind.PARALLEL,) if granularity == "span" else (SiteKind.SERIES, SiteKind.PARALLEL)
        for kind in kinds:
            if kind is SiteKind.PARALLEL and isinstance(self.modules[source], (*_NORMS, nn.Embedding, nn.EmbeddingBag)):
                continue
            try:
                found.append(self._draft(name, source, target, kind, granularity))
            except _Refused as refused:
                reasons.append(str(refused))
        # A span that does not fit is no loss that anybody asks about; its modules have their own entries.
        if not found and granularity != "span":
            self.refusals.append(Refusal(name, type(self.modules[target]).__name__, reasons[0]))
        return found

    def _draft(self, name: str, source: str, target: str, kind: SiteKind, granularity: str) -> Draft:
        y_spec, y = self._port(target, output=True)
        x_spec, x = (y_spec, y) if kind is SiteKind.SERIES else self._port(source, output=False)
        if kind is SiteKind.PARALLEL:
            pairs = self.calls[source].forms if source == target else [(x_spec, y_spec)]
            for x_form, y_form in pairs:
                assert x_form is not None
                assert y_form is not None
                self._check_branch(x, y, x_form, y_form)
        inside = (target, *self._under(target))
        if granularity == "span":
            inside = self._between(source, target)
        dtype = parameter_dtype(self.modules[target], y_spec.dtype)
        if dtype not in FLOAT_DTYPES:
            raise _Refused(f"its parameters are {dtype}, expected one of {sorted(FLOAT_DTYPES)}")
        return Draft(name, source, target, kind, granularity, x, y, x_spec, y_spec, inside, dtype)

    def _check_branch(self, x: Port, y: Port, x_spec: Spec, y_spec: Spec) -> None:
        """A branch from x to y must lead from samples to the same samples, by pooling at most."""
        if y.layout is not Layout.VECTOR:
            if x.layout is not y.layout:
                raise _Refused(f"its input is laid out as {x.layout.value} and its output as {y.layout.value}")
            if x.folds != y.folds:
                raise _Refused(f"its input has {len(x_spec.shape)} dimensions and its output {len(y_spec.shape)}")
        x_shape, y_shape = x.canonical_shape(x_spec.shape), y.canonical_shape(y_spec.shape)
        if x_shape[0] != y_shape[0]:
            raise _Refused(f"its input has {x_shape[0]} samples and its output {y_shape[0]}")
        moves = x.layout is y.layout and x.extent(x_spec.shape) != y.extent(y_spec.shape)
        if self.causal and moves:
            raise _Refused("it changes the number of positions, and pooling would let positions see later ones")

    def _called(self, name: str) -> Call:
        if isinstance(self.modules[name], torch.jit.ScriptModule):
            raise _Refused("it is compiled by TorchScript, which runs no hooks")
        call = self.calls.get(name)
        if call is None or call.calls == 0:
            raise _Refused("it was not called in the observed forward (its parameters may be used directly)")
        return call

    def _port(self, name: str, *, output: bool) -> tuple[Spec, Port]:
        """The first form of a module's input or output, and the port that fits all its forms."""
        call = self._called(name)
        if output and call.why:
            raise _Refused(call.why)
        side = "output" if output else "input"
        forms = [form[1] if output else form[0] for form in call.forms]
        found: tuple[Spec, Port] | None = None
        for spec in forms:
            if spec is None:
                raise _Refused(f"its {side} is no tensor")
            _check_tensor(spec, side)
            port = self._port_of(name, len(spec.shape), output=output)
            found = found or (spec, port)
            if port != found[1] or spec.shape[port.feature_dim] != found[0].shape[port.feature_dim]:
                shapes = f"{found[0].shape} and {spec.shape}"
                raise _Refused(
                    f"it is called {call.calls} times in one forward, and its {side} has the shapes {shapes}"
                )
        assert found is not None
        features = found[0].shape[found[1].feature_dim]
        if features > MAX_FEATURES:
            raise _Refused(f"its {side} has {features} features, expected at most {MAX_FEATURES}")
        return found

    def _port_of(self, name: str, rank: int, *, output: bool) -> Port:
        batch_dim = 0
        if rank == 3:
            if name in self.sequence_first:
                batch_dim = 1
            elif self.sequence_first:
                raise _Refused(
                    "the model holds sequence-first modules: samples and positions can not be told apart here"
                )
        return Port.of_rank(rank, features_last=self._features_last(name, rank, output=output), batch_dim=batch_dim)

    def _features_last(self, name: str, rank: int, *, output: bool) -> bool:
        """The nearest executed layer of the same rank decides: convolutions and batch norms put features first."""
        near = sorted(
            (inner for inner in self.leaves if inner == name or _inside(inner, name)),
            key=lambda inner: self.calls[inner].end if inner in self.calls else -1,
            reverse=output,
        )
        for inner in near:
            call = self.calls.get(inner)
            spec = None if call is None else call.y if output else call.x
            if spec is not None and len(spec.shape) == rank:
                return not isinstance(self.modules[inner], _FEATURES_FIRST)
        return rank == 3

    def _spans(self, parent: str) -> list[tuple[str, str]]:
        children = [name for name in self.modules if _parent(name) == parent and name not in self.attention_inner]
        called = [c for c in children if c in self.calls and self.calls[c].calls == 1 and self.calls[c].end > 0]
        called.sort(key=lambda name: self.calls[name].start)
        heavy = [c for c in called if c in self.parametric and not isinstance(self.modules[c], _NORMS)]
        spans = []
        for i, first in enumerate(heavy):
            for last in heavy[i + 1 : i + MAX_SPAN]:
                follower = called.index(last) + 1
                end = last
                if follower < len(called) and isinstance(self.modules[called[follower]], _NORMS):
                    end = called[follower]
                spans.append((first, end))
        return spans

    def _between(self, first: str, last: str) -> tuple[str, ...]:
        low, high, parent = self.calls[first].start, self.calls[last].end, _parent(first)
        return tuple(
            name
            for name in self.modules
            if (not parent or _inside(name, parent))
            and (call := self.calls.get(name)) is not None
            and low <= call.start
            and call.end <= high
        )

    def site(self, draft: Draft, index: int) -> Site:
        """The site of a draft."""
        shapes = draft.x.canonical_shape(draft.x_spec.shape), draft.y.canonical_shape(draft.y_spec.shape)
        x_shape, y_shape = (self._shapes.setdefault(shape, shape) for shape in shapes)
        widths = [y_shape[draft.y.layout.feature_dim]]
        for name in draft.inside:
            call = self.calls.get(name)
            if name in self.leaves and call is not None and call.y is not None and 2 <= len(call.y.shape) <= MAX_RANK:
                rank = len(call.y.shape)
                last = self._features_last(name, rank, output=True)
                widths.append(call.y.shape[Port.of_rank(rank, features_last=last).feature_dim])
        parameters = {id(p): p.numel() for name in draft.inside for p in self.modules[name].parameters()}
        descriptor = SiteDescriptor(
            index=index,
            name=draft.name,
            kind=draft.kind,
            granularity=draft.granularity,
            module_type=type(self.modules[draft.target]).__name__,
            signature=Signature(
                draft.y.layout,
                x_shape[draft.x.layout.feature_dim],
                y_shape[draft.y.layout.feature_dim],
                draft.dtype,
            ),
            narrowest_width=min(widths),
            parameters=sum(parameters.values()),
            depth=self.calls[draft.target].end / self.end,
            # Heads or images beside the positions do not unmake their order.
            causal=self.causal and draft.y.layout is not Layout.VECTOR,
        )
        return Site(descriptor, draft.source, draft.target, draft.x, draft.y, x_shape, y_shape)


def _check_tensor(spec: Spec, side: str) -> None:
    if not spec.dtype.is_floating_point:
        raise _Refused(f"its {side} holds {str(spec.dtype).removeprefix('torch.')}, expected floating-point numbers")
    if not 2 <= len(spec.shape) <= MAX_RANK or 0 in spec.shape:
        raise _Refused(
            f"its {side} has the shape {spec.shape}, expected 2 to {MAX_RANK} dimensions, none of them empty"
        )


def _inside(name: str, owner: str) -> bool:
    return name.startswith(owner + ".")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
