"""Capture every layer of a small model on the processor, and watch its next token take shape from layer to layer.

Runs by hand or from `make demo`, which first prepares the model: `python examples/demo.py [MODEL]`. The rows come from
vLLM; the logit lens over them (final norm and output weights on every layer's rows) is computed here, in float32.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from vllm_tap import Capture, Spec, capture
from vllm_tap.cli.table import columns, summary
from vllm_tap.vllm.launch import stop

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "models" / "SmolLM2-135M-Instruct"
NUM_TOKENS = 16


class Head(NamedTuple):
    """What turns the last layer's rows into logits."""

    norm: torch.Tensor
    epsilon: float
    output: torch.Tensor

    def probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the next token's probabilities [R, V] for rows [R, D] of the residual stream."""
        rows = rows.float()
        normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.epsilon) * self.norm
        return (normed @ self.output.T).softmax(-1)


def main() -> None:
    """Capture, then print the table and the lens."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    if not (folder / "config.json").is_file():
        sys.exit(f"{folder} is not there: run `make demo`, or examples/prepare_model.py first")
    prompts = (HERE / "texts.txt").read_text().splitlines()
    print(f"starting vLLM on {folder.name} (about a minute)", flush=True)
    llm = start(folder)
    result = capture(llm, prompts, Spec(hidden_states="all"), max_tokens=NUM_TOKENS, temperature=0)
    tokenizer = llm.get_tokenizer()
    stop(llm)  # the rows outlive the engine
    print(summary(result), end="\n\n")
    show_lens(result, tokenizer, read_head(folder))


def start(folder: Path) -> Any:
    """Start vLLM, with its log turned down and nothing asked of a hub."""
    for name, value in {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    # Eager because compiling takes minutes on a few cores; a part of the memory because others may use the rest.
    return LLM(str(folder), max_model_len=1024, enforce_eager=True, gpu_memory_utilization=0.4)


def read_head(folder: Path) -> Head:
    """Read the final norm and the output weights, which this model shares with its embeddings."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        tied = "lm_head.weight" not in weights.keys()  # noqa: SIM118 - not a mapping
        output = weights.get_tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
        return Head(weights.get_tensor("model.norm.weight").float(), config["rms_norm_eps"], output.float())


def show_lens(result: Capture, tokenizer: Any, head: Head) -> None:
    """Print every layer's best guess at the token after the first prompt, and compare the last with vLLM's own."""
    output = result.outputs[0]
    last = len(output.prompt_token_ids) - 1
    layers = result[0].hidden_states
    best, tokens = head.probabilities(torch.stack([rows[last] for rows in layers.values()])).max(-1)
    print(f"After {output.prompt[-46:]!r}, what would each layer say?")
    rows = [("layer", "token", "probability")]
    for layer, token, probability in zip(layers, tokens.tolist(), best.tolist(), strict=True):
        rows.append((str(layer), repr(tokenizer.decode([token])), f"{probability:.3f}"))
    print(columns(rows, right=(0, 2)), end="\n\n")
    chosen = output.outputs[0].token_ids[0]
    if tokens[-1] != chosen:
        sys.exit(f"layer {max(layers)} says token {int(tokens[-1])}, and vLLM generated {chosen}: please report this")
    print(f"vLLM went on with {output.outputs[0].text!r}")
    print(f"The demo works: the last layer's token is the one that vLLM generated, {tokenizer.decode([chosen])!r}.")


if __name__ == "__main__":  # vLLM starts its processes by spawn: they import this file
    main()
