"""What steps that read prompts ask of the host, with and without the plugin. Part of bench/gpu.py (`--plan host`).

Two engines of either kind: those of one kind differ, too. Inside each, every step with a new prompt is timed, and its
page faults are counted: a step of few tokens is launched more slowly than it runs.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from typing import Any, NamedTuple

from gpu_ratios import ALL, standard_error
from gpu_setting import Report, Setting, capture, generate, start_engine, stop_engine, wait_idle

COPIES = 2
"""Engines of each kind."""

CASES = [  # (what the engines with the plugin do, prompts, tokens of each, tokens to generate)
    ("idle, before a capture", 1, 64, 1),
    ("idle, before a capture", 1, 400, 1),
    ("idle, before a capture", 8, 64, 4),
    (ALL, 8, 64, 4),
    ("idle, after captures", 8, 64, 4),
]
ROUNDS = 80

Step = tuple[float, int]
"""(seconds of `execute_model`, page faults of the engine's thread meanwhile)."""


class Engine(NamedTuple):
    """One that runs, with the plugin (`tapped`) or without it."""

    number: int
    tapped: bool
    llm: Any

    def run(self, setting: Setting, prompts: list[Any], max_tokens: int, spec: dict[str, Any] | None) -> float:
        """Capture, or generate where there is no plugin or nothing to capture; return the seconds it took."""
        if self.tapped and spec is not None:
            return capture(setting, self.llm, prompts, max_tokens, spec)[0]
        return generate(self.llm, prompts, max_tokens)[0]


def run_host(setting: Setting, report: Report) -> bool:
    """Run all cases in turn on all engines; return whether there was anything to compare."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the plain engines have no calls of ours
    few = {} if setting.smoke else {"gpu_memory_utilization": 0.9 / (2 * COPIES), "max_model_len": 2048}
    engines = [
        Engine(number, tapped, start_engine(setting, tapped, **few))
        for number in range(1, COPIES + 1)
        for tapped in (True, False)
    ]
    for engine in engines:
        engine.llm.collective_rpc(watch_steps)
        engine.run(setting, setting.prompts((8, 8 if setting.smoke else 64, 16)), 16, None)
    rows: list[dict[str, Any]] = []
    for what, num_prompts, length, max_tokens in CASES:
        size = num_prompts, 8 if setting.smoke else length, max_tokens
        spec = setting.spec(ALL) if what == ALL else None
        if spec is not None:
            for engine in (engine for engine in engines if engine.tapped):
                engine.run(setting, setting.prompts(size), max_tokens, spec)
                wait_idle(engine.llm)
                wait_idle(engine.llm, "is_preparing")
        rows += _measured(setting, engines, what, size, spec)
        report.put(hosts=rows)
    for engine in engines:
        stop_engine(engine.llm)
    return bool(rows)


def _measured(
    setting: Setting, engines: list[Engine], what: str, size: tuple[int, int, int], spec: dict[str, Any] | None
) -> list[dict[str, Any]]:
    times: dict[Engine, list[float]] = {engine: [] for engine in engines}
    for engine in engines:
        engine.llm.collective_rpc(take_steps)
    for _ in range(setting.rounds(ROUNDS)):
        prompts = setting.prompts(size)
        for engine in setting.random.sample(engines, len(engines)):
            times[engine].append(engine.run(setting, prompts, size[2], spec) * 1e3)
    rows = []
    for engine in engines:
        steps: list[Step] = engine.llm.collective_rpc(take_steps)[0]
        row = {
            "case": what if engine.tapped else "plain",
            "workload": "{} x ({} + {})".format(*size),
            "engine": engine.number,
            "ms": statistics.mean(times[engine]),
            "error_ms": standard_error(times[engine]),
            "host_ms": statistics.mean(seconds for seconds, _ in steps) * 1e3,
            "faults": statistics.mean(faults for _, faults in steps),
        }
        print(
            f"{row['workload']:12s} {row['case']:24s} {row['engine']} {row['ms']:7.2f} +- {row['error_ms']:.2f} ms  a "
            f"step that reads prompts: {row['host_ms']:6.2f} ms of the host, {row['faults']:6.1f} page faults",
            flush=True,
        )
        rows.append(row)
    return rows


def watch_steps(worker: Any) -> None:
    """In a worker: time its steps that have new prompts from now on."""
    runner, steps = worker.model_runner, list[Step]()
    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        before, begin = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt, time.perf_counter()
        result = execute(scheduler_output, *args, **kwargs)
        seconds = time.perf_counter() - begin
        if scheduler_output.scheduled_new_reqs:
            steps.append((seconds, resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before))
        return result

    runner.execute_model, runner.steps_with_prompts = execute_model, steps


def take_steps(worker: Any) -> list[Step]:
    """In a worker: return what was collected, and forget it."""
    steps = worker.model_runner.steps_with_prompts
    taken = list(steps)
    steps.clear()
    return taken
