"""The shape of the house: imports point down only, rooms do not grow without bound."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("oona", "urza", "tezzeret", "urabrask", "tamiyo", "tolaria")
ALLOWED = {
    "mesh": {"v1", "mesh"},
    "kasmina": {"v1", "mesh", "kasmina"},
    **{name: {"v1", "mesh", "kasmina", name} for name in SERVICES},
    "cli": {"v1", "mesh", "kasmina", "cli", *SERVICES},
}
"""Package below `esper` -> packages that it may import."""

TORCH_FREE = (
    "esper.kasmina.control",
    "esper.kasmina.signature",
    "esper.kasmina.convert",
    "esper.kasmina.blueprints.ir",
)
HARD_CAP = 500


def _modules(package: str) -> list[Path]:
    root = ROOT / ("runtime" if package in {"mesh", "kasmina"} else "services") / "esper" / package
    return sorted(root.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "esper"}
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_down(package):
    """No package imports one beside or above it; a service reaches another through its contract alone."""
    modules = _modules(package)
    assert modules
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules
        for name in _imports(path)
        if name.startswith("esper.") and name.split(".")[1] not in ALLOWED[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", SERVICES)
def test_cores_know_neither_grpc_nor_contracts(package):
    """Only servicers, conversions and wiring touch gRPC and messages; the logic of a service is tested without them."""
    core = [path for path in _modules(package) if path.stem in {"core", "shield", "heuristic", "gauntlet", "groups"}]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in core
        for name in _imports(path)
        if name.split(".")[0] == "grpc" or name.startswith("esper.v1")
    ]
    assert wrong == []


@pytest.mark.parametrize("root", ["gen", "runtime", "services"])
def test_esper_stays_a_namespace(root):
    """A regular package in one root would hide the other two."""
    assert not (ROOT / root / "esper" / "__init__.py").exists()


def test_modules_stay_small():
    """No module that is shipped or run holds more than five hundred lines."""
    files = [p for folder in ("runtime", "services", "tools", "loadtests") for p in (ROOT / folder).rglob("*.py")]
    long = [(len(p.read_text(encoding="utf-8").splitlines()), str(p.relative_to(ROOT))) for p in files]
    assert [entry for entry in long if entry[0] > HARD_CAP] == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_shared_vocabulary_needs_no_torch(module, run_python):
    """A service that only shares the runtime's words can be deployed without torch."""
    run_python(f"import sys, {module}; assert 'torch' not in sys.modules")
