#!/usr/bin/env python3
"""Random traffic over every scheduling state, with a shadow check of every row: python tests/soak.py --rows 100000.

A tiny Llama runs in small engines that preempt, chunk prompts, hit the prefix cache and reject drafts; requests are
captured or plain, aborted at random, and finished in every way. Several captures of several clients overlap, whose
samples have Specs of their own: streams, layers, positions, reductions and dtypes; some are read as streams. Every
captured row is compared with a Hugging Face forward pass of its final sequence (`shadow`). The last lines say what was
met. The exit status is 1 if a row was wrong, lost or doubled, if memory was not given back, if nothing happened for
minutes, or if a state was met too seldom.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# An engine of this size is fastest on one core; threads of OpenMP that wait for each other only take turns.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import device
import surroundings  # noqa: F401
from draws import BLOCK_SIZE, LIMITS, MAX_MODEL_LEN
from runners import asynchronous_scheduling, simulated_environment, v2_environment
from traffic import Traffic

RELEASE_S = 20

IS_PREPARED = "VLLM_TAP_SOAK_IS_PREPARED"
"""Set in a process that has been started anew with the surroundings that its engines need."""


class Kind(dict[str, Any]):
    """Arguments of an engine; what comes before them is the soak's own.

    Args:
        share: Of all rows.
        requests: In a round.
        asynchronous: Whether a step is scheduled before the tokens of the last one are known.
    """

    def __init__(self, share: float, requests: int, asynchronous: bool = False, **arguments: Any) -> None:
        super().__init__(block_size=BLOCK_SIZE, enable_prefix_caching=True, **arguments)
        self.share, self.requests, self.asynchronous = share, requests, asynchronous


ENGINES = {
    "preempting": Kind(0.6, 96, max_num_batched_tokens=96, max_num_seqs=32),
    "asynchronous": Kind(0.3, 96, True, max_num_batched_tokens=96, max_num_seqs=32),
    "drafting": Kind(
        0.1,
        48,
        max_num_batched_tokens=128,
        max_num_seqs=24,
        speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3},
    ),
}
BLOCKS = {"v1": 64, "v2": 28}
"""Of the key-value cache, by runner: so few that requests are preempted; those on the V2 runner are shorter."""

METRICS = {
    "preemptions": "vllm:num_preemptions",
    "drafts": "vllm:spec_decode_num_draft_tokens",
    "accepted drafts": "vllm:spec_decode_num_accepted_tokens",
}
FEWEST = {
    "preemptions": 50,
    "chunk splits": 500,
    "prefix hits avoided": 100,
    "rejected drafts": 100,
    "aborts": 50,
    "captures beside others": 50,
    "captures of other clients": 50,
    "captures with a Spec for each sample": 50,
    "samples of one row": 500,
    "samples by an expression": 500,
    "streams of samples": 10,
    "streams of rows": 10,
}
"""How often each state must be met in a million rows."""

WRONG = ("mismatches", "captures failed", "prefix hits too long", "bytes not given back")
"""Counts that must be zero."""


def start(model: Path, kind: Kind, num_blocks: int) -> Any:
    """Start one of the small engines."""
    from vllm import LLM

    arguments = device.engine_arguments(
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        disable_log_stats=False,
        num_gpu_blocks_override=num_blocks,
        **kind,
    )
    if device.ON_CUDA:
        return LLM(str(model), async_scheduling=kind.asynchronous, **arguments)
    with asynchronous_scheduling() if kind.asynchronous else nullcontext():
        return LLM(str(model), **arguments)


def runner(llm: Any) -> str:
    """Return which of vLLM's runners an engine uses: "v1" or "v2"."""
    from vllm_tap.client.connection import connect

    return connect(llm).hellos[0].runner.lower()


def metrics(llm: Any) -> dict[str, int]:
    """Return the engine's own counts of what happened in it."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    counts = {name: int(values.get(source, 0)) for name, source in METRICS.items()}
    return {**counts, "rejected drafts": counts["drafts"] - counts["accepted drafts"]}


def held_bytes(llm: Any) -> int:
    """Return the bytes of rows that the engine still holds when nobody has any, once releases have arrived."""
    deadline = time.monotonic() + RELEASE_S
    while True:
        used = sum(state["used_bytes"] for state in llm.collective_rpc("vllm_tap_status"))
        if not used or time.monotonic() > deadline:
            return int(used)
        time.sleep(0.05)


def soak(model: Path, name: str, rows: int, seed: int, expected_runner: str) -> dict[str, Any]:
    """Run one engine until enough rows have been checked."""
    from reference import ReferenceModel
    from shadow import Shadow

    kind = ENGINES[name]
    llm = start(model, kind, BLOCKS[expected_runner])
    assert runner(llm) == expected_runner
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == kind.asynchronous
    shadow = Shadow(ReferenceModel(model))
    traffic = Traffic(llm, shadow, kind["max_num_batched_tokens"], kind.requests, LIMITS[expected_runner], seed)
    begin = printed = time.monotonic()
    while shadow.num_rows < rows:
        traffic.round()
        if time.monotonic() - printed > 10:
            printed = time.monotonic()
            print(
                f"# {name}: {shadow.num_rows} of {rows} rows, {shadow.num_wrong} wrong, {printed - begin:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    traffic.drain()
    met = {**traffic.met, **metrics(llm), "bytes not given back": held_bytes(llm)}
    llm.llm_engine.engine_core.shutdown()
    seconds = {part: round(value) for part, value in traffic.seconds.items()}
    line = {"rows": shadow.num_rows, "mismatches": shadow.num_wrong, "largest error": float(f"{shadow.error:.2g}")}
    line |= {name: met[name] for name in sorted(met)}
    print(json.dumps({"engine": name, "runner": expected_runner, "seed": seed, **line, "seconds": seconds}), flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runner", choices=["v1", "v2"], default="v1", help="v2 goes through Triton's interpreter")
    parser.add_argument("--simulated-cuda", action="store_true", help="rows take the way of CUDA engines, interpreted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    args = parser.parse_args()
    if (args.simulated_cuda or args.runner == "v2") and IS_PREPARED not in os.environ and not device.ON_CUDA:
        environment = simulated_environment(args.runner.upper()) if args.simulated_cuda else v2_environment()
        os.execve(sys.executable, [sys.executable, *sys.argv], environment | {IS_PREPARED: "1"})
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if args.runner == "v2" else "0"
    import torch

    from models import ensure_model

    torch.set_num_threads(1)
    model = ensure_model(Path(__file__).parent.parent / "models" / "tiny", "llama")
    total: collections.Counter[str] = collections.Counter()
    error = 0.0
    shares = sum(ENGINES[name].share for name in args.engines)
    for number, name in enumerate(args.engines):
        line = soak(model, name, round(args.rows * ENGINES[name].share / shares), args.seed + number, args.runner)
        error = max(error, line.pop("largest error"))
        total.update(line)
    rare = {state: total[state] for state, fewest in FEWEST.items() if total[state] < fewest * args.rows // 1_000_000}
    wrong = {what: total[what] for what in WRONG if total[what]}
    print(json.dumps({"engine": "all", "runner": args.runner, **total, "largest error": error}), flush=True)
    print(f"FAILED: {wrong}" if wrong else "no row wrong, lost or doubled", flush=True)
    if rare and len(args.engines) == len(ENGINES):
        sys.exit(f"FAILED: met too seldom: {rare}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
