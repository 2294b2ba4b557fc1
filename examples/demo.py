"""Capture every layer of a small model on the processor, and watch its next token take shape from layer to layer.

Runs by hand or from `make demo`, which first prepares the model: `python examples/demo.py [MODEL]`. The rows come from
vLLM; the logit lens over them (final norm and output weights on every layer's rows) is computed here, in float32. Ends
with the rows as a dataset, pictures of it and a page to look at, in build/demo.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_tap import Capture, Spec, capture, open_dataset
from vllm_tap.cli.table import columns, summary
from vllm_tap.viz import page, plots
from vllm_tap.viz.lens import Lens, lens_of
from vllm_tap.vllm.launch import stop

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "models" / "SmolLM2-135M-Instruct"
OUTPUT = HERE.parent / "build" / "demo"
NUM_TOKENS = 16
NUM_SHOWN = 2
"""Samples of the page: the lens looks at each of their rows, in every layer."""


def main() -> None:
    """Capture, print the table and the lens, and leave a dataset, pictures and a page."""
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
    lens = lens_of(str(folder))
    show_lens(result, tokenizer, lens)
    keep(result, tokenizer, lens)


def start(folder: Path) -> Any:
    """Start vLLM, with its log turned down and nothing asked of a hub."""
    for name, value in {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    # Eager because compiling takes minutes on a few cores; a part of the memory because others may use the rest.
    return LLM(str(folder), max_model_len=1024, enforce_eager=True, gpu_memory_utilization=0.4)


def show_lens(result: Capture, tokenizer: Any, lens: Lens) -> None:
    """Print every layer's best guess at the token after the first prompt, and compare the last with vLLM's own."""
    output = result.outputs[0]
    last = len(output.prompt_token_ids) - 1
    layers = result[0].hidden_states
    tokens, shares = lens(torch.stack([rows[last] for rows in layers.values()]).float().numpy())
    print(f"After {output.prompt[-46:]!r}, what would each layer say?")
    rows = [("layer", "token", "probability")]
    for layer, token, probability in zip(layers, tokens.tolist(), shares.tolist(), strict=True):
        rows.append((str(layer), repr(tokenizer.decode([token])), f"{probability:.3f}"))
    print(columns(rows, right=(0, 2)), end="\n\n")
    chosen = output.outputs[0].token_ids[0]
    if tokens[-1] != chosen:
        sys.exit(f"layer {max(layers)} says token {int(tokens[-1])}, and vLLM generated {chosen}: please report this")
    print(f"vLLM went on with {output.outputs[0].text!r}")
    print(f"The demo works: the last layer's token is the one that vLLM generated, {tokenizer.decode([chosen])!r}.")


def keep(result: Capture, tokenizer: Any, lens: Lens) -> None:
    """Write the rows as a dataset, and what can be looked at."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    result.save(OUTPUT / "run")
    dataset = open_dataset(OUTPUT / "run")
    for name in plots.available(dataset):
        plots.save(plots.PLOTS[name](dataset), OUTPUT / f"{name}.png")
    page.write(
        page.page(dataset, range(NUM_SHOWN), lambda token: tokenizer.decode([token]), lens), OUTPUT / "view.html"
    )
    print(
        f"\nIn {os.path.relpath(OUTPUT)}: the rows as a dataset in run/, pictures of it, and view.html for a browser."
    )
    print(f"Try `vllm-tap inspect {os.path.relpath(OUTPUT / 'run')}` next.")


if __name__ == "__main__":  # vLLM starts its processes by spawn: they import this file
    main()
