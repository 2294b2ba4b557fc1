"""Names that vLLM must have, and versions that fit: every look inside it goes through here. Any process.

`assumptions` lists each name that is used, with the reason and the versions it was read from; `require` refuses by that
name where it is not there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Final

from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm.assumptions import Assumption, why

OLDEST: Final = (0, 26)
NEWEST: Final = (0, 33)


def require(owner: Any, name: str) -> Any:
    """Return an attribute of a vLLM object that `assumptions` lists, or refuse with its name.

    Raises:
        EngineUnsupportedError: This vLLM does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner)
        raise EngineUnsupportedError(
            f"vLLM {vllm_version()} has no {kind.__module__}.{kind.__qualname__}.{name}, which is needed {why(name)}. "
            f"This package was made for vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}."
        ) from None


def require_fields(entries: Iterable[Assumption]) -> None:
    """Refuse where a class lacks fields that only its instances have: no step of the engine may fail for one.

    Raises:
        EngineUnsupportedError: The first that is missing.
    """
    for entry in entries:
        module, _, name = entry.owner.rpartition(".")
        kind: Any = getattr(import_module(module), name)
        declared = {field for base in kind.__mro__ for field in vars(base).get("__annotations__", ())}
        for field in entry.names:
            if field not in declared:
                require(kind, field)


def vllm_version() -> str:
    """Return vLLM's version as it states it."""
    import vllm

    return str(vllm.__version__)


def check_version() -> None:
    """Refuse versions of vLLM from before the hook points that this module uses.

    Raises:
        EngineUnsupportedError: Too old.
    """
    release = tuple(int(part) for part in vllm_version().split("+")[0].split(".")[:2] if part.isdigit())
    if release and release < OLDEST:
        raise EngineUnsupportedError(f"vLLM {vllm_version()} is older than {OLDEST[0]}.{OLDEST[1]}: upgrade vLLM.")
