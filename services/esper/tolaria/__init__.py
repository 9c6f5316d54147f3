"""Tolaria, the training orchestrator: recipes, runs in processes of their own, checkpoints, export and reports.

The service (`esper.tolaria.service`) and its pure parts (`core`, `config`, `recipes`) import no torch; the training
process (`esper.tolaria.worker`) does. Typical use from a program::

    from esper.tolaria import recipes
    config = recipes.get("digits").build()
"""
