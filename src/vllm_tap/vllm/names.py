"""Names that vLLM gives to requests, and words of its errors. Worker and client process."""

from __future__ import annotations

import re
from typing import Final

ENGINE_IS_GONE: Final = ("EngineDead", "EngineCore", "Executor failed", "RuntimeError: cancelled", "failed: cancelled")
"""Words in the errors of the supported versions of vLLM when the core, or a worker below it, has ended."""

# The children of a request with n > 1 are "{index}_{parent id}" (v1/engine/parallel_sampling.py).
_CHILD: Final = re.compile(r"(\d+)_")


def completion_of(request_id: str, num_completions: int) -> int:
    """Return which completion of its prompt an engine's request is."""
    child = _CHILD.match(request_id) if num_completions > 1 else None
    return int(child[1]) if child else 0


def is_request_of(request_id: str, completion: int, output_id: str) -> bool:
    """Tell whether an engine's request is the one of an output.

    Inside, vLLM puts something random behind a request's name, and the number of a completion before it.
    """
    inside = f"{output_id}-"
    if request_id.startswith(inside) or request_id == output_id:
        return True
    name = request_id.removeprefix(f"{completion}_")
    return name.startswith(inside) or name == output_id
