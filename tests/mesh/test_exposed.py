"""What the modules of the mesh promise in `__all__` is there, documented, and complete."""

import importlib
import inspect

import pytest

MODULES = [
    "blobs",
    "channel",
    "context",
    "errors",
    "hooks",
    "identity",
    "interceptor",
    "logging",
    "metrics",
    "scrub",
    "server",
    "service",
    "settings",
    "streams",
    "testing",
]


@pytest.mark.parametrize("name", MODULES)
def test_exports_exist_and_classes_and_functions_are_documented(name: str) -> None:
    """Each exported name resolves; each exported class or function says what it does."""
    module = importlib.import_module(f"esper.mesh.{name}")
    exported = {export: getattr(module, export) for export in module.__all__}
    assert len(exported) == len(module.__all__)
    silent = [
        e
        for e, thing in exported.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not thing.__doc__
    ]
    assert [] == silent


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_and_function_is_exported(name: str) -> None:
    """What a module defines without an underscore is either in `__all__` or meant for its neighbours by name."""
    module = importlib.import_module(f"esper.mesh.{name}")
    own = {
        thing
        for thing, value in vars(module).items()
        if not thing.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }
    assert own - set(module.__all__) <= {"is_cancellation", "enter"}
