"""Kasmina, the runtime that a trainer links: seeds in a host model, kernels from the library, growth in between.

Typical use, in any PyTorch loop::

    growth = esper.kasmina.wrap(model, optimizer, mesh="localhost:7600")
    growth.step(loss)          # after each optimizer step
    growth.boundary(metrics)   # after each validation

Importing this package imports no torch: services that only share its torch-free modules (``signature``, ``control``,
``blueprints.ir``) stay small. ``wrap`` and ``Growth`` load it on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.kasmina.growth import Growth
    from esper.kasmina.wrapping import wrap

__all__ = ["Growth", "wrap"]


def __getattr__(name: str) -> object:
    if name == "Growth":
        from esper.kasmina.growth import Growth

        return Growth
    if name == "wrap":
        from esper.kasmina.wrapping import wrap

        return wrap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
