"""Fixtures and surroundings of all tests; runs in the test process before any test module is imported.

Helpers in `support` are imported by their own name: `from models import FAMILIES`, `from reference import ...`.
Skips are printed with their reasons at the end (-ra in pyproject.toml): a skip is not a pass.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

import surroundings  # noqa: F401
from models import ensure_model, fingerprint

_CACHE_ROOT = Path(tempfile.mkdtemp(prefix="vllm-tap-tests-"))

os.environ.setdefault("VLLM_CACHE_ROOT", str(_CACHE_ROOT))

# A shell that starts the tests in the background has them ignore the key, and processes that they start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test depends on how fast the machine is.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


def pytest_unconfigure() -> None:
    """Remove the folder in which vLLM kept its compiled graphs."""
    shutil.rmtree(_CACHE_ROOT, ignore_errors=True)


@pytest.fixture(scope="session")
def models_dir(pytestconfig: pytest.Config) -> Path:
    """The folder of tiny models, kept between runs as long as tests/support/models.py and its libraries stay."""
    folder = pytestconfig.rootpath / "models" / "tiny" / fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_model(models_dir: Path) -> Callable[..., Path]:
    """A function (family, dtype="float32") that returns the folder of that tiny model."""

    def make(family: str, dtype: str = "float32") -> Path:
        return ensure_model(models_dir, family, dtype)

    return make
