"""The README's example as a file: `python examples/quickstart.py [MODEL]`."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm import LLM

from vllm_tap import Spec, capture

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"


def main() -> None:
    """Capture two prompts and look at one layer."""
    model = sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL)
    if model == str(DEMO_MODEL) and not (DEMO_MODEL / "config.json").is_file():
        raise SystemExit(f"{model} is not there: `make demo` makes it, or name a model.")
    llm = LLM(model, max_model_len=512, gpu_memory_utilization=0.5)
    result = capture(llm, ["The capital of France is", "Bees dance"], Spec(hidden_states="all"), max_tokens=8)
    rows = result[0].hidden_states[-1]
    print(result)
    print(rows.shape, rows.dtype, result[0].positions, result[0].token_ids)


if __name__ == "__main__":  # vLLM starts its processes by spawn: they import this file
    main()
