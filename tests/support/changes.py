"""Changes modules as soon as they are imported. Used by the sitecustomize modules of tests, in processes of engines."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as Python would, and has their changes made when they have run."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        self._changes = changes

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        change = self._changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


def when_imported(changes: dict[str, Callable[[Any], None]]) -> None:
    """Have a function called with each of these modules, once it has been imported."""
    sys.meta_path.insert(0, _Finder(changes))
