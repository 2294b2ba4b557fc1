"""Two tensor-parallel ranks: the bytes that each copies, and the ratio to plain. Part of bench/gpu.py."""

from __future__ import annotations

import argparse
from typing import Any

from gpu_ratios import ALL, Plan, Ratios, show, summarise
from gpu_setting import Report, Setting, capture, generate, sampling, start_engine, status, stop_engine

BYTES_OF = "prefill 64 x 1000"


def run_tp2(setting: Setting, report: Report, args: argparse.Namespace, plan: Plan) -> bool:
    """Measure, print, and return whether each of two ranks copies half of what one does."""
    one = start_engine(setting, True)
    alone = rank_bytes(setting, one)
    stop_engine(one)
    del one
    two = start_engine(setting, True, tensor_parallel_size=2)
    shared = rank_bytes(setting, two)
    shares = [rank["num_bytes"] / alone[0]["num_bytes"] for rank in shared]
    report.put(tp1_rank_bytes=alone, tp2_rank_bytes=shared, tp2_shares=shares)
    print(f"# bytes of rank 0 alone {alone[0]}, of two ranks {shared}: shares {shares}", flush=True)
    if args.apart:
        rows = _apart(setting, two, plan)
        report.put(rows=rows)
        show(rows)
    else:
        _beside(setting, report, two, plan, args.no_plain)
    halves = all(abs(share - 0.5) < 0.05 for share in shares)
    print(f"{'PASS' if halves else 'FAIL'}  each of two ranks takes half of the bytes: {shares}", flush=True)
    return halves


def rank_bytes(setting: Setting, llm: Any) -> list[dict[str, float]]:
    """Return the bytes of rows that each rank took for one capture, and those that its copies moved."""
    from vllm import SamplingParams

    from vllm_tap import Spec
    from vllm_tap.client.recording import Recording

    workload = setting.workload(BYTES_OF)
    prompts = setting.prompts(workload)
    llm.collective_rpc("vllm_tap_profile", args=("dma",))
    recording = Recording(llm, Spec(**setting.spec(ALL)), budget_bytes=setting.budget_bytes)
    params = [recording.mark(SamplingParams(**sampling(workload[2])), sample) for sample in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    states = status(llm)
    result = recording.finish(outputs)
    assert sum(state["num_bytes"] for state in states) == result.num_bytes
    copied = llm.collective_rpc("vllm_tap_profile", args=("",))
    return [
        {"num_bytes": state["num_bytes"], "copied_bytes": sum(figures.get("copy_bytes", []))}
        for state, figures in zip(states, copied, strict=True)
    ]


def _beside(setting: Setting, report: Report, tapped: Any, plan: Plan, no_plain: bool) -> None:
    plain = tapped if no_plain else start_engine(setting, False, tensor_parallel_size=2)
    ratios = Ratios(setting, [(plain, tapped)])
    rows: list[dict[str, Any]] = []
    for name, specs, rounds in plan:
        new = ratios.measure(name, specs, rounds, ["auto"])
        show(new)
        rows += new
        report.put(rows=rows)
    del ratios
    stop_engine(tapped)
    if not no_plain:
        stop_engine(plain)


def _apart(setting: Setting, tapped: Any, plan: Plan) -> list[dict[str, Any]]:
    """One engine after the other, for GPUs that do not hold both."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name, *_ in plan}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in plan}
    sizes: dict[str, int] = {}
    arm = f"{ALL} / auto"
    for name, _, rounds in plan:
        workload = setting.workload(name)
        for round_number in range(-1, setting.rounds(rounds)):
            prompts = setting.prompts(workload)
            idle, _ = generate(tapped, prompts, workload[2])
            seconds, result = capture(setting, tapped, prompts, workload[2], setting.spec(ALL))
            sizes[name] = result.num_bytes
            if round_number >= 0:
                times[name].setdefault("idle", []).append(idle)
                times[name].setdefault(arm, []).append(seconds)
                parts[name].append(dict(result.seconds))
            del result
    stop_engine(tapped)
    plain = start_engine(setting, False, tensor_parallel_size=2)
    for name, _, rounds in plan:
        workload = setting.workload(name)
        for round_number in range(-1, setting.rounds(rounds)):
            seconds, _ = generate(plain, setting.prompts(workload), workload[2])
            if round_number >= 0:
                times[name].setdefault("plain", []).append(seconds)
    stop_engine(plain)
    return [row for name, *_ in plan for row in summarise(name, times[name], {arm: parts[name]}, {arm: sizes[name]})]
