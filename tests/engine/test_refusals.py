"""Engines that run without the plugin: plain generation works, and a capture says what to do.

Runs in the test process, beside one engine at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.engines import Engine, References, prompts, surroundings
from vllm_tap import Spec
from vllm_tap.errors import PluginNotLoadedError

pytestmark = pytest.mark.engine

WAYS = {
    "not listed": ({"VLLM_PLUGINS": "another_plugin"}, r"VLLM_PLUGINS='another_plugin' does not name it: add vllm_tap"),
    "switched off": ({"VLLM_TAP": "0"}, r"VLLM_TAP=0 switches it off: unset it"),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """A way to have engines without the plugin."""
    return request.param


@pytest.fixture(scope="module")
def engine(way: str, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An eager Llama engine without the plugin; the variables stay set, as in a user's process."""
    with surroundings(WAYS[way][0]):
        engine = Engine(tiny_model("llama"), enforce_eager=True)
        yield engine
        engine.close()


def test_a_capture_says_how_to_load_the_plugin(way, engine):
    """The message names the setting that keeps the plugin away, and says to restart."""
    with pytest.raises(PluginNotLoadedError, match=f"{WAYS[way][1]}.*restart"):
        engine.capture(prompts(), Spec(hidden_states="all"))


def test_generation_is_plain(engine, references: Callable[[str], References]):
    """Tokens are Hugging Face's, before and after a capture that was refused."""
    before = engine.generate(prompts())
    with pytest.raises(PluginNotLoadedError):
        engine.capture(prompts(), Spec(hidden_states="all"))
    assert engine.generate(prompts()) == before
    for prompt, tokens in zip(prompts(), before, strict=True):
        given = prompt["prompt_token_ids"]
        logits = references("llama").of([*given, *tokens[:-1]]).logits[len(given) - 1 :]
        assert logits.argmax(-1).tolist() == tokens


TWO_CONFIGURATIONS = """
import os, sys
os.environ["VLLM_TAP"] = "0"
from vllm.engine.arg_utils import EngineArgs
plain = EngineArgs(sys.argv[1], dtype="float32", max_model_len=256).create_engine_config()
del os.environ["VLLM_TAP"]
tapped = EngineArgs(sys.argv[1], dtype="float32", max_model_len=256).create_engine_config()
assert plain.compute_hash() != tapped.compute_hash(), "both engines would share compiled graphs"
"""


def test_a_process_may_switch_the_plugin_on_after_an_engine_without_it(tiny_model):
    """Engines with and without taps in one process never share compiled graphs, whichever is configured first."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VLLM_TAP", "VLLM_PLUGINS")}
    command = [sys.executable, "-c", TWO_CONFIGURATIONS, str(tiny_model("llama"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
