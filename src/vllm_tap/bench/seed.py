"""Measure what the founding document claims: lists against bytes, alone, between two processes, out of a real engine.

`python -m vllm_tap.bench.seed [--quick] [--out FILE]` runs in the user's process and starts the others.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Final

import torch

from vllm_tap.bench import handover
from vllm_tap.bench.handover import Case
from vllm_tap.bench.machine import describe_commit, describe_machine
from vllm_tap.bench.seed_engine import run_engine
from vllm_tap.bench.seed_paths import convert

CASES: Final = [
    Case("one layer", 1, 1000, 4096, 9, 3),
    Case("hidden_states", 32, 1000, 4096, 5, 1),
    Case("router_logits", 48, 1000, 128, 9, 3),
]
QUICK: Final = [
    Case("one layer", 1, 250, 4096, 3, 1),
    Case("hidden_states", 4, 250, 4096, 3, 1),
    Case("router_logits", 6, 250, 128, 3, 1),
]

COMPUTE_S: Final = 2.0
"""Seconds of forward passes that the document assumes for its whole call."""

CLAIMS: Final = [
    ("one layer, worker's half", "one layer", "worker", 200.0, 0.5, 400),
    ("one layer, client's half", "one layer", "client", 150.0, 0.3, 500),
    ("32 layers of hidden states", "hidden_states", "both", 11200.0, 25.0, 450),
    ("48 layers of router logits", "router_logits", "both", 4800.0, 15.0, 320),
]
"""Name, case, half, milliseconds claimed for lists and for bytes, gain claimed: estimates of the conversion alone."""

WHOLE_CALL: Final = (18000.0, 2040.0, 8)


def measure_conversion(cases: list[Case]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the milliseconds of both halves of both payloads, by case: no transport, a layer at a time."""
    return {
        case.name: {
            "lists": convert(case.make(), "lists", case.num_slow_rounds),
            "float32": convert(case.make(), "float32", case.num_rounds),
        }
        for case in cases
    }


def measure_handover(cases: list[Case]) -> list[dict[str, Any]]:
    """Return the results of `bench.handover` for the cases: two processes and a socket, without an engine."""
    with handover.started_worker(cases) as client:
        return [handover.run_case(client, case) for case in cases]


def judge(conversion: dict[str, Any], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set each claim beside what was measured; a gain holds if the measured one is at least as large."""
    claims = [_claim(name, _spent(conversion[case], half), *claimed) for name, case, half, *claimed in CLAIMS]
    moved = {case["name"]: {row["method"]: row["median_ms"] for row in case["rows"]} for case in cases}
    both = [moved["hidden_states"], moved["router_logits"]]
    whole = tuple(1e3 * COMPUTE_S + sum(case[method] for case in both) for method in ("lists", "float32-bytes"))
    return [*claims, _claim(f"a whole call with {COMPUTE_S:.0f} s of compute", whole, *WHOLE_CALL)]


def _spent(payloads: dict[str, dict[str, float]], half: str) -> tuple[float, float]:
    halves = ("worker_ms", "client_ms") if half == "both" else (f"{half}_ms",)
    lists, in_bytes = (sum(payloads[path][name] for name in halves) for path in ("lists", "float32"))
    return lists, in_bytes


def _claim(name: str, measured: tuple[float, ...], lists_ms: float, bytes_ms: float, gain: float) -> dict[str, Any]:
    found = measured[0] / measured[1]
    return {
        "claim": name,
        "claimed_ms": [lists_ms, bytes_ms],
        "claimed_gain": gain,
        "measured_ms": [round(value, 3) for value in measured],
        "measured_gain": round(found, 2),
        "holds": found >= gain,
    }


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(prog="python -m vllm_tap.bench.seed", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer layers and rows, few rounds; writes no file")
    parser.add_argument("--out", type=Path, help="results file; bench/results/seed-cpu.json unless --quick")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = QUICK if arguments.quick else CASES
    load_before = os.getloadavg()[0]
    conversion = measure_conversion(cases)
    moved = measure_handover(cases)
    results = {
        "benchmark": "seed",
        "command": "python -m vllm_tap.bench.seed" + (" --quick" if arguments.quick else ""),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "notes": [
            "conversion: both halves in one process, one layer at a time, no transport; what the document estimates.",
            "handover: two processes and a Unix socket, see bench/results/handover-cpu.json.",
            "engine: from the end of the last forward pass until the user holds bfloat16 tensors of all layers; "
            "collective_rpc of vLLM, one worker; lists were measured on 100 of 1000 rows and multiplied by 10.",
            "whole call: 2 s of compute, as the document assumes, and the measured hand-over of both cases.",
            "A claim holds if the measured gain of bytes over lists is at least the claimed one.",
        ],
        "conversion": conversion,
        "handover": moved,
        "engine": run_engine(1 if arguments.quick else 3),
        "claims": judge(conversion, moved),
        "load_average": [round(load, 2) for load in (load_before, os.getloadavg()[0])],
    }
    print(json.dumps({name: results[name] for name in ("conversion", "engine", "claims")}, indent=2))
    out = arguments.out or (None if arguments.quick else Path("bench/results/seed-cpu.json"))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
