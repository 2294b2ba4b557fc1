"""Models of a user's own, registered from outside vLLM: rows are right whatever their parts are called.

Runs a program beside the tests, with one engine at a time in its own process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import NUM_LAYERS
from runners import python_path

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).with_name("custom_models.py")
WHOLE_MODELS = {
    "OwnModel": "hidden + residual",
    "Twins": "hidden + residual",
    "Decoys": "hidden + residual",
    "Names": "hidden + residual",
    "Lists": "hidden",
}
"""Conventions of the layers of each."""


@pytest.fixture(scope="module")
def said(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Lines of the program, by model."""
    folder, short = tiny_model("llama"), tmp_path_factory.mktemp("custom") / "short"
    shutil.copytree(folder, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": python_path()}
    command = [sys.executable, str(PROGRAM), str(folder), str(short)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["model"]: line for line in lines}


@pytest.mark.parametrize("model", WHOLE_MODELS)
def test_rows_are_those_of_hugging_face(said, model):
    """With lists as long as that of the layers, norms and arguments of other names: what runs is taken."""
    found = said[model]
    assert "error" not in found, found
    assert found["layers"] == {
        "hidden_states": list(range(NUM_LAYERS)), "embeddings": [0], "final_hidden_states": [NUM_LAYERS - 1],
    }  # fmt: skip
    assert found["conventions"]["hidden_states"] == WHOLE_MODELS[model]


def test_a_model_that_leaves_early_has_the_layers_that_run(said):
    """Its rows are right; a layer behind the exit is refused by what has been seen of it."""
    found = said["Exit"]
    assert "error" not in found, found
    assert found["layers"]["hidden_states"] == [0, 1]
    assert found["refused"] == (
        "hidden_states: layer 3 has not run in any forward pass that was seen: the model leaves before it, or does not "
        "use it. Layers with hidden_states: [0, 1]."
    )
