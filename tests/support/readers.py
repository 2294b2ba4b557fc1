"""Packages that read what we export: imported where they are installed, else their tests skip."""

from __future__ import annotations

import importlib
import os
import sys
import typing
from typing import Any

import pytest

EXPECTED = os.environ.get("VLLM_TAP_READERS", "").split()
"""Packages that `make test-interchange` has installed: their tests must not skip."""


def reader(name: str) -> Any:
    """Return a module, or skip the test; an error where its package must be there."""
    if name.partition(".")[0] in EXPECTED:
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)


def allow_typed_dicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packages for Python 3.12 be imported by 3.11: pydantic refuses this one class of `typing` there."""
    if sys.version_info < (3, 12):
        import typing_extensions

        monkeypatch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
