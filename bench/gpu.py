#!/usr/bin/env python3
"""Measure captures against the plain engine on a GPU: one process, two engines in turn, medians.

    python bench/gpu.py --models MODELS --shape llama-8b --out results.json

`MODELS/llama-8b` and `MODELS/qwen3-30b-a3b` hold a config.json each; weights are dummies. The plain engine runs without
the plugin (VLLM_TAP=0), the other one idle and capturing; every round runs all arms once, on the same fresh prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_USE_DEEP_GEMM", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

WORKLOADS = {
    "prefill 1 x 1000": (1, 1000, 1),
    "prefill 64 x 1000": (64, 1000, 1),
    "prefill 16 x 8000": (16, 8000, 1),
    "decode 8 x (64 + 128)": (8, 64, 128),
    "decode 64 x (64 + 128)": (64, 64, 128),
    "decode 256 x (64 + 128)": (256, 64, 128),
}
SPECS: dict[str, dict[str, Any]] = {
    "all layers": {"hidden_states": "all"},
    "3 layers": {"hidden_states": [0, 15, -1]},
    "last position, all layers": {"hidden_states": "all", "positions": "last"},
    "router logits and experts": {"router_logits": "all", "routed_experts": "all"},
}
BUDGET_BYTES = 56 << 30

Plan = list[tuple[str, list[str], int]]
"""(workload, specs, rounds), one after another on the same engines."""

PLANS: dict[str, Plan] = {
    "short": [
        ("decode 8 x (64 + 128)", ["all layers"], 5),
        ("decode 64 x (64 + 128)", ["all layers"], 5),
        ("decode 256 x (64 + 128)", ["all layers"], 5),
        ("prefill 64 x 1000", ["all layers"], 5),
        ("prefill 16 x 8000", ["all layers"], 3),
        ("decode 64 x (64 + 128)", ["3 layers", "last position, all layers"], 3),
        ("prefill 64 x 1000", ["3 layers", "last position, all layers"], 3),
    ],
    "full": [(name, ["all layers", "3 layers", "last position, all layers"], 5) for name in WORKLOADS],
    "router": [
        ("decode 8 x (64 + 128)", ["router logits and experts"], 5),
        ("decode 256 x (64 + 128)", ["router logits and experts", "all layers"], 5),
        ("prefill 64 x 1000", ["router logits and experts", "all layers"], 5),
    ],
}


def rates() -> dict[str, float]:
    """Measure device-to-host and device copy rates in GB/s; device copies count bytes read and written."""
    import torch

    nbytes = 1 << 30
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(device)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def seconds(target: torch.Tensor) -> float:
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            target.copy_(device, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    return {"d2h": nbytes / seconds(host) / 1e9, "device_copy": 2 * nbytes / seconds(other) / 1e9}


def start_engine(model: Path, tapped: bool, memory: float, extra: dict[str, Any]) -> Any:
    """Start an engine with dummy weights, with or without the plugin."""
    from vllm import LLM

    os.environ["VLLM_TAP"] = "1" if tapped else "0"
    begin = time.perf_counter()
    arguments = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 8192,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": memory,
        "enable_prefix_caching": False,
        **extra,
    }
    llm = LLM(**arguments)
    print(f"# {'tapped' if tapped else 'plain'} engine: {time.perf_counter() - begin:.0f} s", flush=True)
    return llm


class Bench:
    """Two engines, and the arms that are timed on them."""

    def __init__(self, plain: Any, tapped: Any, seed: int = 0) -> None:
        self.plain, self.tapped, self.random = plain, tapped, random.Random(seed)

    def prompts(self, workload: tuple[int, int, int]) -> list[dict[str, Any]]:
        """Return fresh random prompts."""
        num_prompts, length, _ = workload
        return [
            {"prompt_token_ids": [self.random.randrange(10, 30000) for _ in range(length)]} for _ in range(num_prompts)
        ]

    def generate(self, llm: Any, prompts: list[Any], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Time plain generation."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]

    def capture(self, prompts: list[Any], max_tokens: int, spec: dict[str, Any], staging: str) -> tuple[float, Any]:
        """Time a capture, until its rows are in this process's hands."""
        import vllm_tap

        begin = time.perf_counter()
        result = vllm_tap.capture(
            self.tapped,
            prompts,
            vllm_tap.Spec(**spec),
            budget_bytes=BUDGET_BYTES,
            staging=staging,
            progress=False,
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
        )
        return time.perf_counter() - begin, result

    def check(self) -> dict[str, Any]:
        """Check rows before timing: equal prompts give equal rows, staged and direct captures the same bytes."""
        import torch

        free = [torch.cuda.mem_get_info()[0]]
        prompts = self.prompts((2, 700, 1)) + self.prompts((2, 64, 1))
        prompts = [*prompts, *prompts]
        spec = {"hidden_states": "all", "embeddings": True, "final_hidden_states": True}
        staged = self.capture(prompts, 16, spec, "staged")[1]
        free.append(torch.cuda.mem_get_info()[0])
        direct = self.capture(prompts, 16, spec, "direct")[1]
        layers = staged.layers["hidden_states"]
        equal = staged_direct = finite = 0
        for i, sample in enumerate(staged):
            twin, other = staged[(i + 4) % 8], direct[i]
            for layer in layers:
                rows = sample.hidden_states[layer]
                prompt = slice(0, len(prompts[i]["prompt_token_ids"]))
                equal += torch.equal(rows[prompt], twin.hidden_states[layer][prompt])
                staged_direct += torch.equal(rows, other.hidden_states[layer])
                finite += bool(rows.isfinite().all() and rows.abs().amax(-1).min() > 0)
        begin = [time.perf_counter()]
        for _ in range(21):
            status = self.tapped.collective_rpc("vllm_tap_status")
            begin.append(time.perf_counter())
        time.sleep(2)
        free.append(torch.cuda.mem_get_info()[0])
        return {
            "sample-layers": 8 * len(layers),
            "equal prompts, equal rows": equal,
            "staged equals direct": staged_direct,
            "finite and not zero": finite,
            "conventions": staged.conventions,
            "call_ms": statistics.median(b - a for a, b in itertools.pairwise(begin)) * 1e3,
            "staging_mib": (free[0] - free[1]) / 2**20,
            "held_idle_mib": (free[0] - free[2]) / 2**20,
            "status": status,
        }

    def measure(self, name: str, specs: list[str], rounds: int, stagings: list[str]) -> list[dict[str, Any]]:
        """Run all arms of a workload in turn."""
        workload = WORKLOADS[name]
        times: dict[str, list[float]] = {}
        parts: dict[str, list[dict[str, float]]] = {}
        sizes: dict[str, int] = {}
        for round_number in range(-1, rounds):
            prompts = self.prompts(workload)
            arms = ["plain", "idle", *(f"{spec} / {staging}" for spec in specs for staging in stagings)]
            self.random.shuffle(arms)
            for arm in arms:
                if arm in ("plain", "idle"):
                    llm = self.plain if arm == "plain" else self.tapped
                    seconds, _ = self.generate(llm, prompts, workload[2])
                else:
                    spec, staging = arm.split(" / ")
                    seconds, result = self.capture(prompts, workload[2], SPECS[spec], staging)
                    sizes[arm] = result.num_bytes
                    if round_number >= 0:
                        parts.setdefault(arm, []).append(dict(result.seconds))
                    del result
                if round_number >= 0:
                    times.setdefault(arm, []).append(seconds)
        plain = statistics.median(times["plain"])
        rows = []
        for arm in sorted(times):
            median = statistics.median(times[arm])
            mine = parts.get(arm, [])
            rows.append(
                {
                    "workload": name,
                    "arm": arm,
                    "seconds": median,
                    "ratio": plain / median,
                    "all": times[arm],
                    "bytes": sizes.get(arm, 0),
                    "parts": {key: statistics.median(p[key] for p in mine) for key in mine[0]} if mine else {},
                }
            )
        return rows


