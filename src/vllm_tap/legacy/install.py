"""Makes `vllm.hidden_states` importable, as it was in the fork.

Runs in the client. Imports neither vLLM nor torch: the functions are loaded when first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

PARENT: Final = "vllm"
NAME: Final = "vllm.hidden_states"
BEHIND: Final = "vllm_tap.legacy.deserialize"
FUNCTIONS: Final = (
    "deserialize_hidden_states",
    "deserialize_moe_router_logits",
    "extract_moe_layer_id_from_name",
    "is_moe_layer",
    "print_hidden_states_summary",
    "print_moe_router_logits_summary",
)


def offer_vllm_hidden_states() -> None:
    """Let `import vllm.hidden_states` find the module, after all other places. Loads and looks up nothing now."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def install_vllm_hidden_states() -> ModuleType | None:
    """Put the module `vllm.hidden_states` in place, unless there is one. May be called again.

    It can be imported without vLLM; once that is loaded, it is an attribute of it.

    Returns:
        The loaded module; None if vLLM ships one that is not loaded yet, which is left to Python's own import.
    """
    present = sys.modules.get(NAME)
    if present is None and _shipped_by_vllm():
        return None
    module = _stand_in() if present is None else present
    sys.modules[NAME] = module
    parent = sys.modules.get(PARENT)
    if parent is None:
        if _PARENT_FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _PARENT_FINDER)
    elif not hasattr(parent, "hidden_states"):
        parent.hidden_states = module  # type: ignore[attr-defined]
    return module


class _Finder(MetaPathFinder, Loader):
    """The last finder that Python asks for `vllm.hidden_states`, once vLLM is loaded and has none."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(NAME, self, origin=__name__) if fullname == NAME else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _stand_in()

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: functions are looked up when they are first used."""


class _ParentFinder(MetaPathFinder):
    """Asked first for vLLM until that is loaded: Python makes no attribute of a module that was there before."""

    def __init__(self) -> None:
        self._asks = threading.local()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != PARENT or getattr(self._asks, "others", False):
            return None
        self._asks.others = True
        try:
            spec = importlib.util.find_spec(PARENT)
        finally:
            self._asks.others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_install(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                install_vllm_hidden_states()

            spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


_FINDER: Final = _Finder()
_PARENT_FINDER: Final = _ParentFinder()


def _shipped_by_vllm() -> bool:
    """Tell whether vLLM's folder holds the module. `find_spec` of the dotted name would import vLLM."""
    try:
        spec = importlib.util.find_spec(PARENT)
    except ValueError:  # sys.modules holds a vllm without a spec, such as a test's stand-in
        return False
    folders = spec.submodule_search_locations if spec else None
    return folders is not None and PathFinder.find_spec(NAME, folders) is not None


def _stand_in() -> ModuleType:
    module = ModuleType(NAME, f"The functions of `{BEHIND}` under their old name.")
    module.__spec__ = ModuleSpec(NAME, loader=None, origin=__name__)
    module.__package__ = NAME
    vars(module)["__all__"] = list(FUNCTIONS)
    vars(module)["__getattr__"] = _lookup_for(module)
    vars(module)["__dir__"] = lambda: sorted({*vars(module), *FUNCTIONS})
    return module


def _lookup_for(module: ModuleType) -> Callable[[str], Any]:
    def lookup(name: str) -> Any:
        if name not in FUNCTIONS:
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}: it has {list(FUNCTIONS)}")
        function = getattr(importlib.import_module(BEHIND), name)
        setattr(module, name, function)
        return function

    return lookup
