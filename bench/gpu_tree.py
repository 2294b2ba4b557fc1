#!/usr/bin/env python3
"""Lay a source tree out as an installed package: python3 bench/gpu_tree.py TREE SITE.

SITE gets a copy of TREE/src and the entry points that TREE/pyproject.toml names, by which vLLM finds the plugin. No
pip, no build: a bare machine has neither the network nor the backend for one. With SITE first on PYTHONPATH this tree
runs, whatever else is installed.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path


def lay_out(tree: Path, site: Path) -> None:
    """Copy the packages of a source tree to a folder, with what `importlib.metadata` reads of them."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    for package in sorted((tree / "src").iterdir()):
        shutil.rmtree(site / package.name, ignore_errors=True)
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    name, version = project["name"].replace("-", "_"), project["version"]
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
