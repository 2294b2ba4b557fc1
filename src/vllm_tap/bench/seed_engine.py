"""The payloads of the founding document and captures, from the end of a real engine's last forward pass to tensors.

Runs in the user's process of the benchmark and starts the engine: a Llama of 32 layers and width 4096 with random
weights, whose attention and MLP are so narrow that a small machine computes 1000 tokens in less than a minute.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from vllm_tap.bench.seed_paths import PATHS, SeedExtension, Tensors, timed
from vllm_tap.client.capture import capture
from vllm_tap.legacy.deserialize import deserialize_hidden_states
from vllm_tap.spec import Spec
from vllm_tap.vllm import frontend as client_engine
from vllm_tap.vllm import launch

NUM_TOKENS: Final = 1000
NUM_LAYERS: Final = 32
WIDTH: Final = 4096
LIST_ROWS: Final = 100
"""Rows that go as lists: of all, three processes would hold 4 GB of Python objects each."""

CONFIG: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}

LABELS: Final = {
    "lists": "nested lists, `collective_rpc`",
    "float32": "float32 bytes, `collective_rpc`",
    "payload": "`get_captured_hidden_states` of vllm-tap",
    "inline": '`vllm_tap.capture`, `transport="inline"`',
    "segment": "`vllm_tap.capture`",
}


class Bench:
    """An engine and the rows of one prompt in it."""

    def __init__(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        self.llm: Any = launch.start(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=NUM_TOKENS + 16,
            max_num_batched_tokens=NUM_TOKENS + 16,
            worker_extension_cls=f"{SeedExtension.__module__}.{SeedExtension.__qualname__}",
        )
        self.prompt = {"prompt_token_ids": [3 + 7 * number % 500 for number in range(NUM_TOKENS)]}
        self.rpc = self.llm.llm_engine.engine_core.collective_rpc

    def keep(self) -> None:
        """Run the prompt with worker calls enabled; the worker keeps its rows as tensors and as what they took."""
        self.rpc("enable_hidden_states_capture")
        params = client_engine.new_params(self.llm, {"max_tokens": 1, "temperature": 0.0})
        params.skip_reading_prefix_cache = True
        client_engine.generate(self.llm, [self.prompt], [params], use_tqdm=False)
        self.rpc("disable_hidden_states_capture")
        self.rpc("seed_keep")

    def run(self, name: str) -> tuple[float, Tensors]:
        """Return the seconds from the end of the forward pass to tensors, and these."""
        if name in PATHS:
            num_rows = LIST_ROWS if name == "lists" else NUM_TOKENS
            return timed(lambda: PATHS[name][1](self.rpc("seed_payload", args=(name, num_rows))[0]))
        if name == "payload":
            return timed(lambda: deserialize_hidden_states(self.rpc("get_captured_hidden_states")[0]))
        return self._capture(name)

    def _capture(self, transport: str) -> tuple[float, Tensors]:
        spec = Spec(hidden_states="all")
        result = capture(
            self.llm, [self.prompt], spec, transport=transport, progress=False, max_tokens=1, temperature=0.0
        )
        seconds, rows = timed(lambda: dict(result[0].hidden_states))
        return result.seconds["finish"] + result.seconds["check"] + seconds, rows


def run_engine(num_rounds: int) -> dict[str, Any]:
    """Time all ways in rounds, in random order, after a round that warms up; what arrives is compared bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.keep()
        seconds: dict[str, list[float]] = {name: [] for name in LABELS}
        for number in range(num_rounds + 1):
            for name, taken in _round(bench).items():
                if number:
                    seconds[name].append(taken)
        launch.stop(bench.llm)
    return {
        "model": "Llama, random weights",
        "num_layers": NUM_LAYERS,
        "shape": [NUM_TOKENS, WIDTH],
        "dtype": "bfloat16",
        "nbytes": 2 * NUM_LAYERS * NUM_TOKENS * WIDTH,
        "rows": [_row(name, taken) for name, taken in seconds.items()],
    }


def _round(bench: Bench) -> dict[str, float]:
    expected = bench.run("payload")[1]
    return {name: _checked(bench, name, expected) for name in random.sample(list(LABELS), len(LABELS))}


def _checked(bench: Bench, name: str, expected: Tensors) -> float:
    seconds, rows = bench.run(name)
    for layer, tensor in expected.items():
        if not torch.equal(rows[layer].view(torch.int16), tensor[: len(rows[layer])].view(torch.int16)):
            raise SystemExit(f"{name}: layer {layer} arrived with other bits than those that were sent")
    return seconds


def _row(name: str, taken: list[float]) -> dict[str, Any]:
    scale = NUM_TOKENS // LIST_ROWS if name == "lists" else 1
    return {
        "method": name,
        "label": LABELS[name],
        "median_ms": round(1e3 * scale * statistics.median(taken), 3),
        "min_ms": round(1e3 * scale * min(taken), 3),
        "rounds": len(taken),
        "measured_rows": NUM_TOKENS // scale,
        "scaled_by": scale,
    }
