"""Finds where a model can grow, names those places and knows their shapes; generic over ``nn.Module``, without a copy.

Typical use::

    calls = observe(model, (images,))           # one forward without effect; a trainer watches the user's own instead
    found = discover(model, calls)
    found.sites[3].descriptor.signature         # "image:16->32:float32"
    found.refusals                              # what can not grow, each with its reason

A *layer* is a module with parameters of its own (linear, convolution, attention, norm, recurrent, embedding), a
*block* any other module that holds some, a *span* runs from one child of a module to a later one in the order of
execution, with up to `MAX_SPAN` parametrised children, and a norm that follows, inside. Series sites adapt the output
of a module, parallel sites branch around it. Spans are parallel: in series they would be their last module again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from esper.kasmina._finder import MAX_SPAN, Finder
from esper.kasmina._probe import Call, Recorder
from esper.kasmina._quiet import evaluating
from esper.kasmina._select import Selection, Selectors
from esper.kasmina._site import Refusal, Site, site_document, site_from_document

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from esper.kasmina._finder import Draft
    from esper.kasmina.control import SiteDescriptor

__all__ = [
    "MAX_SPAN",
    "Discovery",
    "Refusal",
    "Selection",
    "Selectors",
    "Site",
    "discover",
    "observe",
    "site_document",
    "site_from_document",
]


@dataclass(frozen=True, slots=True)
class Discovery:
    """Sites by index, and the candidates that were refused."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, Call]:
    """Run one forward in evaluation mode without gradients and say what every module did.

    Training flags, buffers and random state are as before afterwards.
    """
    recorder = Recorder(model)
    with evaluating(model):
        handles = recorder.install()
        try:
            model(*args, **(kwargs or {}))
        finally:
            for handle in handles:
                handle.remove()
    return recorder.calls


def discover(
    model: nn.Module,
    calls: Mapping[str, Call],
    *,
    select: Callable[[SiteDescriptor], bool] | None = None,
    causal: bool = False,
    max_sites: int = 4096,
) -> Discovery:
    """List the sites of a model after one observed forward.

    Args:
        model: the host; it is read, never changed.
        calls: what `observe` or a `Recorder` saw.
        select: keeps a site when true; its index is not known then. Indices are dense over what is kept.
        causal: positions of sequences must not see later ones.
        max_sites: sites beyond are refused, spans first. A branch that would read and change the same tensors as one
            that is kept is no site of its own.
    """
    finder = Finder(model, calls, causal=causal)
    drafts = finder.drafts()
    if not drafts and not finder.refusals:
        finder.refusals.append(Refusal("", type(model).__name__, "it holds no module with parameters that could grow"))
    order = {"layer": 0, "block": 1, "span": 2}
    drafts.sort(key=lambda d: (order[d.granularity], calls[d.target].end))
    chosen: list[tuple[Draft, Site]] = []
    branches: set[object] = set()
    for draft in drafts:
        # Queries and keys read the same tensor: a branch around both is the one around the keys again. Compared with
        # what was selected only: who wants no blocks gets the span that is a block's branch.
        branch = finder.branch(draft)
        if branch is not None and branch in branches:
            continue
        site = finder.site(draft, 0)
        if select is None or select(site.descriptor):
            branches.add(branch)
            chosen.append((draft, site))
    over = chosen[max_sites:]
    refusals = finder.refusals + [Refusal(d.name, "", f"beyond the limit of {max_sites} sites") for d, _ in over]
    kept = sorted(
        chosen[:max_sites], key=lambda c: (calls[c[0].target].end, order[c[0].granularity], c[0].name, c[0].kind.value)
    )
    sites = [replace(site, descriptor=replace(site.descriptor, index=i)) for i, (_, site) in enumerate(kept)]
    return Discovery(tuple(sites), tuple(refusals))
