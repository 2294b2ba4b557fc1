"""Render docs/vllm-support.md, and look for what it lists in the source of a vLLM. A process of its own.

`python -m vllm_tap.vllm.support docs/vllm-support.md [--check]` writes the page; with `--check` it writes nothing and
fails if the page is out of date. `python -m vllm_tap.vllm.support --tree FOLDER` reads the `vllm` in a folder, such
as an unpacked wheel, without importing it, and names what is not there.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from vllm_tap.vllm.assumptions import PARTS, VERSIONS, Assumption

HEAD: Final = f"""# What is assumed of vLLM

vllm-tap runs inside a stock vLLM and uses names that vLLM does not promise to keep. All of them are listed here, with
the reason and with what happens in a version that lacks one. They were read from the source of vLLM
{", ".join(VERSIONS)}.

This page is rendered from `src/vllm_tap/vllm/assumptions.py`, the list that the engine's side itself asks:

```
python -m vllm_tap.vllm.support docs/vllm-support.md
```

To find the names in the source of another version, without starting it:

```
pip download --no-deps vllm==VERSION && unzip -q vllm-*.whl -d FOLDER
python -m vllm_tap.vllm.support --tree FOLDER
```
"""


def render() -> str:
    """Return the page."""
    return HEAD + "".join(f"\n## {part.title}\n\n{_table(part.assumptions)}\n" for part in PARTS)


def _table(assumptions: tuple[Assumption, ...]) -> str:
    head = "| in vLLM | names | needed | without it | read from |\n|---|---|---|---|---|"
    return "\n".join([head, *map(_row, assumptions)])


def _row(entry: Assumption) -> str:
    names = ", ".join(f"`{name}`" for name in entry.names)
    return f"| `{entry.owner}` | {names} | {entry.why} | {entry.absent} | {', '.join(entry.versions)} |"


def missing(folder: Path) -> list[str]:
    """Return which of the assumed names the `vllm` in a folder does not define, as `owner.name`.

    Only names that its version is listed with are looked for; those of a version that is not listed, all of them.
    """
    version = _version(folder)
    listed = version if version in VERSIONS else VERSIONS[-1]
    return [
        f"{entry.owner}.{name}"
        for part in PARTS
        for entry in part.assumptions
        if entry.owner.startswith("vllm") and listed in entry.versions
        for name in entry.names
        if name not in _defined(folder, entry.owner)
    ]


def _version(folder: Path) -> str:
    """Return the version that a tree states, without what follows the release."""
    file = folder / "vllm" / "_version.py"
    found = re.search(r"^__version__ = .*?'(\d+\.\d+\.\d+)", file.read_text() if file.exists() else "", re.MULTILINE)
    return found[1] if found else ""


@cache
def _defined(folder: Path, owner: str) -> frozenset[str]:
    """Return the names that a module or class defines; empty where there is none of that name."""
    body = _body(folder, owner)
    if body is not None:
        return frozenset(_names(body))
    module, _, name = owner.rpartition(".")
    classes = _body(folder, module) or []
    found = [node for node in classes if isinstance(node, ast.ClassDef) and node.name == name]
    return frozenset(found_name for node in found for found_name in _class_names(node))


def _body(folder: Path, module: str) -> list[ast.stmt] | None:
    """Return the statements of a module or package, or None if there is none of that name."""
    path = folder.joinpath(*module.split("."))
    file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)
    return ast.parse(file.read_text()).body if file else None


def _names(body: list[ast.stmt]) -> Iterator[str]:
    """Yield what statements bind."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def _class_names(node: ast.ClassDef) -> Iterator[str]:
    """Yield the attributes of a class, and those that its methods give to `self`."""
    yield from _names(node.body)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            yield inner.attr


def main() -> None:
    """Render or check the page, or read a tree."""
    parser = argparse.ArgumentParser(prog="python -m vllm_tap.vllm.support", description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, nargs="?", default=Path("docs/vllm-support.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    parser.add_argument("--tree", type=Path, metavar="FOLDER", help="look for the names in the vllm of this folder")
    arguments = parser.parse_args()
    if arguments.tree:
        absent = missing(arguments.tree)
        raise SystemExit("not there:\n" + "\n".join(absent) if absent else None)
    document: Path = arguments.document
    if arguments.check and (not document.exists() or document.read_text() != render()):
        raise SystemExit(f"{document} is out of date: run python -m vllm_tap.vllm.support {document}")
    if not arguments.check:
        document.write_text(render())


if __name__ == "__main__":
    main()