def command(words: list[str]) -> str:
    """Return the command without the places of files, which are this machine's own."""
    kept = ["bench/gpu.py"]
    for before, word in itertools.pairwise(words):
        if "--models" not in (before, word) and "--out" not in (before, word):
            kept.append(word)
    return " ".join(kept)


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    for row in rows:
        parts = " ".join(f"{key} {value * 1e3:.1f}" for key, value in row["parts"].items() if key != "generate")
        print(
            f"{row['workload']:26s} {row['arm']:42s} {row['seconds']:8.4f} s  ratio {row['ratio']:.4f} "
            f"{row['bytes'] / 1e9:7.2f} GB  {parts}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--plan", default="full", choices=list(PLANS))
    parser.add_argument("--stagings", nargs="+", default=["auto"])
    parser.add_argument("--no-plain", action="store_true", help="compare with the idle engine; starts one engine less")
    parser.add_argument("--memory", type=float, default=0.4)
    parser.add_argument("--engine", type=json.loads, default={}, help="more engine arguments, as JSON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch
    import vllm

    measured = rates()
    torch.cuda.empty_cache()
    print(f"# D2H {measured['d2h']:.1f} GB/s, device copy {measured['device_copy']:.0f} GB/s", flush=True)
    # The engine with taps first: the second takes its memory share beside it.
    tapped = start_engine(args.models / args.shape, True, args.memory, args.engine)
    plain = tapped if args.no_plain else start_engine(args.models / args.shape, False, args.memory, args.engine)
    bench = Bench(plain, tapped)
    facts = bench.check()
    print(f"# {json.dumps(facts)}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, specs, rounds in PLANS[args.plan]:
        new = bench.measure(name, specs, rounds, args.stagings)
        show(new)
        rows += new
        if args.out:
            machine = {
                "gpu": torch.cuda.get_device_name(),
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "vllm": vllm.__version__,
            }
            report = {
                "machine": machine,
                "command": command(sys.argv),
                "shape": args.shape,
                "plain": "idle engine" if args.no_plain else "engine without the plugin",
                "rates_gb_per_s": measured,
                "checks": facts,
                "rows": rows,
            }
            args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
