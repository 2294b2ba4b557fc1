"""Rows from an `AsyncLLM`, beside other requests: at the end, as samples end, and into datasets.

python examples/async_llm.py MODEL FOLDER [DATA_PARALLEL_SIZE]
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

from vllm_tap import AsyncTap, DatasetWriter, Spec, open_dataset

PROMPTS = ["The capital of France is", "Two and two make", "The sky is", "Water boils at"]


async def main(async_llm: Any, folder: Path) -> None:
    """Capture from an engine in three ways, and print what came."""
    tap = AsyncTap(async_llm)  # of data parallel engines, each prompt goes to the one with the fewest

    everything, last = await asyncio.gather(
        tap.capture(PROMPTS, Spec(hidden_states="all"), max_tokens=8, temperature=0),
        tap.capture(PROMPTS[:2], Spec(hidden_states=[-1], positions="last"), max_tokens=1, temperature=0),
    )
    print(everything.rows("hidden_states", -1).shape, last.rows("hidden_states", -1).shape)

    dataset = await tap.record(PROMPTS, Spec(hidden_states=[0, -1]), folder / "prompts", max_tokens=8, temperature=0)
    print(len(dataset), dataset.rows("hidden_states", 0).shape)

    generated = Spec(hidden_states=[-1], positions="generated")
    with DatasetWriter(folder / "tries") as writer:
        stream = tap.stream(PROMPTS, generated, n=4, max_tokens=16, temperature=1.0, ignore_eos=True)
        async with aclosing(stream) as samples:  # leaving the block aborts what still runs
            async for sample in samples:
                reward = float(sample.hidden_states[-1].float().norm(dim=-1).mean())
                writer.add(sample, {"prompt": sample.index, "reward": reward})
    tries = open_dataset(folder / "tries")
    print(max(tries, key=lambda one: one.metadata["reward"]).text)


if __name__ == "__main__":  # vLLM starts processes that import this file
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run(model: str, folder: str, size: str = "1") -> None:
        """Start the engines, and end them."""
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, data_parallel_size=int(size)))
        try:
            await main(llm, Path(folder))
        finally:
            llm.shutdown()

    asyncio.run(run(*sys.argv[1:]))
