"""No file of the package imports itself by way of others: import-linter's layers say so of rooms, not of files."""

from __future__ import annotations

import sys
from pathlib import Path

import grimp
import pytest


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Return the strongly connected groups of more than one module (Tarjan's algorithm)."""
    found: list[list[str]] = []
    stack: list[str] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for imported in graph.find_modules_directly_imported_by(module):
            if imported not in number:
                visit(imported)
            if imported in stack:
                lowest[module] = min(lowest[module], lowest[imported])
        if lowest[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph.modules):
        if module not in number:
            visit(module)
    return found


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports for type checking alone count: they are how a circle would be papered over."""
    graph = grimp.build_graph("vllm_tap", exclude_type_checking_imports=False, cache_dir=None)
    # The package's own names are loaded on first use.
    for imported in graph.find_modules_directly_imported_by("vllm_tap"):
        graph.remove_import(importer="vllm_tap", imported=imported)
    assert circles(graph) == []


def test_a_circle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files, of which the last imports the first for its types."""
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from planted import b\n")
    (package / "b.py").write_text("from planted import c\n")
    (package / "c.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from planted import a\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    graph = grimp.build_graph("planted", exclude_type_checking_imports=False, cache_dir=None)
    assert circles(graph) == [["planted.a", "planted.b", "planted.c"]]
    sys.modules.pop("planted", None)
