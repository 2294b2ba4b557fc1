#!/usr/bin/env python3
"""Random traffic over every scheduling state, with a shadow check of every row: python tests/soak.py --rows 100000.

A tiny Llama runs in small engines that preempt, chunk prompts, hit the prefix cache and reject drafts; requests are
captured or plain, aborted at random, and finished at random lengths. Every captured row is compared with a Hugging Face
forward pass of its final sequence; the client has already checked that none is lost, doubled or of another token. The
printed line says what was met; the exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path.insert(0, str(Path(__file__).parent))

# Float32 on both sides; the sums of a layer run in another order. Relative to the largest value of the stream.
TOLERANCE = 1e-5
ROUND_REQUESTS = 12
SHARED_PREFIX = 96

ENGINES: dict[str, dict[str, Any]] = {
    "preempting": {
        "num_gpu_blocks_override": 28,
        "block_size": 32,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 10,
        "enable_prefix_caching": True,
    },
    "drafting": {
        "num_gpu_blocks_override": 64,
        "block_size": 32,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 12,
        "enable_prefix_caching": True,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
    },
}
MAX_MODEL_LEN = 384
METRICS = {
    "preemptions": "vllm:num_preemptions",
    "prefix hits (tokens)": "vllm:prefix_cache_hits",
    "drafts": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}


def start(model: Path, name: str) -> Any:
    """Start one of the small engines."""
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        disable_log_stats=False,
        **ENGINES[name],
    )


class Traffic:
    """Rounds of random requests on one engine."""

    def __init__(self, llm: Any, reference: Any, tokens_per_step: int, seed: int) -> None:
        self.llm, self.reference, self.tokens_per_step = llm, reference, tokens_per_step
        self.random = random.Random(seed)
        self.met: collections.Counter[str] = collections.Counter()
        self.prefix = [self.random.randrange(3, 250) for _ in range(SHARED_PREFIX)]
        self.number = 0

    def prompt(self) -> list[int]:
        """Return a prompt: repetitive ones draw drafts, shared beginnings prefix hits, long ones are chunked."""
        kind = self.random.random()
        length = self.random.choice((1, 2, 7, 33, 64, 120, 200))
        if kind < 0.3:
            return self.prefix + [self.random.randrange(3, 250) for _ in range(length)]
        if kind < 0.6:
            unit = [self.random.randrange(3, 250) for _ in range(max(2, length // 6))]
            return (unit * 64)[: max(4, length)]
        return [self.random.randrange(3, 250) for _ in range(length)]

    def params(self, prompt: list[int]) -> Any:
        """Return sampling parameters that end in one of several ways."""
        from vllm import SamplingParams

        room = MAX_MODEL_LEN - len(prompt)
        return SamplingParams(
            max_tokens=min(room, self.random.choice((1, 2, 9, 40, 90))),
            temperature=self.random.choice((0.0, 0.0, 0.7)),
            ignore_eos=True,
            stop_token_ids=[self.random.randrange(512) for _ in range(2)],
            detokenize=False,
        )

    def round(self) -> int:
        """Run one capture over random traffic; return the rows checked."""
        from vllm_tap import Recording, Spec

        recording = Recording(self.llm, Spec(hidden_states="all"))
        engine = self.llm.llm_engine
        waiting, samples, plain = [], {}, set()
        for _ in range(ROUND_REQUESTS):
            prompt, request_id = self.prompt(), str(self.number)
            self.number += 1
            params = self.params(prompt)
            if self.random.random() < 0.8:
                params = recording.mark(params, len(samples))
                samples[request_id] = len(samples)
            else:
                plain.add(request_id)
            waiting.append((request_id, prompt, params))
        outputs: list[Any] = [None] * len(samples)
        alive: set[str] = set()
        while waiting or engine.has_unfinished_requests():
            for _ in range(self.random.randrange(4) if waiting else 0):
                if waiting:
                    request_id, prompt, params = waiting.pop()
                    engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
                    alive.add(request_id)
            for output in engine.step():
                if output.finished:
                    alive.discard(output.request_id)
                    if output.request_id in samples:
                        outputs[samples[output.request_id]] = output
            if alive and self.random.random() < 0.02:
                victim = self.random.choice(sorted(alive))
                engine.abort_request([victim])
                alive.discard(victim)
                self.met["aborts"] += 1
        result = recording.finish(outputs)
        self.met["plain requests"] += len(plain)
        return self.check(result)

    def check(self, result: Any) -> int:
        """Compare all rows of a capture with the reference."""
        import torch

        for sample, output in enumerate(result.outputs):
            if output is None:
                continue
            ids = list(output.prompt_token_ids) + list(output.outputs[0].token_ids)[:-1]
            rows = result[sample]
            if rows.token_ids.tolist() != ids or rows.positions.tolist() != list(range(len(ids))):
                self.met["mismatches"] += len(ids)
                continue
            expected = self.reference.run(ids).hidden_states
            got = torch.stack([rows.hidden_states[layer] for layer in result.layers["hidden_states"]])
            error = (got - expected).abs().amax((0, 2)) / expected.abs().max()
            self.met["mismatches"] += int((error > TOLERANCE).sum())
            self.met["samples"] += 1
            # Counted where a prompt alone is longer than a step; others are cut where they share one.
            self.met["chunk splits"] += (len(output.prompt_token_ids) - 1) // self.tokens_per_step
        return int(result.num_rows)


def metrics(llm: Any) -> dict[str, int]:
    """Return the engine's own counts of what happened in it."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {name: int(values.get(source, 0)) for name, source in METRICS.items()}


def soak(model: Path, name: str, rows: int, seed: int) -> dict[str, int]:
    """Run one engine until enough rows have been checked."""
    from reference import ReferenceModel

    llm = start(model, name)
    traffic = Traffic(llm, ReferenceModel(model), ENGINES[name]["max_num_batched_tokens"], seed)
    checked, begin = 0, time.monotonic()
    while checked < rows:
        checked += traffic.round()
        print(f"# {name}: {checked} of {rows} rows, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    met = {"rows": checked, "mismatches": 0, **traffic.met, **metrics(llm)}
    met["rejected drafts"] = met["drafts"] - met["accepted"]
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    args = parser.parse_args()
    from models import ensure_model

    model = ensure_model(Path(__file__).parent.parent / "models" / "tiny", "llama")
    total: collections.Counter[str] = collections.Counter()
    for number, name in enumerate(args.engines):
        met = soak(model, name, args.rows // len(args.engines), args.seed + number)
        print(json.dumps({"engine": name, **met}), flush=True)
        total.update(met)
    print(json.dumps({"engine": "all", **total}), flush=True)
    sys.exit(1 if total["mismatches"] else 0)


if __name__ == "__main__":
    main()
