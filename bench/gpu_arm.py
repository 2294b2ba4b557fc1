#!/usr/bin/env python3
"""One engine for bench/gpu_table.py, in a process of its own: a JSON command a line comes in, a JSON answer goes out.

    {"do": "generate" | "capture" | "host" | "stop", "workload": NAME, "spec": NAME, "seed": NUMBER}

Which source tree runs is for PYTHONPATH to say. Everything that is printed goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_parts import STEP, usual
from gpu_setting import Setting, capture, generate, profile, start_engine, status, stop_engine

HOST_CAPTURES = 3
WARM_PART = 4
"""Before prefill, one in so many prompts runs untimed: it runs at the power limit, and after a rest 1 % faster."""


class Arm:
    """An engine, and what is asked of it."""

    def __init__(self, setting: Setting, tapped: bool) -> None:
        begin = time.perf_counter()
        self.setting = setting
        self.llm = start_engine(setting, tapped)
        self.start_seconds = time.perf_counter() - begin

    def generate(self, workload: str, seed: int, spec: str) -> dict[str, Any]:
        """Time plain generation; requests come as fast as those of captures, which let a first step fill up."""
        prompts, max_tokens = self._prompts(workload, seed)
        return {"seconds": generate(self.llm, prompts, max_tokens)[0]}

    def capture(self, workload: str, seed: int, spec: str) -> dict[str, Any]:
        """Time a capture, until its rows are in this process's hands."""
        prompts, max_tokens = self._prompts(workload, seed)
        seconds, result = capture(self.setting, self.llm, prompts, max_tokens, self.setting.spec(spec))
        cached = sum(output.num_cached_tokens or 0 for output in result.outputs)
        return {"seconds": seconds, "bytes": result.num_bytes, "parts": dict(result.seconds), "cached": cached}

    def host(self, workload: str, seed: int, spec: str) -> dict[str, Any]:
        """Return the microseconds of the host that a step of a capture takes, and what a worker holds."""
        self.capture(workload, seed, spec)
        profile(self.llm, "host")
        for number in range(HOST_CAPTURES):
            self.capture(workload, seed + number, spec)
        figures = profile(self.llm, "")[0]
        parts = {label: usual(figures[label]) * 1e6 for label in STEP if figures.get(label)}
        return {"step_us": {**parts, "sum": sum(parts.values())}, "status": status(self.llm)}

    def _prompts(self, workload: str, seed: int) -> tuple[list[Any], int]:
        self.setting.random = random.Random(seed)
        size = self.setting.workload(workload)
        prompts = self.setting.prompts(size)
        if workload.startswith("cached"):
            generate(self.llm, prompts, 1)
        elif size[2] == 1:
            generate(self.llm, prompts[: len(prompts) // WARM_PART], 1)
        return prompts, size[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--shape")
    parser.add_argument("--tapped", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--engine", type=json.loads, default={})
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import vllm

    import vllm_tap

    arm = Arm(Setting(args.models, args.shape, args.smoke, 0.05, args.engine, None), args.tapped)
    versions = {"vllm": vllm.__version__, "tree": str(Path(vllm_tap.__file__).parent)}
    print(json.dumps({"start_seconds": arm.start_seconds, **versions}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "stop":
            break
        print(json.dumps(getattr(arm, do)(**command)), file=answers)
    stop_engine(arm.llm)


if __name__ == "__main__":
    main()
