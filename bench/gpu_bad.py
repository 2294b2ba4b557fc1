"""What captures do when a budget, the device's memory, the load or a client is against them. Part of bench/gpu.py.

The first case kills a client with an engine of its own. The others run in an engine inside this process without
asynchronous scheduling: the same calls then give the same batches, so tokens and rows can be compared bit by bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_setting import Report, Setting, capture, generate, sampling, start_engine, status, stop_engine, wait_idle

CHILD = "VLLM_TAP_BENCH_CHILD"
PREFILL, DECODE = "prefill 64 x 1000", "decode 64 x (64 + 128)"
SLACK_BYTES = 128 << 20
PIECE_BYTES = 128 << 20
"""What is left of the device's memory when it is filled: less than any staging needs."""


class Cases:
    """What was checked, printed as it comes."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.lines: list[dict[str, str]] = []

    def say(self, verdict: str, name: str, detail: object = "") -> None:
        """Note a line."""
        self.lines.append({"verdict": verdict, "case": name, "detail": str(detail)})
        self._report.put(cases=self.lines)
        print(f"{verdict}  {name}  {detail}", flush=True)

    def check(self, name: str, holds: bool, detail: object = "") -> None:
        """Note whether something holds."""
        self.say("PASS" if holds else "FAIL", name, detail)

    def run(self, name: str, case: Callable[[Cases], None]) -> None:
        """Run a case; what it raises is a failure of it, and the next one runs."""
        begin = time.perf_counter()
        try:
            case(self)
        except Exception as error:
            self.say("FAIL", name, f"{type(error).__name__}: {error}")
        print(f"# {name}: {time.perf_counter() - begin:.0f} s", flush=True)


def run_bad(setting: Setting, report: Report) -> bool:
    """Run all cases; return whether none failed."""
    if os.environ.get(CHILD):
        _be_killed(setting)
    cases = Cases(report)
    cases.run("client killed", lambda cases: _client_killed(setting, cases))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = start_engine(setting, True, async_scheduling=False)
    cases.run("budget", lambda cases: _budget(setting, llm, cases))
    cases.run("load", lambda cases: _load(setting, llm, cases))
    cases.run("device full", lambda cases: _device_full(setting, llm, cases))
    stop_engine(llm)
    print()
    for line in cases.lines:
        print(f"{line['verdict']}  {line['case']}")
    return all(line["verdict"] != "FAIL" for line in cases.lines)


# ------------------------------------------------------------------------------------------------------------- budget


def _budget(setting: Setting, llm: Any, cases: Cases) -> None:
    from vllm_tap.errors import BudgetError

    workload, spec = setting.workload(PREFILL), setting.spec("all layers")
    prompts, max_tokens = setting.prompts(workload)[:8], 4
    tokens = generate(llm, prompts, max_tokens)[1]
    reference = rows_of(capture(setting, llm, prompts, max_tokens, spec)[1])
    try:
        capture(setting, llm, prompts, max_tokens, spec, budget_bytes=64 << 10)
        cases.check("budget: a budget below one step raises BudgetError", False, "nothing was raised")
    except BudgetError as error:
        told = "budget_bytes" in str(error) and error.identity.get("needed_bytes", 0) > 64 << 10
        cases.check("budget: a budget below one step raises BudgetError with the numbers", told, error)
    cases.check("budget: the engine still generates the same tokens", generate(llm, prompts, max_tokens)[1] == tokens)
    after = rows_of(capture(setting, llm, prompts, max_tokens, spec)[1])
    cases.check(
        "budget: the next capture has the rows of the one before", equal(after, reference), differing(after, reference)
    )
    # Releases come over a socket of their own, a moment after the last tensor is gone.
    used = _wait(lambda: sum(state["used_bytes"] for state in status(llm)), 0)
    cases.check("budget: nothing stays in use", used == 0, f"{used} bytes")


# --------------------------------------------------------------------------------------------------------------- load


def _load(setting: Setting, llm: Any, cases: Cases) -> None:
    prompts = setting.prompts((44, 24 if setting.smoke else 200, 1))
    once, again = (_traffic(llm, setting, prompts, f"{run}", True) for run in ("first", "second"))
    plain = _traffic(llm, setting, prompts, "plain", False)
    repeated = _traffic(llm, setting, prompts, "repeated", False)
    if plain[0] != repeated[0]:
        cases.say(
            "SKIP", "load: this engine does not repeat itself without captures either, so nothing can be compared"
        )
        return
    cases.check(
        "load: rows of captures under load are the same twice", equal(once[1], again[1]), differing(once[1], again[1])
    )
    cases.check(
        "load: tokens of captured and other requests are those without captures", once[0] == plain[0] == again[0]
    )
    cases.check("load: rows came", len(once[1]) > 0, f"{len(once[1])} tensors")
    state = status(llm)[0]
    cases.check("load: no capture is left under way", state["captures"] == [], state)


def _traffic(
    llm: Any, setting: Setting, prompts: list[Any], run: str, captures: bool
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Run a fixed schedule: plain requests throughout, beside them captures that finish, are stopped, finish again.

    Returns:
        Tokens of all requests, and rows of the captures, by names that do not depend on the run.
    """
    from vllm import SamplingParams

    from vllm_tap import Spec
    from vllm_tap.client.recording import Recording

    engine, outputs = llm.llm_engine, dict[str, Any]()
    many, few = (12, 5) if setting.smoke else (120, 24)
    rows: dict[str, Any] = {}

    def add(names: list[str], given: list[Any], max_tokens: int, recording: Any = None) -> None:
        for sample, (name, prompt) in enumerate(zip(names, given, strict=True)):
            params = SamplingParams(**sampling(max_tokens))
            if recording is not None:
                params = recording.mark(params, sample)
            engine.add_request(f"{run}/{name}", prompt, params)

    def step(times: int = 1) -> None:
        for _ in range(times):
            for output in engine.step():
                if output.finished:
                    outputs[output.request_id.split("/")[1]] = output

    def until(names: list[str]) -> None:
        while not outputs.keys() >= set(names):
            step()

    load = [f"load-{number}" for number in range(32)]
    add(load, prompts[:32], many)
    step(3)
    for number, ends_well in enumerate([True, False, True]):
        names = [f"capture-{number}-{sample}" for sample in range(4)]
        recording = (
            Recording(llm, Spec(**setting.spec("all layers")), budget_bytes=setting.budget_bytes) if captures else None
        )
        add(names, prompts[32 + 4 * number : 36 + 4 * number], few, recording)
        if ends_well:
            until(names)
            if recording is not None:
                result = recording.finish([outputs[name] for name in names])
                rows |= {f"{number}/{key}": value for key, value in rows_of(result).items()}
        else:
            step(3)
            engine.abort_request([f"{run}/{name}" for name in names])
            if recording is not None:
                recording.stop()
    until(load)
    while engine.has_unfinished_requests():
        step()
    return {
        name: list(output.outputs[0].token_ids) for name, output in outputs.items() if "capture-1" not in name
    }, rows


