"""Recipes: Python functions that return the full configuration of a run.

Typical use::

    config = recipes.get("digits").build()

A new recipe is a function with a docstring, registered below. No recipe imports torch: the service lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import getdoc
from typing import TYPE_CHECKING

from esper.mesh.errors import NotFound
from esper.tolaria.recipes.cifar10 import cifar10
from esper.tolaria.recipes.digits import digits
from esper.tolaria.recipes.stdlib_lm import stdlib_lm

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.tolaria.config import RunConfig

__all__ = ["Recipe", "all_recipes", "get"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named function that returns a full configuration."""

    name: str
    """Name on the command line: ``digits``."""
    build: Callable[[], RunConfig]
    """The function; its docstring describes the recipe."""

    @property
    def description(self) -> str:
        """First paragraph of the function's docstring, on one line."""
        return " ".join((getdoc(self.build) or "").split("\n\n", 1)[0].split())


_RECIPES = {
    recipe.name: recipe
    for recipe in (Recipe("cifar10", cifar10), Recipe("digits", digits), Recipe("stdlib-lm", stdlib_lm))
}


def all_recipes() -> tuple[Recipe, ...]:
    """Every recipe, by name."""
    return tuple(_RECIPES.values())


def get(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        NotFound: reason RECIPE_NOT_FOUND.
    """
    if name not in _RECIPES:
        raise NotFound(
            f"no recipe {name[:64]!r}: expected one of {', '.join(_RECIPES)}",
            reason="RECIPE_NOT_FOUND",
            metadata={"recipe": name[:64]},
        )
    return _RECIPES[name]
