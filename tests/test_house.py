"""Rules of the house that a reader should be able to rely on."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from tests.launcher import ROOT

PACKAGE = ROOT / "alto_ds"
USERS_OF_THE_CORE = (
    "alto_ds.compare",
    "alto_ds.report",
    "alto_ds.plan",
    "alto_ds.pretrain",
    "alto_ds.checkpoint",
    "alto_ds.configs",
    "alto_ds.run",
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of alto_ds that a file names in its imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}
GRAPH = {name: imports_of(path) & MODULES.keys() - {name} for name, path in MODULES.items()}


def test_imports_have_no_circles() -> None:
    # A package's __init__ gathers what its modules offer, and they may name each other by it.
    graph = {
        name: {x for x in found if not name.startswith(f"{x}.")} for name, found in GRAPH.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_the_core_knows_nobody_who_uses_it() -> None:
    for name, found in GRAPH.items():
        if not name.startswith(USERS_OF_THE_CORE):
            assert not [other for other in found if other.startswith(USERS_OF_THE_CORE)], name


@pytest.mark.parametrize("word", ["zenflow", "nvme", "fp16_unfused", "universal"])
def test_the_optimizer_names_no_framework(word: str) -> None:
    """They are known in registration.py and layout/."""
    assert word not in (PACKAGE / "optimizer.py").read_text().lower()