# -------------------------------------------------------------------------------------------------------- device full


def _device_full(setting: Setting, llm: Any, cases: Cases) -> None:
    if not setting.cuda:
        cases.say("SKIP", "device full: there is no device here")
        return
    from vllm_tap.engine.cuda import driver
    from vllm_tap.errors import BudgetError

    prompts, spec = setting.prompts(setting.workload(DECODE))[:16], setting.spec("all layers")
    tokens = generate(llm, prompts, 16)[1]
    reference = rows_of(capture(setting, llm, prompts, 16, spec, staging="staged")[1])
    print(f"# staging went back after {wait_idle(llm):.1f} s", flush=True)
    taken = []
    while setting.free_bytes() > 2 * PIECE_BYTES and (address := driver.allocate(PIECE_BYTES)):
        taken.append(address)
    free = setting.free_bytes()
    print(f"# filled the device: {free / 2**20:.0f} MiB are free", flush=True)
    try:
        try:
            capture(setting, llm, prompts, 16, spec, staging="staged")
            cases.check('device full: staging="staged" is refused', False, "it was not")
        except BudgetError as error:
            told = error.identity.get("needed_bytes", 0) > free >= 0 and "gpu_memory_utilization" in str(error)
            cases.check("device full: the refusal says what is missing and the ways out", told, error)
        direct = rows_of(capture(setting, llm, prompts, 16, spec)[1])
        cases.check(
            "device full: auto falls back to direct, rows are the same",
            equal(direct, reference),
            differing(direct, reference),
        )
        cases.check("device full: no staging memory was taken", status(llm)[0]["staging_bytes"] == 0, status(llm)[0])
        cases.check("device full: the engine still generates the same tokens", generate(llm, prompts, 16)[1] == tokens)
    finally:
        for address in taken:
            driver.free(address)
    staged = rows_of(capture(setting, llm, prompts, 16, spec, staging="staged")[1])
    cases.check(
        "device full: staging works again once there is room", equal(staged, reference), differing(staged, reference)
    )


