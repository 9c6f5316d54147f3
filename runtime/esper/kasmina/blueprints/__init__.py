"""Blueprints: what a grown module is before it is compiled. ``ir`` is the language, ``catalogue`` is what ships.

Importing this package or any module of it except ``module`` imports no torch.
"""

from esper.kasmina.blueprints.catalogue import catalogue, get
from esper.kasmina.blueprints.ir import Birth, Blueprint, Node, node
from esper.kasmina.blueprints.plan import Limits, Plan

__all__ = ["Birth", "Blueprint", "Limits", "Node", "Plan", "catalogue", "get", "node"]
