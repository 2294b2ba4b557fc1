#!/usr/bin/env python3
"""Run the tests on the GPU of this machine, in all modes, several processes at once: python tests/on_gpu.py.

A lane is a process: files of tests in one mode (runner, eager steps or compiled graphs, prefix cache), or the soak. All
of them run on one device side by side, each with a time of its own; the table of what ran comes last, whatever failed.
--out FOLDER gets the results as JSON, and the logs. --smoke runs lanes on a CPU, where the V2 runner's are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent

V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
GRAPHS = {"VLLM_TAP_TEST_GRAPHS": "1"}
CACHE, NO_CACHE = {"VLLM_TAP_TEST_PREFIX_CACHE": "1"}, {"VLLM_TAP_TEST_PREFIX_CACHE": "0"}


class Lane(NamedTuple):
    """Tests (or a program, by its `.py` alone) in one mode."""

    name: str
    words: tuple[str, ...]
    environment: dict[str, str]


def engine_files(*names: str) -> tuple[str, ...]:
    """Return the files of tests of these names."""
    return tuple(f"tests/engine/test_{name}.py" for name in names)


SOAK = ("tests/soak.py", "--rows", "20000")
NO_DRAFTS = ("--engines", "preempting", "asynchronous")
# The longest first. float32 unless it says bfloat16.
LANES = (
    Lane("V2 graphs, rows", engine_files("rows"), V2 | GRAPHS | NO_CACHE),
    Lane("V1 graphs, rows", engine_files("rows"), V1 | GRAPHS | CACHE),
    Lane("V2 graphs, many captures", engine_files("many_captures", "streams"), V2 | GRAPHS),
    Lane("V1 graphs, many captures", engine_files("many_captures", "streams"), V1 | GRAPHS),
    Lane("V2 bfloat16, tokens", ("tests/on_device/test_tokens.py",), V2 | GRAPHS),
    Lane("V1 bfloat16, tokens", ("tests/on_device/test_tokens.py",), V1 | GRAPHS),
    Lane("V2 eager, rows", engine_files("rows"), V2 | CACHE),
    Lane("V1 eager, rows", engine_files("rows"), V1 | NO_CACHE),
    Lane("V2 bfloat16", ("tests/on_device/test_bfloat16.py",), V2 | GRAPHS | NO_CACHE),
    Lane("V1 bfloat16", ("tests/on_device/test_bfloat16.py",), V1 | GRAPHS | CACHE),
    Lane("V1 graphs, experts", engine_files("experts"), V1 | GRAPHS | CACHE),
    Lane("V2 graphs, experts", engine_files("experts"), V2 | GRAPHS | NO_CACHE),
    Lane("V2 eager, experts", engine_files("experts"), V2 | CACHE),
    Lane("V1, soak", SOAK, V1),
    Lane("V2 eager, legacy", engine_files("legacy"), V2),
    Lane("V1 graphs, legacy", engine_files("legacy"), V1 | GRAPHS),
    Lane("V2 graphs, lifetimes", engine_files("lifetimes"), V2 | GRAPHS),
    Lane("V2 graphs, async", engine_files("async"), V2 | GRAPHS),
    Lane("V1 graphs, async", engine_files("async"), V1 | GRAPHS),
    Lane("V1 eager, lifetimes", engine_files("lifetimes"), V1),
    Lane("V1 graphs, specs", engine_files("specs"), V1 | GRAPHS),
    Lane("V2 graphs, specs", engine_files("specs"), V2 | GRAPHS),
    Lane("V2 graphs, a spec per prompt", engine_files("specs_per_prompt"), V2 | GRAPHS | NO_CACHE),
    Lane("V1 graphs, a spec per prompt", engine_files("specs_per_prompt"), V1 | GRAPHS | CACHE),
    Lane("V2, soak", (*SOAK, "--runner", "v2", *NO_DRAFTS), V2),
    Lane("V1 graphs, scheduling", engine_files("rewritten_rows"), V1 | GRAPHS),
    Lane("V1 eager, in process", engine_files("in_process", "pooling"), V1),
    Lane("scenarios of the simulated device", ("tests/on_device/test_scenarios.py",), {}),
)

SMOKE = ("V1 bfloat16", "V1 bfloat16, tokens", "V1 eager, rows", "scenarios of the simulated device")

DEVICE = {
    "VLLM_TAP_TEST_DEVICE": "cuda",
    # Triton's kernels would multiply float32 as TF32: rows were off by 0.4 %.
    "TRITON_F32_DEFAULT": "ieee",
    "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Each process computes on the device; their threads would only take turns.
    "OMP_NUM_THREADS": "1",
}
ENDED = re.compile(r" in [\d.]+s\b")
SUMMARY = re.compile(r"(\d+) (passed|failed|error|errors|skipped|deselected)")


class Run:
    """A lane that runs, and what came of it."""

    def __init__(self, lane: Lane, folder: Path, timeout_s: float, options: list[str], device: dict[str, str]) -> None:
        self.lane, self._timeout_s, self.begin = lane, timeout_s, time.monotonic()
        self._is_cut = False
        name = re.sub(r"\W+", "-", lane.name)
        self.log, self.xml = folder / f"{name}.log", folder / f"{name}.xml"
        command = [sys.executable, *lane.words]
        if not lane.words[0].endswith("soak.py"):
            timeout = "240" if device else "1200"  # where several share a few cores, engines start slowly
            ours = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", timeout, f"--junitxml={self.xml}"]
            command = [sys.executable, *ours, *options, *lane.words]
        environment = os.environ | device | lane.environment | {"PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )

    def is_over(self) -> bool:
        """Tell whether it has ended, or end it where its time has."""
        if self._process.poll() is None:
            if time.monotonic() - self.begin < self._timeout_s:
                return False
            self._is_cut = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return True

    def result(self) -> dict[str, Any]:
        """Return what the table says of it, and each test."""
        lines = self.log.read_text(errors="replace").splitlines()
        words = [line for line in lines if SUMMARY.search(line) and ENDED.search(line)]
        counts = {kind.rstrip("s"): int(number) for number, kind in SUMMARY.findall(words[-1] if words else "")}
        return {
            "lane": self.lane.name,
            "words": self.lane.words,
            "environment": self.lane.environment,
            "status": self._process.returncode,
            "cut": self._is_cut,
            "seconds": round(time.monotonic() - self.begin, 1),
            "counts": counts,
            "notes": [line for line in lines if line.startswith(("largest errors", "tokens:", '{"engine"', "no row"))],
            "tests": self._tests(),
            "tail": [] if self._process.returncode == 0 else lines[-60:],
        }

    def _tests(self) -> list[tuple[str, str, float]]:
        if not self.xml.is_file():
            return []
        try:
            cases = list(Xml.parse(self.xml).getroot().iter("testcase"))
        except Xml.ParseError:  # it was cut short
            return []
        return [
            (
                f"{case.get('classname')}::{case.get('name')}",
                next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed"),
                float(case.get("time") or 0),
            )
            for case in cases
        ]


def show(result: dict[str, Any]) -> None:
    """Print a line of the table."""
    counts = "  ".join(f"{number} {kind}" for kind, number in result["counts"].items())
    fine = "CUT" if result["cut"] else "pass" if result["status"] == 0 else f"FAIL ({result['status']})"
    print(f"{fine:10s} {result['lane']:36s} {result['seconds']:6.0f} s  {counts}", flush=True)
    for note in result["notes"]:
        print(f"{'':11s}{note[:220]}", flush=True)


def failures(result: dict[str, Any]) -> None:
    """Print which tests of a lane failed, and the end of its log."""
    failed = [name for name, outcome, _ in result["tests"] if outcome in ("failure", "error")]
    why = "its time was over" if result["cut"] else "no report"
    print(f"\n---- {result['lane']}: {', '.join(failed) or why}")
    errors = [line for line in result["tail"] if line.startswith(("E  ", "FAILED", "ERROR"))]
    print("\n".join(line[:200] for line in (errors or result["tail"])[-12:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", nargs="+", metavar="BEGIN", help="those whose names begin so")
    parser.add_argument("--jobs", type=int, default=12, help="at once")
    parser.add_argument("--seconds", type=float, default=560, help="for all; lanes that run then are ended")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, one by one, some lanes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="of pytest, after --")
    args = parser.parse_args()
    device = {} if args.smoke else DEVICE
    lanes = [lane for lane in LANES if not args.smoke or args.lanes or lane.name in SMOKE]
    lanes = [lane for lane in lanes if args.lanes is None or lane.name.startswith(tuple(args.lanes))]
    folder = args.out or Path(tempfile.mkdtemp(prefix="vllm-tap-gpu-"))
    logs = Path(tempfile.mkdtemp(prefix="vllm-tap-lanes-"))
    begin, waiting, running, results = time.monotonic(), list(lanes), list[Run](), list[dict[str, Any]]()
    while waiting or running:
        left = args.seconds - (time.monotonic() - begin)
        while waiting and len(running) < (1 if args.smoke else args.jobs) and left > 0:
            running.append(Run(waiting.pop(0), logs, left, args.options, device))
        for run in [run for run in running if run.is_over()]:
            running.remove(run)
            results.append(run.result())
            show(results[-1])
        if left <= 0 and not running:
            break
        time.sleep(0.2)
    (folder / "tests-gpu.json").write_text(json.dumps(results, indent=1))
    with (folder / "tests-gpu.log").open("w") as whole:
        for log in sorted(logs.glob("*.log")):
            whole.write(f"==== {log.stem}\n{log.read_text(errors='replace')[-400_000:]}\n")
    for result in results:
        if result["status"] != 0:
            failures(result)
    print()
    for result in results:
        show(result)
    total = sum(result["counts"].get("passed", 0) for result in results)
    print(f"{total} tests passed in {time.monotonic() - begin:.0f} s, {len(waiting)} lanes were not begun")
    sys.exit(1 if waiting or any(result["status"] != 0 for result in results) else 0)


if __name__ == "__main__":
    main()