# ------------------------------------------------------------------------------------------------------ client killed


def _be_killed(setting: Setting) -> None:
    """Capture for ever in an engine of this process's own, and say which processes that are."""
    import psutil

    llm = start_engine(setting, True)
    workload = setting.workload(DECODE)
    kept = capture(setting, llm, setting.prompts(workload), workload[2], setting.spec("all layers"))[1]
    pids = [process.pid for process in psutil.Process().children(recursive=True)]
    print("capturing", *pids, flush=True)
    while kept.num_rows:
        capture(setting, llm, setting.prompts(workload), workload[2], setting.spec("all layers"))


def _client_killed(setting: Setting, cases: Cases) -> None:
    import psutil

    before = setting.free_bytes(), _shared_bytes(), set(os.listdir("/dev/shm"))
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("gpu.py")), *_without_out(sys.argv[1:])],
        env=os.environ | {CHILD: "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    said = next((line.split()[1:] for line in child.stdout if line.startswith("capturing")), None)
    if said is None:
        raise RuntimeError(f"the client ended with status {child.wait()} before it captured")
    family = [psutil.Process(int(pid)) for pid in said if psutil.pid_exists(int(pid))]
    held = before[0] - setting.free_bytes(), _shared_bytes() - before[1]
    time.sleep(1.0)  # anywhere in a capture
    child.send_signal(signal.SIGKILL)
    child.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    cases.say(
        "NOTE",
        "client killed: processes of the engine that ended by themselves",
        f"{len(family) - len(alive)} of {len(family)}",
    )
    # Python's resource tracker ends by itself after the others, and removes vLLM's names.
    for process in alive:
        with contextlib.suppress(psutil.Error):
            if not any("resource_tracker" in word for word in process.cmdline()):
                process.kill()
    psutil.wait_procs(alive, timeout=30)
    free = _wait(lambda: before[0] - setting.free_bytes(), SLACK_BYTES)
    shared = _wait(lambda: _shared_bytes() - before[1], SLACK_BYTES)
    cases.check(
        "client killed: the device's memory is back",
        free <= SLACK_BYTES,
        f"{held[0] >> 20} MiB held, {free >> 20} after",
    )
    cases.check(
        "client killed: shared memory is back", shared <= SLACK_BYTES, f"{held[1] >> 20} MiB held, {shared >> 20} after"
    )
    names = sorted(set(os.listdir("/dev/shm")) - before[2])
    cases.check("client killed: no name of ours is left", not any("tap" in name for name in names), names)


def _without_out(words: list[str]) -> list[str]:
    at = words.index("--out") if "--out" in words else len(words)
    return words[:at] + words[at + 2 :]


def _shared_bytes() -> int:
    """Return what the system holds in shared memory, memfds included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


def _wait(amount: Callable[[], int], limit: int, timeout_s: float = 30.0) -> int:
    deadline = time.perf_counter() + timeout_s
    while (now := amount()) > limit and time.perf_counter() < deadline:
        time.sleep(0.1)
    return now


# --------------------------------------------------------------------------------------------------------------- rows


def rows_of(result: Any) -> dict[str, Any]:
    """Return copies of all rows, by sample and layer."""
    return {
        f"{index}/{layer}": rows.clone()
        for index, sample in enumerate(result)
        for layer, rows in sample.hidden_states.items()
    }


def equal(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether rows are the same bit by bit."""
    return mine.keys() == other.keys() and not differing(mine, other)


def differing(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return a few keys whose rows differ."""
    import torch

    return [key for key in mine.keys() & other.keys() if not torch.equal(mine[key], other[key])][:4]
