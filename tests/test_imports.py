"""Modules import others by layers."""

import ast
import graphlib
from importlib.util import resolve_name

from conftest import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "diffkern").rglob("*.py")
}


def imported(name: str) -> set[str]:
    """The modules of the package that module ``name`` imports when it is imported, but for the package itself."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            source = resolve_name("." * node.level + (node.module or ""), package)
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) | ({source} if members - MODULES.keys() else set())
    return found - {"diffkern"}


def test_no_module_is_imported_by_one_that_it_imports():
    graph = {name: imported(name) for name in MODULES}
    assert "diffkern.model" in graph["diffkern.sampling"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them
