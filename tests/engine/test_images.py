"""Prompts with images, in a process of its own that can import torchvision (see tests/vision)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runners import HERE, python_path

pytestmark = pytest.mark.engine

BESIDE = Path(sys.prefix) / "torchvision"
"""Where `make setup` puts torchvision, so that nothing else imports it by chance."""


def test_rows_of_prompts_with_images_are_those_of_hugging_face():
    """Every stream of a multimodal mixture of experts, through both interfaces, with images of several sizes."""
    paths = ["vision", BESIDE] if BESIDE.is_dir() else []
    if not paths and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: run make setup")
    environment = os.environ | {"PYTHONPATH": python_path(*paths)}
    command = [sys.executable, str(HERE / "vision" / "images.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
