"""Urza, the library of blueprints and kernels: immutable, content-addressed, with lawful transitions only.

Typical use, inside the service or in a program that owns a library's files::

    library = Library(store, blobs)
    await library.start()
    blueprint, created = await library.submit_blueprint(ir, parent_ids=(), by=identity)

Everyone else talks to it through `esper.v1.UrzaService`. Nothing here imports torch.
"""

from esper.urza.library import Library

__all__ = ["Library"]
