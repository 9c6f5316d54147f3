"""Chooses sites as users of adapter libraries do: by name, by type of module, or by a function.

A pattern is a shell pattern of qualified names, or of their last parts: ``"q_proj"`` is every module of that name,
``"encoder.*"`` everything under any ``encoder``. A span is chosen by its own name, or where both its ends are. A type
chooses layers and blocks of that type, no spans. What matches nothing is an error at once, with what there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from esper.kasmina.control import SiteDescriptor
from esper.mesh.errors import InvalidInput
from esper.mesh.logging import get_logger

if TYPE_CHECKING:
    from esper.kasmina._site import Refusal

__all__ = ["Selection", "Selector", "Selectors"]

Selector = str | type[nn.Module] | Callable[[SiteDescriptor], bool]
"""A pattern, a type of modules, or a predicate."""
Selectors = Selector | Sequence[Selector]
"""One selector, or several of which one is enough."""

_log = get_logger("esper.kasmina.growth")
_SHOWN = 12


class Selection:
    """Keeps the sites that one of `sites` chooses and none of `exclude`.

    Args:
        model: the host.
        sites: what to keep; None keeps all.
        exclude: what to leave out all the same.

    Raises:
        InvalidInput: a pattern or type that no module of the host matches, or something that is no selector.
    """

    def __init__(self, model: nn.Module, sites: Selectors | None, exclude: Selectors | None = None) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._sites = None if sites is None else _listed(sites)
        self._exclude = () if exclude is None else _listed(exclude)
        self._hits: Counter[int] = Counter()
        for argument, selectors in (("sites", self._sites or ()), ("exclude", self._exclude)):
            for selector in selectors:
                self._check_exists(argument, selector)

    def __call__(self, site: SiteDescriptor) -> bool:
        """Whether the site is kept."""
        if any(self._chooses(selector, site) for selector in self._exclude):
            return False
        if self._sites is None:
            return True
        chosen = [i for i, selector in enumerate(self._sites) if self._chooses(selector, site)]
        self._hits.update(chosen)
        return bool(chosen)

    def _chooses(self, selector: Selector, site: SiteDescriptor) -> bool:
        if isinstance(selector, str):
            return fnmatchcase(site.name, selector) or all(_matches(end, selector) for end in site.name.split(".."))
        if isinstance(selector, type):
            return site.granularity != "span" and isinstance(self._modules.get(site.name), selector)
        return bool(selector(site))

    def _check_exists(self, argument: str, selector: Selector) -> None:
        if isinstance(selector, str):
            missing = [p for p in selector.split("..") if p and not any(_matches(n, p) for n in self._modules)]
            if missing:
                raise InvalidInput(
                    f"wrap {argument}: expected patterns of module names, found {selector!r}, which matches none; "
                    f"{self._names_like(missing[0])}"
                )
        elif isinstance(selector, type):
            if not issubclass(selector, nn.Module):
                raise InvalidInput(f"wrap {argument}: expected types of modules, found {selector.__name__}")
            if not any(isinstance(module, selector) for module in self._modules.values()):
                held = Counter(type(module).__name__ for module in self._modules.values())
                there = ", ".join(f"{name} ({count})" for name, count in held.most_common(_SHOWN))
                raise InvalidInput(
                    f"wrap {argument}: expected types of modules of the model, found {selector.__name__}, of which it "
                    f"has none; it has {there}"
                )
        elif not callable(selector):
            raise InvalidInput(f"wrap {argument}: expected patterns, module types or predicates, found {selector!r}")

    def _names_like(self, pattern: str) -> str:
        parts = {part for name in self._modules for part in (name, name.rpartition(".")[2])}
        close = get_close_matches(pattern.strip("*."), sorted(parts), n=3)
        guess = f"close to it are {', '.join(close)}; " if close else ""
        names = list(self._modules)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"{guess}the model has {', '.join(names[:_SHOWN])}{more}"

    def check(self, refusals: Sequence[Refusal]) -> None:
        """After all sites were asked for: tell which selectors chose none, with the reasons.

        Raises:
            InvalidInput: no selector chose any.
        """
        if self._sites is None:
            return
        silent = [self._why_none(s, refusals) for i, s in enumerate(self._sites) if not self._hits[i]]
        if silent and not self._hits:
            raise InvalidInput(f"wrap sites: expected some that can grow, found none; {'; '.join(silent)}")
        for text in silent:
            _log.warning("selector without a site", why=text)

    def _why_none(self, selector: Selector, refusals: Sequence[Refusal]) -> str:
        if isinstance(selector, str):
            title = repr(selector)
            refused = [r for r in refusals if _matches(r.name, selector)]
        elif isinstance(selector, type):
            title = selector.__name__
            refused = [r for r in refusals if isinstance(self._modules.get(r.name), selector)]
        else:
            return "a predicate chose no site"
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in refused[:_SHOWN])
        return f"{title} chose no site ({reasons or 'granularities, kinds or exclude leave none'})"


def _listed(selectors: Selectors) -> tuple[Selector, ...]:
    if isinstance(selectors, str | type) or not isinstance(selectors, Sequence):
        return (selectors,)
    return tuple(selectors)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
